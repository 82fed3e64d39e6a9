"""How answers differ with and without the prompt: on the task, where they should, and off it, where they should not.

The most repeated complaint about tuned prompts is that the model then speaks of nothing else, so every run
ends with a look.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptune.assembly import Parts
from ptune.config import GenerationConfig
from ptune.generation import GenerationOptions, generate

_QUESTION = "Which animals live in the sea?"
_SHOWN = 8
_NEW_TOKENS = 32


@dataclass(frozen=True)
class Comparison:
    """How many of some held-out answers the prompt changes, and an off-task question answered both ways.

    Attributes:
        changed: answers that differ from the bare model's.
        total: answers compared.
        off_task: question, the bare model's answer, the answer with the prompt; None for tasks without free text.
    """

    changed: int
    total: int
    off_task: tuple[str, str, str] | None


def compare_with_bare_model(parts: Parts) -> Comparison:
    """Answer some dev records, and one question that has nothing to do with them, with and without virtual tokens."""
    task, backbone = parts.task, parts.prompted.backbone
    bare = task.with_renderer(task.renderer.without_virtual_tokens())
    records = parts.dev[:_SHOWN]
    tuned_answers = task.predict(backbone, records, batch_size=_SHOWN)
    bare_answers = bare.predict(backbone, records, batch_size=_SHOWN)
    if not isinstance(task.config, GenerationConfig):
        changed = sum(one["label"] != other["label"] for one, other in zip(tuned_answers, bare_answers, strict=True))
        return Comparison(changed, len(records), None)
    changed = sum(one["text"] != other["text"] for one, other in zip(tuned_answers, bare_answers, strict=True))
    fields = task.renderer.template.fields
    question = dict.fromkeys(fields, "") | {fields[0]: _QUESTION}
    contexts = [one.renderer.question(question, _NEW_TOKENS) for one in (bare, task)]
    answers = generate(backbone, contexts, GenerationOptions(max_new_tokens=_NEW_TOKENS))
    return Comparison(changed, len(records), (_QUESTION, answers[0].text, answers[1].text))
