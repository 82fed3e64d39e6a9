"""`python -m ptune` is `ptune`."""

from ptune.cli import main

if __name__ == "__main__":
    main()
