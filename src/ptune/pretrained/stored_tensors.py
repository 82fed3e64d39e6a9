"""The tensors of a model as its files store them: where they are, read, and a file written anew with some replaced.

Of a safetensors file that is written anew all other tensors are copied byte for byte. The bytes stream from file to
file, so a shard of any size takes little memory and formats that torch lacks pass. Knows the format (eight bytes of
length, a JSON header, data) and nothing of what tensors mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from ptune.errors import BackboneError
from ptune.files import one_line, read_json
from ptune.pretrained.loading import MINI

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATS = {name: dtype for dtype, name in _NAMES.items()}
"""What a matrix that is not quantised may be stored as."""
_SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ALIGNMENT = 8
_BLOCK = 1 << 24


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file by its header.

    Attributes:
        path: where it is.
        entries: by tensor name: ``dtype``, ``shape`` and ``data_offsets`` from ``start``.
        metadata: free text of the file.
        start: where the data begins.
    """

    path: Path
    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str] | None
    start: int

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read a file's header.

        Raises:
            BackboneError: the file is missing or no safetensors file.
        """
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
        except (OSError, ValueError) as error:
            raise BackboneError(
                f'"{path}" is missing, cut short or no safetensors file ({one_line(error)}); copy the model again'
            ) from error
        metadata = header.pop("__metadata__", None)
        return cls(path, header, metadata, 8 + length)

    def read(self, name: str) -> Tensor:
        """Return a tensor of a float dtype, of the shape that the file says."""
        entry = self.entries[name]
        first, last = entry["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self.start + first)
            data = bytearray(file.read(last - first))
        return torch.frombuffer(data, dtype=FLOATS[entry["dtype"]]).reshape(entry["shape"])

    def mapped(self, name: str) -> Tensor:
        """Return a tensor of a float dtype, of the shape that the file says, whose bytes are read when looked at."""
        entry = self.entries[name]
        first, last = entry["data_offsets"]
        # Copy on write: torch wants memory that it may write to, and the file stays as it is.
        data = np.memmap(self.path, np.uint8, "c", self.start + first, (last - first,))
        return torch.from_numpy(data).view(FLOATS[entry["dtype"]]).reshape(entry["shape"])

    def write_with(self, target: Path, changed: Mapping[str, Tensor]) -> None:
        """Write the file anew to ``target``, with tensors of any shape and float dtype in place of, or beside, its own.

        Raises:
            OSError: it cannot be written.
        """
        dtypes = {name: entry["dtype"] for name, entry in self.entries.items()}
        dtypes |= {name: _NAMES[tensor.dtype] for name, tensor in changed.items()}
        order = sorted(
            dtypes, key=lambda name: (-_bits(dtypes[name]), name)
        )  # wide ones first, so that all are aligned
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        place = 0
        for name in order:
            shape = list(changed[name].shape) if name in changed else self.entries[name]["shape"]
            size = changed[name].nbytes if name in changed else self._size(name)
            header[name] = {"dtype": dtypes[name], "shape": shape, "data_offsets": [place, place + size]}
            place += size
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        with self.path.open("rb") as source, target.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for name in order:
                if name in changed:
                    file.write(changed[name].contiguous().view(torch.uint8).numpy().tobytes())
                else:
                    source.seek(self.start + self.entries[name]["data_offsets"][0])
                    _copy(source, file, self._size(name))

    def _size(self, name: str) -> int:
        first, last = self.entries[name]["data_offsets"]
        return int(last - first)


def source_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder of a backbone that the user called ``name``; one of the Hub as its cache has that revision.

    Raises:
        BackboneError: it is not stored as safetensors.
    """
    folder = MINI if name == "mini" else Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*"]
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BackboneError(f'cannot find the files of "{name}": {reason}; give its folder by --model') from error
    if not ((folder / _SINGLE).is_file() or (folder / INDEX).is_file()):
        raise BackboneError(
            f'"{name}" is not stored as safetensors, of which single tensors are read: it has neither {_SINGLE} nor '
            f"{INDEX}; load it in transformers and save_pretrained it to a folder"
        )
    return folder


def shards_of(folder: Path) -> dict[str, str]:
    """Return in which file of a model's folder each tensor is stored, by the tensor's name.

    Raises:
        BackboneError: its index is none, or a file is damaged.
    """
    if not (folder / INDEX).is_file():
        return dict.fromkeys(TensorFile.open(folder / _SINGLE).entries, _SINGLE)
    index = read_json(folder / INDEX, BackboneError)
    shards: dict[str, str] = index.get("weight_map", {}) if isinstance(index, dict) else {}
    strange = [shard for shard in shards.values() if Path(shard).name != shard]
    if strange or not shards:
        raise BackboneError(f'"{folder / INDEX}" names no files beside it; copy the model again')
    return shards


def names_of(model: nn.Module, parameter: Tensor) -> list[str]:
    """Return what a parameter of any shape is called in a model: more than one name where it is shared."""
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]


def stored_name(shards: dict[str, str], names: Iterable[str], prefix: str) -> str | None:
    """Return under which of a model's names a tensor is stored: a file of the bare model lacks the prefix."""
    for name in names:
        for stored in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if stored in shards:
                return stored
    return None


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8  # BOOL


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0:
        block = source.read(min(size, _BLOCK))
        if not block:
            raise BackboneError(f'"{source.name}" is cut short; copy the model again')
        target.write(block)
        size -= len(block)
