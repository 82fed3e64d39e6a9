"""The folder of a run: the soft prompt on top, the run's files in ``run/``. One run at a time, none lost.

    prompt/ptune.json, soft_prompt.safetensors, ...   the soft prompt, written at the end
    prompt/run/config.yaml                            the settings, as `ptune train` reads them
    prompt/run/checkpoint.safetensors                 the whole state, replaced atomically
    prompt/run/log.jsonl                              one line a logged step or evaluation
    prompt/run/assessment.json                        what dev says at the end, where answers have labels
    prompt/run/comparison.json                        how its answers differ from the bare model's

Knows the settings, and nothing of models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ptune.config.file import config_yaml, differing_settings, load_config
from ptune.config.run import RunConfig
from ptune.errors import ConfigError, OutputError
from ptune.files import append_line, folder_lock, write_json, write_text

LOG, SETTINGS, CANDIDATES = "log.jsonl", "config.yaml", "search.json"
ASSESSMENT, COMPARISON = "assessment.json", "comparison.json"

# Settings that may change between a run and its resumption without changing its result. What stands at the paths is
# held to hashes in the checkpoint.
_FREE_TO_CHANGE = {
    "output",
    "data.train",
    "data.dev",
    "model.name",
    "training.checkpoint_minutes",
    "training.shard_backbone",
    "training.samples",
    "training.trackers",
    "training.logging_steps",
}


class RunFolder:
    """A run's folder, locked while it is open. Until the run begins nothing in it is changed.

    Attributes:
        path: the soft prompt's folder.
        run: the run's own files.
        checkpoint: the state of the run; exists where there is something to go on with.
    """

    def __init__(self, config: RunConfig, *, resume: bool, overwrite: bool, writes: bool = True) -> None:
        """Name the folder; nothing is touched yet.

        Args:
            config: the run's settings.
            resume: it goes on with what stands there.
            overwrite: it takes the place of what stands there.
            writes: False in all processes of a run but one, which locks and writes for them.
        """
        self.path = config.output
        self.run = config.output / "run"
        self.checkpoint = self.run / "checkpoint.safetensors"
        self._config, self._resume, self._overwrite, self._writes = config, resume, overwrite, writes
        self._stack = ExitStack()
        self._made: list[Path] = []
        self._begun = False

    def __enter__(self) -> RunFolder:
        """Lock the folder and see that it may be used.

        Raises:
            OutputError: it holds another run or something else, is in use, or cannot be written.
            ConfigError: a run to resume had other settings.
        """
        if not self._writes:
            return self
        others = self._foreign_files()
        if others:
            raise OutputError(f'"{self.path}" is no run\'s folder: it holds {others[0]}; choose another --output')
        self._made = [folder for folder in (self.run, *self.run.parents) if not folder.exists()]
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f'cannot make the folder "{self.run}": {error.strerror}') from error
        self._stack.callback(self._remove_what_was_made)
        try:
            self._stack.enter_context(folder_lock(self.run))
            self._check()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Take the folder for this run, once settings, model and data are known to fit.

        Raises:
            OutputError: it cannot be written.
        """
        if not self._resume and self._writes:
            for old in (self.checkpoint, *(self.run / name for name in (LOG, ASSESSMENT, COMPARISON, CANDIDATES))):
                try:
                    old.unlink(missing_ok=True)
                except OSError as error:
                    raise OutputError(f'cannot remove "{old}" of an older run: {error.strerror}') from error
            write_text(self.run / SETTINGS, config_yaml(self._config))
        self._begun = True

    def go_on_after(self, step: int) -> None:
        """Take over settings that were free to change, and drop the log's lines of steps that a kill has lost.

        Those steps are taken again; a line that the kill cut goes, too.

        Args:
            step: the last one that is kept; -1 for none, not even the evaluation before the first.

        Raises:
            OutputError: the folder cannot be written.
        """
        if not self._writes:
            return
        if self._resume:
            write_text(self.run / SETTINGS, config_yaml(self._config))
        path = self.run / LOG
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                write_text(path, "".join(line + "\n" for line in kept))

    def log(self, values: dict[str, Any]) -> None:
        """Add a line to ``run/log.jsonl``.

        Raises:
            OutputError: it cannot be written.
        """
        if self._writes:
            append_line(self.run / LOG, json.dumps(values))

    def assessed(self, values: dict[str, Any]) -> None:
        """Write ``run/assessment.json``.

        Raises:
            OutputError: it cannot be written.
        """
        if self._writes:
            write_json(self.run / ASSESSMENT, values)

    def compared(self, values: dict[str, Any]) -> None:
        """Write ``run/comparison.json``.

        Raises:
            OutputError: it cannot be written.
        """
        if self._writes:
            write_json(self.run / COMPARISON, values)

    def hand_over(self, config: RunConfig, log: Sequence[dict[str, Any]]) -> None:
        """Make this the folder of a search's best candidate, whose checkpoint and prompt are written here too.

        Args:
            config: that run's settings.
            log: its lines so far.

        Raises:
            OutputError: the folder cannot be written.
        """
        write_text(self.run / SETTINGS, config_yaml(config))
        write_text(self.run / LOG, "".join(json.dumps(line) + "\n" for line in log))

    def _foreign_files(self) -> list[str]:
        if not self.path.is_dir() or (self.path / "run").is_dir() or (self.path / "ptune.json").exists():
            return []
        return sorted(p.name for p in self.path.iterdir())

    def _remove_what_was_made(self) -> None:
        if not self._begun:
            with suppress(OSError):  # not empty: somebody else writes there
                for folder in self._made:
                    folder.rmdir()

    def _check(self) -> None:
        settings = self.run / SETTINGS
        if self._resume:
            if not settings.is_file():
                raise OutputError(f'"{self.path}" holds no run to resume; leave --resume out to begin one')
            differing = [n for n in differing_settings(load_config(settings), self._config) if n not in _FREE_TO_CHANGE]
            if differing:
                raise ConfigError(
                    f"a resumed run must have the settings it began with, and {', '.join(differing)} differ; "
                    "begin anew with --overwrite, or start from this prompt with --from"
                )
            return
        if (settings.is_file() or (self.path / "ptune.json").exists()) and not self._overwrite:
            raise OutputError(
                f'"{self.path}" holds another run; choose another --output, or --resume it, or --overwrite it'
            )


def _step_of(line: str) -> float:
    """Return the step of a line of the log; infinity for half a line."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
