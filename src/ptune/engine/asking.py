"""What an engine is asked, as ids: of a soft prompt by its template, of the bare model as it stands.

Knows nothing of tables, threads or how answers are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptune.engine.loaded_prompts import LoadedPrompt
from ptune.errors import DataError
from ptune.generation.generate import GenerationOptions
from ptune.models.backbone import Backbone
from ptune.rendering.filling import record_of_text


def context_ids(
    backbone: Backbone,
    loaded: LoadedPrompt | None,
    record: Mapping[str, Any] | str,
    options: GenerationOptions | None,
) -> tuple[list[int], GenerationOptions]:
    """Return the ids to continue, and how.

    Args:
        backbone: that continues them.
        loaded: the soft prompt; None for the bare model.
        record: the template's fields; a text stands for the first field, and for the bare model as it is.
        options: how to decode; as the soft prompt's task says where absent.

    Raises:
        DataError: the bare model is given fields, or a field is missing.
    """
    if loaded is None:
        if not isinstance(record, str):
            raise DataError("the bare model continues a text and knows no template; give it the text itself")
        return list(backbone.tokenizer(record)["input_ids"]), options or GenerationOptions()
    renderer = loaded.task.renderer
    if isinstance(record, str):
        record = record_of_text(renderer.template, record, {}, loaded.name)
    options = options or GenerationOptions(max_new_tokens=getattr(loaded.prompt.task, "max_new_tokens", 128))
    return renderer.question(record, options.max_new_tokens), options


def answer_ids(backbone: Backbone, loaded: LoadedPrompt | None, answer: str, *, end: bool) -> list[int]:
    """Return the ids of a given answer.

    Args:
        backbone: whose tokenizer the bare model's answer is read by.
        loaded: the soft prompt; None for the bare model.
        answer: blanks are kept.
        end: set what ends an answer behind it.

    Raises:
        DataError: it is of no token.
    """
    if loaded is not None:
        ids = loaded.task.renderer.answer_ids(answer, end=end)
    else:
        tokenizer = backbone.tokenizer
        ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], *[tokenizer.eos_token_id] * end]
    if not ids:
        raise DataError("an answer is of no token, and so of no probability; leave it out, or give end=True")
    return ids
