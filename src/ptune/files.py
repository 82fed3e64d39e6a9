"""Files that are written whole or not at all, and read with errors that name the file: JSON, safetensors, a lock.

Knows nothing of what the files mean: no settings, records, prompts or models. Imports torch only where tensors pass.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ptune.errors import OutputError, PtuneError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

LOCK_NAME = ".lock"
TEMPORARY_SUFFIX = ".ptune-tmp"

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would be larger than the system allows; raise the limit (ulimit -f)",
    errno.EACCES: "permission is denied; choose a folder that you may write to",
    errno.EPERM: "permission is denied; choose a folder that you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "a folder of that name stands there; remove it or choose another path",
    errno.ENOTEMPTY: "a folder of that name stands there and is not empty; remove it or choose another path",
}


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file or folder under a temporary name beside ``path``, then rename it to ``path``.

    Contents and folder entry are flushed to the disk, so that after a kill or a power cut ``path`` is the old one or
    the new one, complete. A file replaces the file before it; a folder takes only a free or empty place.

    Raises:
        OutputError: it cannot be written (disk full, no permission, ...); what stood at ``path`` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush_tree(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except PtuneError:
        raise
    except OSError as error:
        raise OutputError(_cannot_write(path, error)) from error
    finally:
        _remove(temporary)


def file_place(path: str | Path) -> Path:
    """Return where a file will be written, ``~`` for the home folder, once it is known to have a place there.

    For commands that write at the end of long work. Nothing is touched; the disk may still be full by then.

    Raises:
        OutputError: a folder stands there, a part of the path is a file, or permission is denied.
    """
    path = Path(os.path.expanduser(path))
    folder = next((parent for parent in path.parents if what_is_at(parent) is not None), path)
    code = errno.EISDIR if what_is_at(path) == "folder" else 0
    code = code or (errno.ENOTDIR if what_is_at(folder) == "file" else 0)
    code = code or (0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES)
    if code:
        raise OutputError(_cannot_write(path, OSError(code, os.strerror(code))))
    return path


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed writers left under temporary names in ``folder``; for the holder of its lock only."""
    for leftover in Path(folder).glob(f".*{TEMPORARY_SUFFIX}"):
        _remove(leftover)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, atomically.

    Raises:
        OutputError: it cannot be written; an older file is still there.
    """
    write_atomically(path, lambda temporary: _write_bytes(temporary, text.encode("utf-8")))


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a text file in UTF-8, made where absent: all of it or nothing.

    Raises:
        OutputError: it cannot be written; the lines before it are still there.
    """
    path = Path(path)
    try:
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview((line + "\n").encode("utf-8"))
                while rest:
                    rest = rest[file.write(rest) or 0 :]
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise OutputError(_cannot_write(path, error)) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically; keys keep their order.

    Raises:
        OutputError: it cannot be written, or holds a NaN or an infinity, which JSON has no form for.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise OutputError(f"cannot write {path}: {error}; replace the value by null or text.") from error
    write_atomically(path, lambda temporary: _write_bytes(temporary, text.encode("utf-8")))


def read_json(path: str | Path, error: type[PtuneError]) -> Any:
    """Return the value in a JSON file; a UTF-8 byte order mark is tolerated.

    Raises:
        error: the file is missing, not UTF-8 or not JSON; names file, line and column.
    """
    return parse_json(decode(read_bytes(path, error), path, error), path, error)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors of any shape and dtype as one safetensors file, atomically.

    Raises:
        OutputError: it cannot be written.
    """
    import torch
    from safetensors.torch import save

    # Copies, for safetensors refuses tensors that share memory or are not contiguous. Serialised in memory, for its own
    # writer reports a full disk as an error without an errno.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    data = save(copies, dict(metadata) if metadata else None)
    write_atomically(path, lambda temporary: _write_bytes(temporary, data))


def read_tensors(path: str | Path, error: type[PtuneError]) -> dict[str, Tensor]:
    """Return the named tensors of a safetensors file, on the CPU, with their shapes and dtypes.

    A changed payload still parses: compare :func:`tensors_hash` with the one that was stored.

    Raises:
        error: the file is missing, cut short or not safetensors; names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_bytes(path, error)
    try:
        return load(data)
    # The header decides what is raised: safetensors' own error for its form, the others for what torch lacks.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as cause:
        raise error(
            f"{path} is damaged or not a safetensors file ({one_line(cause)}); copy it again or write it anew."
        ) from cause


def tensors_hash(path: str | Path, error: type[PtuneError]) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits.

    Raises:
        error: the file is missing or cannot be read.
    """
    return hashlib.sha256(read_bytes(path, error)).hexdigest()


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold ``folder``, made where absent, for one run; what killed writers left in it is removed.

    The system drops the lock with the process, however it ends.

    Raises:
        OutputError: another run holds the folder (its process is named), or it cannot be written.
    """
    folder = Path(folder)
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    except BlockingIOError as error:
        raise OutputError(
            f"{folder} is in use by another run{_holder(path)}; wait for its end, stop it, or choose another folder."
        ) from error
    except OSError as error:
        raise OutputError(_cannot_write(path, error)) from error
    try:
        remove_leftovers(folder)
        yield
    finally:
        # Removed before it is let go: who opened this very file meanwhile sees that it is gone, and makes a new one.
        if _stands_at(file, path):
            path.unlink()
        os.close(file)


def what_is_at(path: str | Path) -> Literal["file", "folder"] | None:
    """Return what stands at a path, where ``~`` is the home folder; None for nothing, and for what can be no path.

    Of a text that is longer than a name may be, pathlib raises an OSError where os.path says that nothing is there.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return "folder"
    return "file" if os.path.exists(expanded) else None


def missing_file(path: str | Path, what: str = "") -> str:
    """Return a sentence for a path where nothing is, with the nearest name in its folder.

    Args:
        path: where something should be.
        what: should be there, as in ``soft prompt folder``.
    """
    path = Path(path)
    said, folder = f'there is no {what} "{path}"' if what else f"{path} does not exist", path.parent
    if what_is_at(folder) != "folder":
        return f"{said}, for there is no folder {folder}; check the path."
    return f"{said}; check the path.{did_you_mean(path.name, sorted(os.listdir(folder)))}"


def read_bytes(path: str | Path, error: type[PtuneError]) -> bytes:
    """Return a file's bytes.

    Raises:
        error: nothing is there (with the nearest name), it is a folder, or it may not be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as cause:
        raise error(missing_file(path)) from cause
    except IsADirectoryError as cause:
        raise error(f"{path} is a folder where a file was expected; name a file in it.") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror}); check the path and its permissions.") from cause


def decode(data: bytes, path: str | Path, error: type[PtuneError], line: int = 1) -> str:
    """Return UTF-8 bytes as text, without a byte order mark; ``line`` is the file's line with which ``data`` begins.

    Raises:
        error: the bytes are not UTF-8; names file, line and the byte in the line.
    """
    body = data.removeprefix(codecs.BOM_UTF8) if line == 1 else data
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as cause:
        number = line + body.count(b"\n", 0, cause.start)
        position = cause.start - body.rfind(b"\n", 0, cause.start)
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "UTF-16" if is_utf16 else "GB18030 (or whatever its encoding is)"
        raise error(
            f"{path}, line {number}, byte {position}: expected UTF-8 and found 0x{body[cause.start]:02x}; "
            f"save the file as UTF-8, for instance by iconv -f {encoding} -t UTF-8."
        ) from cause


def parse_json(text: str, path: str | Path, error: type[PtuneError], line: int = 1) -> Any:
    """Return the value of a JSON text; ``line`` is the file's line with which ``text`` begins.

    Raises:
        error: the text is not JSON; names file, line and column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as cause:
        where = f"{path}, line {line + cause.lineno - 1}, column {cause.colno}"
        raise error(f"{where}: broken JSON ({cause.msg}); correct it there or just before.") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}, line {line}: JSON that cannot be read ({one_line(cause)}); simplify it.") from cause


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop, to stand within a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _cannot_write(path: Path, error: OSError) -> str:
    reason = _REASONS.get(error.errno or 0, f"{error}; check the path")
    return f"cannot write {path}: {reason}."


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _flush_tree(child)
    _flush(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended between open and lock has removed this file: a lock on it would exclude nobody.
            if _stands_at(descriptor, path):
                _sign(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sign(descriptor: int, path: Path) -> None:
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
    except OSError:
        path.unlink()
        raise


def _stands_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:  # removed meanwhile, or its folder was
        return False


def _holder(path: Path) -> str:
    try:
        process, host = path.read_text().split()
    except (OSError, ValueError):  # it has just been let go, or its name is being written
        return ""
    return f" (process {process} on {host})"
