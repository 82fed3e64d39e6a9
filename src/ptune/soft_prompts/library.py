"""The prompt library: the soft prompts in a folder, told apart by what their descriptions say.

Reads descriptions alone, so a library of hundreds is shown at once; loads neither tensors nor models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ptune.errors import SoftPromptError, did_you_mean
from ptune.files import what_is_at
from ptune.soft_prompts.files import DESCRIPTION, read_description, size_in_bytes


@dataclass(frozen=True)
class LibraryEntry:
    """A soft prompt of a library.

    Attributes:
        name: its folder, as a path from the library's.
        task: classification, generation, ...
        backbone: what the user called it.
        virtual_tokens: P.
        metric: the task's own, with its value on dev; None where it was not trained here.
        value: of the metric.
        bytes: on disk, the files of its run aside.
        date: of the end of its run, ISO 8601 in UTC; None where it was not trained here.
        mistake: why it cannot be read; None where it can.
    """

    name: str
    task: str = ""
    backbone: str = ""
    virtual_tokens: int = 0
    metric: str | None = None
    value: float | None = None
    bytes: int = 0
    date: str | None = None
    mistake: str | None = None


def read_library(folder: str | Path) -> list[LibraryEntry]:
    """Return the soft prompts in a folder and in the folders within it, by name. One that is damaged says so.

    Raises:
        SoftPromptError: there is no such folder, or no soft prompt in it.
    """
    folder = Path(folder)
    if what_is_at(folder) != "folder":
        raise SoftPromptError(f'there is no folder "{folder}"; name one that holds soft prompts, as prompts')
    found = folders_in(folder)
    if not found:
        raise SoftPromptError(f'"{folder}" holds no soft prompt; `ptune train` writes one')
    return [_entry(path, name) for name, path in found.items()]


def folders_in(folder: Path) -> dict[str, Path]:
    """Return where the soft prompts in a folder lie, by name: the path from there, or the folder's own name for itself.

    Nothing is read, so damaged ones are among them.
    """
    found = sorted(path.parent for path in folder.rglob(DESCRIPTION))
    return {path.relative_to(folder).as_posix() if path != folder else path.resolve().name: path for path in found}


def _entry(folder: Path, name: str) -> LibraryEntry:
    try:
        description = read_description(folder)
    except SoftPromptError as error:
        return LibraryEntry(name, mistake=str(error))
    summary = description.summary
    metric = summary.get("metric")
    return LibraryEntry(
        name,
        task=description.task.type,
        backbone=description.backbone.name,
        virtual_tokens=description.virtual_tokens.count,
        metric=metric,
        value=(summary.get("after") or {}).get(metric),
        bytes=size_in_bytes(folder),
        date=summary.get("date"),
    )


class Library:
    """Where soft prompts lie, by name. A name is looked up and never becomes part of a path.

    Attributes:
        folder: that all soft prompts in it are known from; None where there is none.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """Look into a folder.

        Raises:
            SoftPromptError: there is no such folder.
        """
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and what_is_at(self.folder) != "folder":
            raise SoftPromptError(f'there is no folder "{folder}"; name one that holds soft prompts, as prompts')
        self._folders: dict[str, Path] = {} if self.folder is None else folders_in(self.folder)

    def find(self, name: str, loaded: Iterable[str] = ()) -> Path:
        """Return where a soft prompt lies, also one that was saved since the last look.

        Args:
            name: its own.
            loaded: names that are loaded already, which the error lists beside those of the folder.

        Raises:
            SoftPromptError: there is none of that name.
        """
        if name not in self._folders and self.folder is not None:
            self._folders = folders_in(self.folder) | self._folders
        if name not in self._folders:
            known = list(dict.fromkeys([*loaded, *self._folders]))
            listed = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "") or "none"
            place = "is loaded (loaded" if self.folder is None else f'is in "{self.folder}" (there are'
            raise SoftPromptError(f'no soft prompt "{name}" {place}: {listed}).{did_you_mean(name, known)}')
        return self._folders[name]

    def add(self, name: str, folder: Path) -> None:
        """Know the soft prompt in a folder, wherever that lies, by a name."""
        self._folders[name] = folder

    def drop(self, name: str) -> None:
        """Forget a name, if it is known."""
        self._folders.pop(name, None)
