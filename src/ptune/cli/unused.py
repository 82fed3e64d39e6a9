"""Options that would do nothing beside the others that were given: refused, never ignored."""

from __future__ import annotations

from ptune.errors import ConfigError


def refuse_unused(why: str, **options: object) -> None:
    """See that no option was given that would do nothing.

    Args:
        why: it would, as the end of "--resume would do nothing, for ...".
        options: by their names, with underscores for dashes; None, False or empty where it was not given.

    Raises:
        ConfigError: one was given.
    """
    for name, value in options.items():
        if value is not None and value is not False and value != []:
            raise ConfigError(f"--{name.replace('_', '-')} would do nothing, for {why}; leave it out")
