"""The soft prompt: virtual tokens, template and task, as one small folder that describes itself.

No shape or setting is ever given at load, and nothing is unpickled; a folder that does not hold what it should is
refused with what is wrong. The files and their order are those of `ptune.soft_prompts.files`.

Knows nothing of training or serving. Shapes: P virtual tokens, H width, W as in `keys_and_values`, C outputs.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptune.config.run import EncoderConfig, ModelConfig, Overlong
from ptune.config.task import TaskConfig, check_task_template, head_outputs
from ptune.errors import SoftPromptError, TemplateError
from ptune.families import ENCODER_DECODER, MASKED
from ptune.models.backbone import Backbone
from ptune.models.deep_start import check_shape
from ptune.prompts.deep_prompts import check_deep_template
from ptune.prompts.keys_and_values import KeyValueShape
from ptune.prompts.linear_head import LinearHead, head_from, head_tensors
from ptune.soft_prompts.files import (
    BackboneEntry,
    Fingerprint,
    HeadEntry,
    TensorsEntry,
    begin_save,
    description_values,
    encoder_values,
    end_save,
    read_soft_prompt,
)
from ptune.soft_prompts.model_card import write_model_card
from ptune.soft_prompts.peft_format import read_peft_adapter, remove_peft_adapter, shape_of_adapter, write_peft_adapter
from ptune.tasks.registry import default_overlong
from ptune.template import Template, Virtual


@dataclass(frozen=True, eq=False, kw_only=True)
class SoftPrompt:
    """A trained task for one backbone.

    Attributes:
        rows: the virtual tokens ``[P, H]`` float32 on the CPU, a copy of what was given.
        template: its text; its P is the rows'.
        task: what is asked of a record, labels included.
        max_length: most text tokens of an example; None for no limit but the backbone's.
        overlong: what happens to an answer that is itself too long.
        encoder: what produced the rows; None where that is not known (imported).
        backbone_name: what the user called the backbone.
        fingerprint: `Backbone.fingerprint` of the backbone.
        deep: how keys and values lie in the rows ``[P, W]`` of a deep prompt; None for virtual tokens at the input.
        head: the linear head ``[C, H]`` of a task that has one, a frozen copy on the CPU; None for others.
        temperature: that a label's scores are divided by before they become probabilities; None for none.
        summary: of the run, JSON values; see `ptune.training.summary`.
    """

    rows: Tensor
    template: str
    task: TaskConfig
    overlong: Overlong
    backbone_name: str
    fingerprint: dict[str, Any]
    max_length: int | None = None
    encoder: EncoderConfig | None = None
    deep: KeyValueShape | None = None
    head: LinearHead | None = None
    temperature: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the rows against the template.

        Raises:
            SoftPromptError: the template has none or another number of virtual tokens, rows or head are not finite, the
                head is not the task's, or the temperature is not above 0.
            TemplateError: the template cannot be parsed, lacks what the task needs, or has words before the virtual
                tokens of a deep prompt.
        """
        rows = self.rows.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        template = Template.parse(self.template)
        check_task_template(self.task, template)
        expected = template.num_virtual_tokens
        if expected == 0:
            raise SoftPromptError(
                f"the template {self.template!r} has no virtual tokens, of which a soft prompt is made; put [P*10] "
                "where they should stand"
            )
        if rows.dim() != 2 or len(rows) != expected:
            raise SoftPromptError(
                f"the template has {expected} virtual tokens, and the tensor given for them is of shape "
                f"{list(rows.shape)}; write [P*{rows.shape[0] if rows.dim() else 1}] for all runs together, or give "
                f"[{expected}, width]"
            )
        if self.deep is not None:
            check_deep_template(template)
            if rows.shape[1] != self.deep.row_width:
                raise SoftPromptError(
                    f"a deep prompt's rows are {self.deep.row_width} wide ({self.deep}), and those given "
                    f"{rows.shape[1]}; give the shape of the backbone that they belong to"
                )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise SoftPromptError(f"a temperature is a number above 0, and the one given is {self.temperature}")
        if not torch.isfinite(rows).all():
            broken = (~torch.isfinite(rows).all(-1)).nonzero().flatten().tolist()
            raise SoftPromptError(
                f"virtual tokens {broken} hold a value that is infinite or not a number; the run diverged, so "
                "train again with a lower learning rate"
            )
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "head", self._checked_head())

    def _checked_head(self) -> LinearHead | None:
        outputs, tensors = head_outputs(self.task), head_tensors(self.head)
        found = None if self.head is None else len(self.head.bias)
        if found != (None if outputs is None else len(outputs)):
            wanted = "no linear head" if outputs is None else f"a linear head of {len(outputs)} outputs"
            raise SoftPromptError(
                f"a task of type {self.task.type} has {wanted}, and the one given has {found or 'none'}; give the head "
                "that was trained with it"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise SoftPromptError(
                "the linear head holds a value that is infinite or not a number; the run diverged, so train again with "
                "a lower learning rate"
            )
        return head_from(tensors)

    @property
    def input_rows(self) -> Tensor:
        """The virtual tokens ``[P, H]`` as rows at the input, where others may start.

        Raises:
            SoftPromptError: it is a deep prompt, which has none.
        """
        if self.deep is not None:
            raise SoftPromptError(
                "a deep prompt is keys and values, and there are no rows at the input in it to start from; start from "
                "a soft prompt that is not deep, or from a text"
            )
        return self.rows

    @property
    def fits_peft(self) -> bool:
        """Whether PEFT can run it: all virtual tokens stand, in one run, before everything else.

        PEFT has P-tuning for causal and for encoder-decoder models, no task that a masked model's answer fits, and no
        place for a linear head.
        """
        if self.fingerprint.get("kind") == MASKED.name or self.head is not None:
            return False
        pieces = Template.parse(self.template).pieces
        runs = [place for place, piece in enumerate(pieces) if isinstance(piece, Virtual)]
        return runs == list(range(len(runs)))  # runs with nothing between them are one

    def save(self, folder: str | Path) -> None:
        """Write the soft prompt; a kill at any moment leaves the one before it, or this one.

        A ``README.md`` that is not ptune's is left alone. One process writes at a time.

        Raises:
            OutputError: the folder cannot be written, or the summary holds what JSON has no form for.
        """
        folder = Path(folder)
        self._description(folder, "")  # what cannot be written is found before anything is
        sha256 = begin_save(folder, self.rows, self.deep, self.head)
        if self.fits_peft:
            config = self.fingerprint["config"]
            write_peft_adapter(
                folder,
                self.rows,
                base_model=None if self.backbone_name == "mini" else self.backbone_name,
                num_layers=config.get("num_hidden_layers"),
                num_attention_heads=config.get("num_attention_heads"),
                deep=self.deep,
                task_type="SEQ_2_SEQ_LM" if self.fingerprint.get("kind") == ENCODER_DECODER.name else "CAUSAL_LM",
            )
        else:
            remove_peft_adapter(folder)
        write_model_card(folder, self.describe())
        end_save(folder, self._description(folder, sha256))

    @classmethod
    def load(cls, folder: str | Path) -> SoftPrompt:
        """Read a soft prompt. Nothing but its folder is needed, and nothing is unpickled.

        Raises:
            SoftPromptError: no such folder, no soft prompt in it, written by a newer ptune, altered or cut short, or
                its files do not fit each other.
        """
        rows, head, description = read_soft_prompt(Path(folder))
        try:
            return cls(
                rows=rows,
                template=description.template,
                task=description.task,
                overlong=description.overlong,
                backbone_name=description.backbone.name,
                fingerprint=description.backbone.fingerprint.model_dump(),
                max_length=description.max_length,
                encoder=description.encoder,
                deep=description.deep,
                head=head,
                temperature=description.temperature,
                summary=description.summary,
            )
        except (SoftPromptError, TemplateError) as error:
            raise SoftPromptError(f'"{folder}" is damaged: {error}') from error

    def check(self, backbone: Backbone) -> None:
        """See that the soft prompt belongs to ``backbone``.

        Raises:
            SoftPromptError: it does not; names both backbones and what differs.
        """
        width = backbone.hidden_size if self.deep else self.rows.shape[1]
        if width == backbone.hidden_size and backbone.matches(self.fingerprint):
            if self.deep is not None:
                check_shape(self.deep, backbone)
            self._note_other_weights(backbone.quantization)
            return
        saved, present = self.fingerprint.get("config", {}), backbone.fingerprint()["config"]
        differing = [
            f"{name} {saved.get(name)} against {present[name]}" for name in present if saved.get(name) != present[name]
        ]
        if width != backbone.hidden_size and not any(text.startswith("hidden_size ") for text in differing):
            differing.insert(0, f"width {width} against {backbone.hidden_size}")
        what = ", ".join(differing) or "their shapes are the same, the rows of their input matrices are not"
        if self.backbone_name == backbone.name:
            mend = f'load the version of "{backbone.name}" that it was trained on, or train it again on this one'
        else:
            mend = f'load "{self.backbone_name}" for it, or train a soft prompt on "{backbone.name}"'
        raise SoftPromptError(
            f'the soft prompt belongs to another backbone: it was trained on "{self.backbone_name}" and the one loaded '
            f'is "{backbone.name}" ({what}); {mend}'
        )

    def _note_other_weights(self, present: str | dict[str, Any] | None) -> None:
        """Say that it was trained on weights that were rounded otherwise: it fits, and scores a little differently."""
        settings = self.summary.get("model")
        trained = settings.get("quantization") if isinstance(settings, dict) else None
        if settings and trained != present:
            logging.getLogger("ptune").warning(
                f"the soft prompt was trained on {_weights(trained)} and is used on {_weights(present)}, where it may "
                "score otherwise; ptune eval says how"
            )

    def model_config(self, model: ModelConfig | str | None = None) -> ModelConfig:
        """Return the settings that load its backbone.

        Args:
            model: another copy of it, by its settings or its name; the one that it names, of the revision that it was
                trained on, where absent.
        """
        if isinstance(model, ModelConfig):
            return model
        if model is not None:
            return ModelConfig(name=model)
        settings = self.summary.get("model")
        revision = settings.get("revision") if isinstance(settings, dict) else None
        return ModelConfig(name=self.backbone_name, revision=revision)

    def describe(self) -> dict[str, Any]:
        """Return what there is to say about it, as JSON values: for `ptune inspect` and the model card."""
        norms = self.rows.norm(dim=-1)  # [P]
        return {
            "template": self.template,
            "task": self.task.model_dump(mode="json"),
            "virtual_tokens": self.rows.shape[0],
            "width": self.rows.shape[1],
            "deep": None if self.deep is None else asdict(self.deep),
            "head": None if (head := self._head_entry()) is None else head.model_dump(),
            "norms": {"least": float(norms.min()), "mean": float(norms.mean()), "greatest": float(norms.max())},
            "max_length": self.max_length,
            "overlong": self.overlong,
            "encoder": encoder_values(self.encoder),
            "backbone": self.backbone_name,
            "backbone_config": self.fingerprint["config"],
            "temperature": self.temperature,
            "loads_in_peft": self.fits_peft,
            "summary": self.summary,
        }

    def _head_entry(self) -> HeadEntry | None:
        if self.head is None:
            return None
        outputs, width = self.head.weight.shape
        return HeadEntry(outputs=outputs, width=width)

    def _description(self, folder: Path, sha256: str) -> Any:
        return description_values(
            folder,
            format_version=1,
            template=self.template,
            task=self.task,
            max_length=self.max_length,
            overlong=self.overlong,
            encoder=self.encoder,
            backbone=BackboneEntry(name=self.backbone_name, fingerprint=Fingerprint(**self.fingerprint)),
            virtual_tokens=TensorsEntry(count=self.rows.shape[0], width=self.rows.shape[1], sha256=sha256),
            deep=self.deep,
            head=self._head_entry(),
            temperature=self.temperature,
            summary=self.summary,
        )


def import_peft(
    folder: str | Path,
    *,
    backbone: Backbone,
    template: str,
    task: TaskConfig,
    max_length: int | None = None,
    overlong: Overlong | None = None,
) -> SoftPrompt:
    """Return the soft prompt for an adapter that PEFT saved of P-tuning, prompt tuning or prefix tuning.

    The encoder stays behind, for PEFT does not save it. PEFT's own logits come out where ``template`` opens with all of
    its virtual tokens, as in ``[P*10]{text}{answer}``.

    Args:
        folder: the adapter.
        backbone: the model that it was trained on.
        template: with as many virtual tokens as the adapter has.
        task: what the adapter was trained for.
        max_length: as in `SoftPrompt`.
        overlong: as in `SoftPrompt`; `default_overlong` of the task where absent.

    Raises:
        SoftPromptError: the adapter cannot be imported, or template or backbone do not fit it.
        TemplateError: the template cannot be parsed.
    """
    rows, config = read_peft_adapter(folder)
    count, width = rows.shape
    expected = Template.parse(template).num_virtual_tokens
    if expected != count:
        raise SoftPromptError(
            f'the adapter "{folder}" has {count} virtual tokens and the template {expected}; write [P*{count}] where '
            "PEFT set them, before everything else"
        )
    deep = shape_of_adapter(config)
    if deep is not None:
        check_shape(deep, backbone)
    elif width != backbone.hidden_size:
        raise SoftPromptError(
            f'the adapter "{folder}" is of width {width} and the backbone "{backbone.name}" of width '
            f"{backbone.hidden_size}; load the model that it was trained on "
            f"({config.get('base_model_name_or_path') or 'not named in it'})"
        )
    origin = {key: config.get(key) for key in ("peft_type", "peft_version", "base_model_name_or_path")}
    return SoftPrompt(
        rows=rows,
        template=template,
        task=task,
        overlong=overlong or default_overlong(task),
        deep=deep,
        backbone_name=backbone.name,
        fingerprint=backbone.fingerprint(),
        max_length=max_length,
        summary={"imported": origin},
    )


def _weights(quantization: str | dict[str, Any] | None) -> str:
    """Return a setting of ``model.quantization`` in words."""
    if quantization is None:
        return "weights in full"
    return f"weights of {quantization if isinstance(quantization, str) else quantization.get('quant_method')}"
