"""How answers differ with and without the prompt: on the task, where they should, and off it, where they should not.

The most repeated complaint about tuned prompts is that the model then speaks of nothing else, so every run
ends with a look.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.rendering.batch import Row
from ptune.tasks.classification import Classification
from ptune.tasks.extraction import Extraction
from ptune.tasks.generation import Generation
from ptune.tasks.reading import ReadingTask
from ptune.tasks.task import Task
from ptune.training.assembly import Parts

_QUESTION = "Which animals live in the sea?"
_NEW_TOKENS = 32
_SCORED, _WRITTEN = 64, 8
"""Held-out records that are answered both ways: texts take longer than labels."""
_LEAST_SHIFT = 0.01


@dataclass(frozen=True)
class Comparison:
    """How many of some held-out answers the prompt changes, and an off-task question answered both ways.

    Attributes:
        changed: answers that differ from the bare model's.
        total: answers compared.
        shift: mean change of the answers' probabilities, of all labels together; None for free text and tags.
        off_task: question, the bare model's answer, the answer with the prompt; None for tasks without free text,
            and where a template takes no question.
        by_head: a trained linear head gave the answers, those without the prompt too.
        all_alike: with the prompt all answers are the same text, though the right ones differ.
    """

    changed: int
    total: int
    shift: float | None = None
    off_task: tuple[str, str, str] | None = None
    by_head: bool = False
    all_alike: bool = False

    @property
    def warning(self) -> str | None:
        """What to say where the prompt changes no answer, or makes all of them the same; None where all is well."""
        if self.changed and self.all_alike:
            return (
                f"all {self.total} answers with the prompt are one and the same text, whatever is asked: train longer, "
                "or at another learning rate"
            )
        if self.changed:
            return None
        moved = self.shift is not None and self.shift >= _LEAST_SHIFT
        though = f", though probabilities move by {self.shift:.2f} on average" if moved else ""
        if self.by_head:
            return f"the virtual tokens change none of the linear head's answers{though}: the head may do without them"
        return f"the prompt changes no answer{though}: train longer, or at another learning rate"

    def values(self) -> dict[str, Any]:
        """Return it as JSON values, the off-task question with both answers by name."""
        off_task = self.off_task and dict(zip(("question", "without", "with"), self.off_task, strict=True))
        shift = self.shift if self.shift is not None and math.isfinite(self.shift) else None
        return {"changed": self.changed, "total": self.total, "shift": shift, "off_task": off_task}


def compare_with_bare_model(parts: Parts) -> Comparison | None:
    """Answer some dev records, and one question that has nothing to do with them, with and without virtual tokens.

    A linear head reads both, for without one there is no answer. Records of which nothing is left without virtual
    tokens are passed over. None where nothing can be asked: where the template has no field, as for records that are
    tokenised already, or no record is left.
    """
    task, backbone = parts.task, parts.prompted.backbone
    if not task.renderer.template.fields:
        return None
    bare = without_prompt(task)
    writes = isinstance(task, Generation)
    askable = (record for record in parts.dev if asks_anything(bare, record))
    records = list(islice(askable, _WRITTEN if writes else _SCORED))
    if not records:
        return None
    batch_size = 2 * parts.config.training.batch_size
    with_prompt, without = (one.predict(backbone, records, batch_size=batch_size) for one in (task, bare))
    pairs = list(zip(with_prompt, without, strict=True))
    if writes:
        changed = sum(one["text"] != other["text"] for one, other in pairs)
        # entities are asked of a text that a record holds, so there is no question off the task
        off_task = None if isinstance(task, Extraction) else _off_task(task, bare, backbone)
        texts, right = ({one["text"] for one in with_prompt}, {task.answer(record) for record in records})
        return Comparison(changed, len(records), off_task=off_task, all_alike=len(texts) == 1 < len(right))
    changed = sum(one[task.answer_key] != other[task.answer_key] for one, other in pairs)
    by_head = isinstance(task, ReadingTask) and task.reads_states
    if "probabilities" not in with_prompt[0]:
        return Comparison(changed, len(records), by_head=by_head)
    shifts = [
        sum(abs(probability - other["probabilities"][label]) for label, probability in one["probabilities"].items()) / 2
        for one, other in pairs
    ]
    return Comparison(changed, len(records), shift=sum(shifts) / len(shifts), by_head=by_head)


def without_prompt(task: Task) -> Task:
    """Return a task as the bare model is asked it: the same words without virtual tokens, no fitted temperature.

    Where nothing is left of an empty record without virtual tokens there is no prior, either, and that is logged.
    """
    bare = task.with_renderer(task.renderer.without_virtual_tokens())
    if isinstance(bare, Classification) and bare.config.calibration == "prior" and not _readable(bare.empty_rows()):
        bare.config = bare.config.model_copy(update={"calibration": "none"})
        logging.getLogger("ptune").warning(
            "without virtual tokens an empty record has no token to read, so the bare model's scores are taken "
            "without calibration by a prior; words in the template would give it one"
        )
    return bare


def asks_anything(bare: Task, record: Mapping[str, Any]) -> bool:
    """Whether something is left to read of a record without virtual tokens."""
    if isinstance(bare, ReadingTask):
        return _readable(bare.rows(record))
    return bool(bare.renderer.context(record))


def _readable(rows: Iterable[Row]) -> bool:
    return all(place >= 0 for row in rows for place in row.read_at)


def _off_task(task: Task, bare: Task, backbone: Backbone) -> tuple[str, str, str] | None:
    template = task.renderer.template
    if template.question_field is None:
        return None
    question = dict.fromkeys(template.fields, "") | {template.question_field: _QUESTION}
    contexts = [one.renderer.question(question, _NEW_TOKENS) for one in (bare, task)]
    if not all(contexts):
        return None
    answers = generate(backbone, contexts, GenerationOptions(max_new_tokens=_NEW_TOKENS))
    return _QUESTION, answers[0].text, answers[1].text
