"""Whether a merged folder's tokenizer and chat template give the ids that ptune's own rendering gives, by trial.

Knows tokenizers and renderers, and nothing of models. The texts are odd on purpose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptune.errors import BackboneError
from ptune.merging.chat_template import kwarg_of
from ptune.rendering.renderer import Renderer
from ptune.template import Template

_TEXTS = (
    "The film was great.",
    "这家店的苹果很新鲜，送货也快。",
    "  leading and trailing blanks \t\n",
    "{braces} {{twice}} {% raw %} [P*3] {answer} \\n 'quoted' \"too\"",
    "two\nlines\r\nand\u3000wide blanks 🙂 e\u0301",
    "",
    " ",
    "1 + 1 = 2; <b>bold</b> & <|notatoken|>",
)


def probe_records(template: Template, count: int | None = None) -> list[dict[str, str]]:
    """Return records that fill a template's fields with odd texts, each text in each field, an empty one too."""
    fields = template.fields
    records = []
    for number in range(len(_TEXTS) if count is None else count):
        texts = [_TEXTS[(number + 3 * place) % len(_TEXTS)] for place in range(len(fields))]
        records.append(dict(zip(fields, texts, strict=True)))
    return records


def chat_kwargs(template: Template, record: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return what a chat request says for a record: the user's message, and the other fields as keyword arguments."""
    first = template.question_field or ""
    others = [name for name in template.fields if name != first]
    kwargs: dict[str, Any] = {name: record[name] for name in others if name in record and kwarg_of(name)}
    odd = {name: record[name] for name in others if name in record and not kwarg_of(name)}
    return record.get(first, ""), kwargs | ({"fields": odd} if odd else {})


def ids_agree(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    renderer: Renderer,
    on_disk: Sequence[int],
    count: int | None = None,
) -> bool:
    """Whether the chat template gives a task's own ids for probing records, or the first ``count`` of them."""
    uncut = dataclasses.replace(renderer, max_length=None, context_limit=None)  # a chat template cuts nothing
    for record in probe_records(renderer.template, count):
        content, kwargs = chat_kwargs(renderer.template, record)
        messages = [{"role": "user", "content": content}]
        found: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, task=name, **kwargs
        )
        ids = uncut.context(record)
        if list(found["input_ids"]) != [
            on_disk[t - uncut.virtual_ids.start] if t >= uncut.vocabulary_size else t for t in ids
        ]:
            return False
    return True


def refuse(name: str) -> BackboneError:
    """Return the error that a tokenizer does not read a chat template's text as ptune's rendering reads it."""
    return BackboneError(
        f'the tokenizer of "{name}" splits a text that stands behind a special token otherwise than the same text '
        "alone, so a chat template cannot give the ids that the prompts were trained on; serve it by ptune's own engine"
    )
