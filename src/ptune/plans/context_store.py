"""Keys and values of contexts on disk, for a second run and for other processes: found by content or not at all.

    contexts/KEY/backbone.json               name and dtype, for `ptune cache`
    contexts/KEY/ab/abcd....safetensors      one context, named by the hash of its ids

KEY stands for the exact model: every weight and setting of it (`ptune.pretrained.fingerprint.exact_key`). A file holds
a checksum of its contents and of its name; one that is cut, altered or misplaced is a miss, and is removed. Writes are
atomic, so that processes may share a folder. The ones least recently used make room for new ones.

Knows nothing of models or of who asks. Shapes: L layers, K key-value heads, F tokens of a context, D width of a head.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptune.errors import ConfigError, OutputError, did_you_mean
from ptune.files import one_line, write_json

_SUFFIX = ".safetensors"


def cache_folder() -> Path:
    """Return where ptune keeps what can be made again: PTUNE_CACHE, else ``ptune`` in the user's cache folder."""
    named = os.environ.get("PTUNE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptune"


class ContextStore:
    """The contexts of one backbone on disk.

    Attributes:
        full: whether it takes no more.
        mistake: why nothing can be written; None where all is well.
    """

    def __init__(self, key: str, budget: int, *, name: str, dtype: str, folder: Path | None = None) -> None:
        """Open the store; it is made with the first context.

        Args:
            key: of the exact model.
            budget: bytes that contexts of all backbones may take together.
            name: of the backbone, for people.
            dtype: in which contexts are kept; each has a store of its own.
            folder: of all stores; that of the user's cache where absent.
        """
        self._root = (folder or cache_folder()) / "contexts"
        self._folder = self._root / f"{key}-{dtype}"
        self._about = {"backbone": name, "dtype": dtype}
        self._budget, self._begun = budget, time.time()
        self._bytes = sum(size for _, size, _ in _files(self._root))
        self._verified: dict[str, tuple[int, ...]] = {}
        self.full = False
        self.mistake: str | None = None

    def get(self, ids: Sequence[int]) -> Tensor | None:
        """Return a context's keys and values, ``[2 L, K, F, D]``, mapped into memory; None where there are none."""
        path = self._path(ids)
        try:
            if path.name not in self._verified:
                os.utime(path)  # its last use
            status = path.stat()
            with safe_open(path, framework="pt") as file:
                check: str = file.metadata()["check"]
                past: Tensor = file.get_tensor("past")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            self._remove(path)
            return None
        # what was verified is read anew only where somebody has touched the file since
        signature = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._verified.get(path.name) != signature:
            if past.dim() != 4 or past.shape[2] != len(ids) or check != _check(path, past):
                self._remove(path)
                return None
            self._verified[path.name] = signature
        return past

    def put(self, ids: Sequence[int], past: Tensor) -> bool:
        """Keep a context's keys and values, ``[2 L, K, F, D]``, unless there is no room; return whether they are."""
        size = past.numel() * past.element_size()
        if self.mistake is not None or not self._make_room(size):
            self.full = True
            return False
        path = self._path(ids)
        temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.ptune-tmp")
        past = past.detach().cpu().contiguous()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            about = self._folder / "backbone.json"
            if not about.is_file():
                write_json(about, self._about)
            # not flushed to the disk: a file that a power cut leaves half is found out by its checksum
            save_file({"past": past}, temporary, {"check": _check(path, past)})
            os.replace(temporary, path)
        except (OSError, SafetensorError, OutputError) as error:
            self.mistake = f"{self._root}: {one_line(error)}"
            self.full = True
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._bytes += size
        return True

    def _make_room(self, size: int) -> bool:
        if self._bytes + size <= self._budget:
            return True
        if size > self._budget:
            return False
        files = sorted(_files(self._root), key=lambda file: file[2])
        self._bytes = sum(each for _, each, _ in files)
        for path, each, used in files:
            if self._bytes + size <= self._budget or used >= self._begun - 1:
                break  # what this run uses, or another that goes on now, is not thrown out for more of it
            self._remove(path)
            self._bytes -= each
        return self._bytes + size <= self._budget

    def _path(self, ids: Sequence[int]) -> Path:
        name = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
        return self._folder / name[:2] / f"{name}{_SUFFIX}"

    def _remove(self, path: Path) -> None:
        self._verified.pop(path.name, None)
        with contextlib.suppress(OSError):
            path.unlink()


@dataclass(frozen=True)
class StoredContexts:
    """What lies on disk for one backbone.

    Attributes:
        folder: where.
        backbone: its name, as the run that made them had it.
        dtype: of the contexts.
        contexts: how many.
        bytes: of all.
        last_use: seconds since 1970; 0 where there are none.
    """

    folder: Path
    backbone: str
    dtype: str
    contexts: int
    bytes: int
    last_use: float


def stored_contexts(folder: Path | None = None) -> list[StoredContexts]:
    """Return what lies in the cache, a backbone an entry, the latest used first."""
    root, found = (folder or cache_folder()) / "contexts", []
    for place in sorted(root.iterdir()) if root.is_dir() else []:
        if not place.is_dir():
            continue
        try:
            about = json.loads((place / "backbone.json").read_text(encoding="utf-8"))
            name, dtype = str(about["backbone"]), str(about["dtype"])
        except (OSError, ValueError, KeyError, TypeError):
            name, dtype = place.name, "unknown"
        files = list(_files(place))
        last = max((used for _, _, used in files), default=0.0)
        found.append(StoredContexts(place, name, dtype, len(files), sum(size for _, size, _ in files), last))
    return sorted(found, key=lambda entry: -entry.last_use)


def clear_contexts(backbone: str | None = None, folder: Path | None = None) -> list[StoredContexts]:
    """Remove what lies in the cache, or that of one backbone, and return what was removed.

    A run that is going on finds nothing then, and computes its contexts anew.

    Raises:
        ConfigError: nothing lies there for a backbone of that name.
        OutputError: a folder cannot be removed.
    """
    entries = stored_contexts(folder)
    chosen = [entry for entry in entries if backbone is None or entry.backbone == backbone]
    if backbone is not None and not chosen:
        names = sorted({entry.backbone for entry in entries})
        raise ConfigError(f'the cache holds nothing of a backbone "{backbone}".{did_you_mean(backbone, names)}')
    for entry in chosen:
        try:
            shutil.rmtree(entry.folder)
        except FileNotFoundError:
            continue  # somebody else was quicker
        except OSError as error:
            raise OutputError(f'cannot clear "{entry.folder}": {error.strerror}; remove it by hand') from error
    return chosen


def _check(path: Path, past: Tensor) -> str:
    """Return the checksum of a context's contents and of the name that says what it is."""
    digest = hashlib.blake2b(path.name.encode(), digest_size=16)
    digest.update(f"{past.dtype} {tuple(past.shape)}".encode())
    digest.update(past.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    """Give path, bytes and last use of every context below a folder."""
    for path in folder.rglob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # removed by another process meanwhile
            status = path.stat()
            yield path, status.st_size, status.st_mtime
