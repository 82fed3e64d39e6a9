"""The place of a merged model: taken whole or not at all, and an older one only where that is asked for.

Knows folders, and nothing of what stands in them but the file that marks a merged model.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ptune.errors import OutputError
from ptune.files import TEMPORARY_SUFFIX, write_atomically

DESCRIPTION = "ptune_merged.json"
"""What a merged model holds and how it was measured; a folder with this file is one."""


def check_place(folder: Path, *, overwrite: bool) -> None:
    """See that a merged model may be written to ``folder``.

    Raises:
        OutputError: something stands there: an older merge that is not to be overwritten, or anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / DESCRIPTION).is_file():
        raise OutputError(f'"{folder}" is no merged model and is not overwritten; choose another --output')
    if not overwrite:
        raise OutputError(f'"{folder}" holds a merged model; choose another --output, or --overwrite it')


def write_folder(folder: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let ``write`` make the folder under a temporary name, then set it in its place, instead of an older merge.

    The older one stands until the new one is complete, and comes back if that cannot take its place.

    Raises:
        OutputError: it cannot be written, or something has come to stand there meanwhile.
    """
    check_place(folder, overwrite=overwrite)
    if not (folder / DESCRIPTION).is_file():
        write_atomically(folder, write)
        return
    fresh = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.new")
    write_atomically(fresh, write)
    old = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        os.replace(folder, old)
        try:
            os.replace(fresh, folder)
        except OSError:
            os.replace(old, folder)
            raise
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise OutputError(f'cannot replace "{folder}": {error.strerror}; close what uses it') from error
    shutil.rmtree(old, ignore_errors=True)
