"""The files of a model: where its input matrix and output head are stored, and a folder with longer ones.

Only the files that hold the two are written anew; the others are hard links, or copies where the disk has none.

Knows checkpoints and configs, and nothing of soft prompts. Shapes: V rows of the input matrix, w rows of the longer
one, H width.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptune.errors import BackboneError
from ptune.files import read_json, write_json
from ptune.models.backbone import Backbone
from ptune.pretrained.stored_tensors import FLOATS, INDEX, TensorFile, names_of, shards_of, stored_name
from ptune.prompts.virtual_tokens import input_matrix

_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".safetensors", ".index.json")
_HEADS = {"gpt_neox": "embed_out.weight"}
"""What the output head is called on disk where transformers calls it otherwise in memory."""
_WRITTEN_ANEW = {"generation_config.json", "README.md", INDEX}


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's input matrix and output head are stored.

    Attributes:
        folder: of the model.
        shards: file of each tensor, by the tensor's name.
        matrix: name of the input matrix.
        head: name of the output head; where it shares the input matrix, what it will be called once it does not.
        bias: name of the head's bias; None where it has none.
        tied: the head shares the input matrix.
    """

    folder: Path
    shards: dict[str, str]
    matrix: str
    head: str
    bias: str | None
    tied: bool

    @classmethod
    def of(cls, folder: Path, backbone: Backbone) -> ModelFiles:
        """Find the tensors of a loaded backbone in its folder.

        Raises:
            BackboneError: they are not there, are quantised, or hold something else than the loaded model.
        """
        model, head = backbone.model, backbone.model.get_output_embeddings()
        if head is None or getattr(head, "weight", None) is None:
            raise BackboneError(f'the output head of "{backbone.name}" has no matrix, so no row can be added to it')
        tied = head.weight is input_matrix(model)
        shards = shards_of(folder)
        (head_name,) = [f"{name}.weight" for name, module in model.named_modules() if module is head]
        names = [name for name in names_of(model, input_matrix(model)) if name != head_name]
        matrix = stored_name(shards, names, model.base_model_prefix) or _alike(folder, shards, input_matrix(model))
        stored_head = stored_name(shards, [head_name], model.base_model_prefix)
        if stored_head is None and not tied:
            stored_head = _alike(folder, shards, head.weight)
        head_name = _HEADS.get(model.config.model_type, head_name)
        bias = getattr(head, "bias", None)
        bias_name = None if bias is None else stored_name(shards, names_of(model, bias), model.base_model_prefix)
        missing = matrix is None or (not tied and stored_head is None) or (bias is not None and bias_name is None)
        if missing or matrix is None:
            raise BackboneError(
                f'the input matrix or output head of "{backbone.name}" is not in its safetensors files under its own '
                "name (quantised, or renamed when it is loaded), so it cannot be extended; merge into the plain model"
            )
        files = cls(folder, shards, matrix, stored_head or head_name, bias_name, tied)
        for name in {files.matrix, *([] if tied else [files.head]), *([bias_name] if bias_name else [])}:
            entry = files._file(name).entries[name]
            if entry["dtype"] not in FLOATS:
                raise BackboneError(
                    f'the matrix {name} of "{backbone.name}" is quantised ({entry["dtype"]}), and virtual tokens '
                    "are not; merge into the model in bfloat16, float16 or float32"
                )
        if not torch.equal(files.read(matrix)[:64].to(backbone.dtype), input_matrix(model)[:64].cpu()):
            raise BackboneError(f'the model "{backbone.name}" was changed since it was loaded from "{folder}"; save it')
        return files

    def read(self, name: str) -> Tensor:
        """Return a stored tensor, of the shape and dtype that it is stored in."""
        return self._file(name).read(name)

    def write(self, target: Path, changed: dict[str, Tensor]) -> list[str]:
        """Write the weights to ``target`` with ``changed`` tensors of any shape, and return which files are new.

        A tensor of a new name goes to the file of the input matrix.

        Raises:
            OSError: they cannot be written.
        """
        place = {name: self.shards.get(name, self.shards[self.matrix]) for name in changed}
        for shard in sorted(set(self.shards.values())):
            mine = {name: tensor for name, tensor in changed.items() if place[name] == shard}
            if mine:
                TensorFile.open(self.folder / shard).write_with(target / shard, mine)
            else:
                _link(self.folder / shard, target / shard)
        if (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX, BackboneError)
            index["weight_map"] |= place
            entries = [TensorFile.open(target / shard).entries for shard in sorted(set(self.shards.values()))]
            sizes = (entry["data_offsets"] for file in entries for entry in file.values())
            index.setdefault("metadata", {})["total_size"] = sum(last - first for first, last in sizes)
            index["metadata"].pop("total_parameters", None)
            write_json(target / INDEX, index)
        return sorted(set(place.values()))

    def write_config(self, target: Path, rows: int) -> None:
        """Write the model's config for a matrix of so many rows, with a head of its own.

        Raises:
            OutputError: it cannot be written.
        """
        config = read_json(self.folder / "config.json", BackboneError)
        before = TensorFile.open(self.folder / self.shards[self.matrix]).entries[self.matrix]["shape"][0]
        nested = [part for part in config.values() if isinstance(part, dict) and part.get("vocab_size") == before]
        for part in [config, *nested]:
            if "vocab_size" in part or not nested:
                part["vocab_size"] = rows
            if self.tied:
                part["tie_word_embeddings"] = False
        write_json(target / "config.json", config)

    def copy_others(self, target: Path) -> None:
        """Copy what else stands in the folder: tokenizer, code, licence; the model's own card under another name.

        The config is among it, for the class of a tokenizer may follow from it; `write_config` writes it anew.

        Raises:
            OSError: it cannot be written.
        """
        for path in sorted(self.folder.iterdir()):
            left_out = path.name.startswith(".") or path.name in _WRITTEN_ANEW or path.name.endswith(_WEIGHTS)
            if path.is_file() and not left_out:
                shutil.copyfile(path, target / path.name)
        if (self.folder / "README.md").is_file():
            shutil.copyfile(self.folder / "README.md", target / "README.backbone.md")

    def _file(self, name: str) -> TensorFile:
        return TensorFile.open(self.folder / self.shards[name])


def _alike(folder: Path, shards: dict[str, str], parameter: Tensor) -> str | None:
    """Return what a matrix [V, H] is called on disk where transformers renames it as it loads: what equals it."""
    for name, shard in shards.items():
        file = TensorFile.open(folder / shard)
        entry = file.entries[name]
        possible = entry["shape"] == list(parameter.shape) and entry["dtype"] in FLOATS
        if possible and torch.equal(file.read(name).to(parameter.dtype), parameter.cpu()):
            return name
    return None


def _link(source: Path, target: Path) -> None:
    source = source.resolve()  # the Hub's cache holds links to its blobs
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def end_ids(folder: Path, tokenizer_end: int | None) -> list[int]:
    """Return at which ids a model of this folder stops: what its configs say, and the tokenizer's end token."""
    found: set[int] = set() if tokenizer_end is None else {tokenizer_end}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value: Any = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(value) if isinstance(value, list) else {value} - {None}
            break
    return sorted(found)
