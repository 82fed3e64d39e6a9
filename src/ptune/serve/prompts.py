"""The folder of soft prompts that a server offers, and those of them that stand in the engine.

A name that a request gives is looked up in a dictionary and never becomes part of a path. Each version of a soft prompt
is an object of its own with ids of its own in the engine, so a request keeps the version that it began with.

`PromptFolder` belongs to the event loop, `VersionsInMemory` to the thread that owns the engine. Knows no HTTP but
refusals.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ptune.engine.engine import Engine, LoadedPrompt
from ptune.errors import ConfigError, PtuneError, SoftPromptError
from ptune.serve.metrics import Metrics
from ptune.serve.refusals import unknown_model, unusable_model
from ptune.soft_prompts.files import DESCRIPTION, read_description
from ptune.soft_prompts.library import folders_in

_log = logging.getLogger(__name__)
_numbers = itertools.count()

Stamp = tuple[int, int, int]
"""What tells one save of a description from the next: time, size and inode."""


@dataclass(eq=False)
class Served:
    """One version of a soft prompt.

    Attributes:
        name: its folder's, as a path from that of all soft prompts.
        folder: where it lies.
        stamp: of the description that was read.
        task: classification, generation, ...
        created: seconds since 1970.
        retired: whether it was replaced or removed; it goes when no request uses it.
        key: its name in the engine.
    """

    name: str
    folder: Path
    stamp: Stamp
    task: str
    created: int
    retired: bool = False
    key: str = field(default_factory=lambda: f"version {next(_numbers)}")


class _UnusableError(Exception):
    """Why a soft prompt cannot be served: for clients, and for the log, which may name paths."""

    def __init__(self, reason: str, for_log: str | None = None) -> None:
        super().__init__(reason)
        self.for_log = for_log or reason


class Owner(Protocol):
    """What is known here of the backbone that soft prompts belong to."""

    @property
    def name(self) -> str:
        """As the user called it."""

    def matches(self, other: dict[str, Any]) -> bool:
        """Whether a fingerprint is this backbone's."""


class PromptFolder:
    """The soft prompts in a folder and the folders within it, by name."""

    def __init__(self, folder: Path | None, backbone: Owner) -> None:
        """Read the folder; None for a server of the bare backbone alone.

        Raises:
            ConfigError: there is no such folder.
        """
        if folder is not None and not folder.is_dir():
            raise ConfigError(f'there is no folder "{folder}"; --prompts names one that holds soft prompts')
        self._folder, self._backbone = folder, backbone
        local = Path(backbone.name).is_dir()
        self.bare = Path(backbone.name).resolve().name if local else backbone.name  # the bare model's name
        self.served: dict[str, Served] = {}
        self._unusable: dict[str, tuple[Stamp, str]] = {}
        self.scan()

    def find(self, name: str) -> Served | None:
        """Return the newest version of a soft prompt; None for the backbone itself.

        Raises:
            RefusedError: 404, no model of that name, or one that cannot be used.
        """
        if name == self.bare:
            return None
        served, unusable = self.served.get(name), self._unusable.get(name)
        if served is None and unusable is not None:
            raise unusable_model(name, unusable[1])
        if served is None:
            raise unknown_model(name, [self.bare, *self.served])
        return served

    def scan(self) -> None:
        """Take up what was added, replaced and removed since. A version that cannot be used leaves the old in place."""
        if self._folder is None:
            return
        found = {name: path / DESCRIPTION for name, path in folders_in(self._folder).items()}
        served: dict[str, Served] = {}
        unusable: dict[str, tuple[Stamp, str]] = {}
        for name, path in found.items():
            before, mistake = self.served.get(name), self._unusable.get(name)
            with contextlib.suppress(FileNotFoundError):
                stamp = _stamp(path)
                if before is not None and before.stamp == stamp:
                    served[name] = before
                elif mistake is not None and mistake[0] == stamp:
                    unusable[name] = mistake
                    served |= {name: before} if before is not None else {}
                else:
                    try:
                        served[name] = self._read(name, path, stamp)
                    except _UnusableError as error:
                        _log.warning("a soft prompt is not served", extra={"prompt": name, "reason": error.for_log})
                        unusable[name] = (stamp, str(error))
                        served |= {name: before} if before is not None else {}
        for name in {*self.served, *served}:
            self._tell(name, self.served.get(name), served.get(name))
        self.served, self._unusable = served, unusable  # two assignments: a request sees a whole dictionary

    def _read(self, name: str, path: Path, stamp: Stamp) -> Served:
        if name == self.bare:
            raise _UnusableError("is called as the backbone is, which stands for the bare model")
        try:
            description = read_description(path.parent)
        except SoftPromptError as error:
            raise _UnusableError("is damaged; the server's log says more", str(error)) from error
        if not self._backbone.matches(description.backbone.fingerprint.model_dump()):
            other = description.backbone.name
            raise _UnusableError(
                f'belongs to another backbone: it was trained on "{other}", and this server runs "{self.bare}"'
            )
        return Served(name, path.parent, stamp, description.task.type, stamp[0] // 10**9)

    def _tell(self, name: str, before: Served | None, now: Served | None) -> None:
        if before is now:
            return
        if before is not None:
            before.retired = True
        what = "added" if before is None else "removed" if now is None else "replaced"
        _log.info(f"soft prompt {what}", extra={"prompt": name})


class VersionsInMemory:
    """The versions that stand in the engine, within its budget of bytes; replaced ones go when nobody uses them.

    To be called from the one thread that owns the engine.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._known: set[Served] = set()

    def hold(self, served: Served) -> LoadedPrompt:
        """Return a version, loaded if it is not yet; it stays until each `hold` has had its `let_go`.

        Raises:
            RefusedError: 404, it cannot be loaded, or not any more.
        """
        if served not in self._known:
            self._engine.offer(served.key, served.folder)
            self._known.add(served)
        there = served.key in self._engine.memory
        try:
            loaded = self._engine.hold(served.key)
        except PtuneError as error:  # its files are gone or changed, or its task cannot be built
            _log.warning("a soft prompt cannot be loaded", extra={"prompt": served.name, "reason": str(error)})
            raise unusable_model(served.name, "cannot be loaded; the server's log says more") from error
        if loaded.prompt.task.type != served.task:  # replaced since the folder was looked at
            self._engine.let_go(loaded)
            raise unusable_model(served.name, "is being replaced by one of another task; ask again in a moment")
        self._metrics.loads.inc(not there)
        return loaded

    def let_go(self, loaded: LoadedPrompt) -> None:
        """End one use."""
        self._engine.let_go(loaded)

    def sweep(self) -> None:
        """Forget versions that were replaced or removed and that nobody uses."""
        for served in [served for served in self._known if served.retired]:
            if not self._engine.memory.held(served.key):
                self._engine.withdraw(served.key)
                self._known.remove(served)
        self._metrics.prompts.set(len(self._engine.prompts))
        self._metrics.prompt_bytes.set(self._engine.memory.bytes)
        self._metrics.key_bytes.set(self._engine.keys.bytes)


async def watch(scan: Callable[[], Awaitable[None]], seconds: float) -> None:
    """Look at a folder again and again; a mistake, as of a disk that is away for a while, is logged once."""
    said = ""
    while True:
        await asyncio.sleep(seconds)
        try:
            await scan()
            said = ""
        except Exception as error:
            if repr(error) != said:
                said = repr(error)
                _log.error("the folder of soft prompts cannot be looked at", extra={"reason": said})


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
