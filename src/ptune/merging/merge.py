"""Merge soft prompts into their backbone: a plain model folder that any engine serves by plain token ids.

A virtual token is an embedding, so it can be a row of the embedding matrix. The folder's tokenizer has a special token
for each, its chat template sets them where the task's template wants them, and its output head never says them. What
is written is held to ptune's own engine before the folder gets its name: the ids of every task, and the probability of
virtual tokens.

Shapes: P virtual tokens of all prompts, H width, V rows of the backbone's input matrix, w of the merged one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptune.config.run import ModelConfig
from ptune.engine.engine import Engine
from ptune.errors import BackboneError, SoftPromptError
from ptune.families import CAUSAL
from ptune.files import read_json, write_json, write_text
from ptune.merging.chat_template import TaskShape, Words, chat_template
from ptune.merging.folder import DESCRIPTION, check_place, write_folder
from ptune.merging.model_files import ModelFiles, end_ids
from ptune.merging.output_row import find_output_row
from ptune.merging.probes import ids_agree, probe_records, refuse
from ptune.merging.readme import readme
from ptune.merging.rounding import Rounding, on_disk_rows, rounding_cost
from ptune.merging.tokenizer_files import (
    add_tokens,
    as_text,
    load_tokenizer,
    opening_ids,
    own_chat_template,
    token_names,
    write_chat_template,
)
from ptune.models.backbone import Backbone
from ptune.pretrained.fingerprint import same_backbone
from ptune.pretrained.stored_tensors import source_folder
from ptune.soft_prompts.soft_prompt import SoftPrompt

_MULTIPLE = 64
"""Rows come in multiples of this, as kernels like them, where any have to be appended."""
_SAMPLED_PROMPTS = 32


@dataclass(frozen=True)
class MergedModel:
    """What `merge_prompts` wrote.

    Attributes:
        folder: of the model.
        tasks: ids of the virtual tokens of each soft prompt, by its name.
        rows: w, of the new matrix.
        appended: how many of them the backbone's matrix did not have.
        rewritten: files of weights that are new; the others are links to the backbone's.
        untied: the output head was the input matrix and is now one of its own.
        probability: the greatest that all virtual tokens together were measured to have.
        mean_probability: of it, over all positions that were measured.
        positions: how many these were.
        rounding: what storing the virtual tokens in the model's dtype costs.
    """

    folder: Path
    tasks: dict[str, list[int]]
    rows: int
    appended: int
    rewritten: list[str]
    untied: bool
    probability: float
    mean_probability: float
    positions: int
    rounding: Rounding


def merge_prompts(
    prompts: Mapping[str, SoftPrompt] | Sequence[str | Path],
    output: str | Path,
    *,
    backbone: Backbone | ModelConfig | str | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] | None = None,
) -> MergedModel:
    """Write a model folder whose vocabulary has the virtual tokens of soft prompts as extra rows.

    Args:
        prompts: folders of soft prompts, each a task of its folder's name; or soft prompts by name.
        output: the folder to write; it appears whole or not at all.
        backbone: the model, where it is not the one that the prompts name; one that is loaded as its files have it.
        overwrite: replace an older merged model.
        tell: is told each part of the work when it begins, for a merge takes a while.

    Raises:
        SoftPromptError: no prompt, two of one name, of different backbones, or of one that is not causal.
        BackboneError: the model cannot be extended: quantised, without safetensors, or virtual tokens
            could be generated.
        OutputError: something else stands at ``output``, or it cannot be written.
    """
    output = Path(output)
    check_place(output, overwrite=overwrite)
    named = _named(prompts)
    if backbone is None:
        backbone = next(iter(named.values())).model_config()
    kind = next(iter(named.values())).fingerprint.get("kind")
    if kind != CAUSAL.name:
        raise SoftPromptError(
            f"a prompt of a model of kind {kind} cannot be merged, for a merged model is one that engines let chat; "
            "use it in ptune's own engine"
        )
    for name, prompt in named.items():
        if prompt.head is not None:
            raise SoftPromptError(
                f'"{name}" has a linear head, for which a merged model has no place: engines give tokens, and no '
                "hidden states; use it in ptune's own engine"
            )
    if isinstance(backbone, Backbone):
        source = source_folder(backbone.name)
    else:
        model = ModelConfig(name=backbone) if isinstance(backbone, str) else backbone
        source = source_folder(model.name, model.revision)  # refused before a long load
        if tell is not None:
            tell(f"loading {model.name}")
        backbone = Backbone.load(model)
    with Engine(backbone) as engine:
        for name, prompt in named.items():
            try:
                engine.add(name, prompt)
            except SoftPromptError as error:
                raise SoftPromptError(f'"{name}": {error}') from error
        merge = _Merge(engine, ModelFiles.of(source, backbone), tell or (lambda stage: None))
        write_folder(output, merge.write, overwrite=overwrite)
    return MergedModel(folder=output, **merge.facts)


class _Merge:
    """One merge: the engine holds its prompts, and `write` fills a folder."""

    def __init__(self, engine: Engine, files: ModelFiles, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._engine, self._files, self._backbone = engine, files, engine.backbone
        self._count = sum(len(loaded.prompt.rows) for loaded in engine.prompts.values())
        self.facts: dict[str, Any] = {}

    def write(self, folder: Path) -> None:
        """Fill ``folder``."""
        folder.mkdir()
        self._tell("writing the tokenizer and its chat template, and holding its ids to ptune's own")
        self._files.copy_others(folder)
        mark = f"<|ptune-{self._digest()}"
        ids = add_tokens(folder, token_names(mark, self._count))
        self._check_free(ids)
        self._write_template(folder, mark, ids)

        contexts = self._contexts()
        matrix = self._files.read(self._files.matrix)  # [V, H]
        before = len(matrix)
        after = max(before, -(-(max(ids) + 1) // _MULTIPLE) * _MULTIPLE)
        rows = torch.cat([loaded.prompt.rows for loaded in self._engine.prompts.values()])  # [P, H]
        stored = on_disk_rows(self._backbone, rows, matrix.dtype)
        self._tell("measuring what the model's dtype costs")
        rounding = rounding_cost(self._engine, rows, stored, contexts)
        head = matrix if self._files.tied else self._files.read(self._files.head)
        never = find_output_row(self._backbone, contexts, self._count, head.dtype, self._tell)
        changed = {
            self._files.matrix: _extended(matrix, after, ids, stored, torch.zeros_like(stored[0])),
            self._files.head: _extended(head, after, ids, never.weight.expand(len(ids), -1), never.weight),
        }
        if self._files.bias is not None:
            bias = self._files.read(self._files.bias)[:, None]  # [V, 1]
            value = torch.full((1,), never.bias or 0.0, dtype=bias.dtype)
            changed[self._files.bias] = _extended(bias, after, ids, value.expand(len(ids), 1), value).flatten()
        self._tell("writing the weights")
        rewritten = self._files.write(folder, changed)
        self._files.write_config(folder, after)
        self._write_generation_config(folder, ids)
        self.facts = {
            "tasks": self._ids_of_tasks(ids),
            "rows": after,
            "appended": after - before,
            "rewritten": rewritten,
            "untied": self._files.tied,
            "probability": never.probability,
            "mean_probability": never.mean,
            "positions": never.positions,
            "rounding": rounding,
        }
        self._describe(folder, mark)

    def _digest(self) -> str:
        """Return eight hexadecimal digits that follow from the prompts: the same merge has the same names."""
        digest = hashlib.sha256()
        for name, loaded in self._engine.prompts.items():
            digest.update(f"{name}\0{loaded.prompt.template}\0".encode())
            digest.update(loaded.prompt.rows.numpy().tobytes())
        return digest.hexdigest()[:8]

    def _check_free(self, ids: Sequence[int]) -> None:
        config = self._backbone.model.config.get_text_config()
        used = {getattr(config, f"{name}_token_id", None) for name in ("bos", "pad", "decoder_start")}
        taken = {*used, *end_ids(self._files.folder, None)} & set(ids)
        if taken:
            raise BackboneError(
                f'the config of "{self._backbone.name}" gives a meaning to the id {next(iter(taken))}, which its '
                "tokenizer has no token for and would give to a virtual one; add that token to the tokenizer"
            )

    def _ids_of_tasks(self, ids: list[int]) -> dict[str, list[int]]:
        tasks, start = {}, 0
        for name, loaded in self._engine.prompts.items():
            tasks[name] = ids[start : start + len(loaded.prompt.rows)]
            start += len(tasks[name])
        return tasks

    def _write_template(self, folder: Path, mark: str, ids: list[int]) -> None:
        """Write a chat template that gives every task the ids of the engine.

        Raises:
            BackboneError: the tokenizer cannot have it so.
        """
        renderers = {name: loaded.task.renderer for name, loaded in self._engine.prompts.items()}
        on_disk = self._ids_of_tasks(ids)
        shapes = {
            name: TaskShape(renderer.pieces, ids.index(on_disk[name][0]), renderer.further)
            for name, renderer in renderers.items()
        }
        tokenizer = self._backbone.tokenizer
        bos = as_text(tokenizer, next((r.opening for r in renderers.values() if r.opening), ()))
        opening = as_text(tokenizer, opening_ids(tokenizer))
        own = own_chat_template(self._backbone.tokenizer)
        one_of_each = {shape.form: name for name, shape in shapes.items()}.values()
        for leading_blank in (False, True):
            write_chat_template(folder, chat_template(shapes, Words(mark, bos, opening, leading_blank), own))
            tokenizer = load_tokenizer(folder)
            if all(ids_agree(tokenizer, name, renderers[name], on_disk[name]) for name in one_of_each):
                break
        else:
            raise refuse(self._backbone.name)
        if not all(ids_agree(tokenizer, name, renderers[name], on_disk[name], 1) for name in shapes):
            raise refuse(self._backbone.name)

    def _contexts(self) -> list[list[int]]:
        """Return contexts of some of the prompts, an equal stride apart, for what is measured on the model."""
        loaded = list(self._engine.prompts.values())
        contexts = []
        for each in loaded[:: -(-len(loaded) // _SAMPLED_PROMPTS)]:
            renderer = each.task.renderer
            contexts += [renderer.context(record) for record in probe_records(renderer.template, 2)]
        return contexts

    def _write_generation_config(self, folder: Path, ids: Sequence[int]) -> None:
        source = self._files.folder / "generation_config.json"
        config = read_json(source, BackboneError) if source.is_file() else {}
        tokenizer = self._backbone.tokenizer
        ends = end_ids(self._files.folder, tokenizer.eos_token_id)
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        config.setdefault("pad_token_id", tokenizer.pad_token_id)
        config["suppress_tokens"] = sorted({*(config.get("suppress_tokens") or ()), *ids})  # read by transformers alone
        write_json(folder / "generation_config.json", config)

    def _describe(self, folder: Path, mark: str) -> None:
        tokenizer = self._backbone.tokenizer
        tasks = {}
        for name, loaded in self._engine.prompts.items():
            words = getattr(loaded.prompt.task, "verbalizer", None) or {}
            tasks[name] = {
                "ids": self.facts["tasks"][name],
                "template": loaded.prompt.template,
                "task": loaded.prompt.task.model_dump(mode="json"),
                "fields": list(loaded.task.renderer.template.fields),
                "optional_fields": list(loaded.task.renderer.template.optional_fields),
                "labels": {
                    label: tokenizer(text, add_special_tokens=False)["input_ids"] for label, text in words.items()
                },
                "max_length": loaded.prompt.max_length,
            }
        description = {
            "format_version": 1,
            "backbone": self._backbone.name,
            "family": self._backbone.model.config.model_type,
            "mark": mark,
            "dtype": str(self._files.read(self._files.matrix).dtype).removeprefix("torch."),
            **{key: value for key, value in self.facts.items() if key not in ("tasks", "rounding")},
            "rounding": asdict(self.facts["rounding"]),
            "tasks": tasks,
        }
        write_json(folder / DESCRIPTION, description)
        write_text(folder / "README.md", readme(description))


def _extended(matrix: Tensor, rows: int, ids: Sequence[int], values: Tensor, filling: Tensor) -> Tensor:
    """Return ``matrix`` [V, H] with as many ``rows``: ``values`` [P, H] at ``ids``, ``filling`` [H] elsewhere."""
    longer = torch.cat([matrix, filling.to(matrix.dtype).expand(rows - len(matrix), -1)])
    longer[torch.tensor(ids)] = values.to(matrix.dtype)
    return longer


def _named(prompts: Mapping[str, SoftPrompt] | Sequence[str | Path]) -> dict[str, SoftPrompt]:
    """Return soft prompts by name.

    Raises:
        SoftPromptError: there is none, two have one name, one is a deep prompt, or they belong to different backbones.
    """
    named: dict[str, SoftPrompt] = {}
    if isinstance(prompts, Mapping):
        named = dict(prompts)
    else:
        places: dict[str, Path] = {}
        for folder in map(Path, [prompts] if isinstance(prompts, (str, Path)) else prompts):
            name = folder.resolve().name
            if name in named:
                raise SoftPromptError(
                    f'"{places[name]}" and "{folder}" are both named "{name}", and a task is chosen by its name; '
                    "rename one of the folders"
                )
            named[name], places[name] = SoftPrompt.load(folder), folder
    if not named:
        raise SoftPromptError("there is no soft prompt to merge; name one or more folders")
    for name, prompt in named.items():
        if prompt.deep is not None:
            raise SoftPromptError(
                f'"{name}" is a deep prompt, whose keys and values at every layer no vocabulary can hold; serve it by '
                "ptune's own engine, or train it with prompt.deep false"
            )
    first, *others = named.items()
    for name, prompt in others:
        if not same_backbone(prompt.fingerprint, first[1].fingerprint):
            raise SoftPromptError(
                f'"{first[0]}" was trained on "{first[1].backbone_name}" and "{name}" on another backbone, '
                f'"{prompt.backbone_name}"; a merged model has one, so merge them apart'
            )
    return named
