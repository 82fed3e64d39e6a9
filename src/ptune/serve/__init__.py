"""`ptune serve`: an OpenAI-compatible server over one engine. Needs the extra packages of ``ptune[serve]``."""
