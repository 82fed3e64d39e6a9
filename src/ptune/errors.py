"""The errors that ptune raises on purpose, as one tree.

    PtuneError
    |-- ConfigError          ValueError    a setting that is unknown, missing or contradicts another
    |-- TemplateError        ValueError    a template that cannot be parsed or rendered
    |-- DataError            ValueError    a data file or record that cannot be used
    |-- BackboneError        ValueError    a model that cannot be loaded or cannot carry virtual tokens
    |-- SoftPromptError      ValueError    a soft prompt that is damaged, or of another backbone or task
    |-- TrainingError        RuntimeError  a run that cannot go on (not a number, no gradient)
    |-- OutputError          OSError       a folder or disk that cannot be written as asked
    `-- MissingExtraError    ImportError   an optional package that is not installed

    Stopped                  KeyboardInterrupt   Ctrl-C or SIGTERM; the run has saved where it stands

Every message is one sentence for the person at the keyboard: what was expected, what was found, where, and the mend.
The command line prints it without a traceback and exits with 2. This module knows nothing else of ptune.
"""


class PtuneError(Exception):
    """Root of every error that ptune raises on purpose."""


class ConfigError(PtuneError, ValueError):
    """A setting is unknown, missing or contradicts another."""


class TemplateError(PtuneError, ValueError):
    """A template cannot be parsed, or a record cannot be rendered by it."""


class DataError(PtuneError, ValueError):
    """A data file or one of its records cannot be used."""


class BackboneError(PtuneError, ValueError):
    """A model cannot be loaded, or cannot carry virtual tokens."""


class SoftPromptError(PtuneError, ValueError):
    """A soft prompt is damaged, belongs to another backbone, or is of another task than is asked."""


class TrainingError(PtuneError, RuntimeError):
    """A run cannot go on: the loss is not a number, or no gradient reaches the prompt."""


class OutputError(PtuneError, OSError):
    """A folder cannot be written as asked: it holds another run, is in use, or the disk is full."""


class MissingExtraError(PtuneError, ImportError):
    """An optional package is not installed."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and has saved where it stands; `except Exception` lets it pass, as Ctrl-C."""


def did_you_mean(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return ``' Did you mean "x"?'`` for the nearest known name, or an empty string where none is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
