"""What stands between the answers of a conversation: the end of a turn, and the words of the next question.

An answer in the midst of a conversation ends in a token that is learnt with it, as the last one does: the first special
token behind it in the template's [next], such as ``<|im_end|>`` in a chat template's words, or else the tokenizer's end
token. The last answer ends in the same, and behind it in the tokenizer's end token, if that is another.

Knows no records and no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ptune.rendering.batch import IGNORED, Row
from ptune.template import Field, Optional, Template, Text


@dataclass(frozen=True)
class Further:
    """The form of all exchanges but the first, for one tokenizer.

    Attributes:
        end: how the end of an answer is written, which its ids end in; empty where the tokenizer has no end token.
        words: of the next question.
    """

    end: str
    words: tuple[Text | Field | Optional, ...]

    @classmethod
    def of(cls, template: Template, tokenizer: PreTrainedTokenizerBase) -> Further:
        """Return the form that a template gives."""
        first, *others = template.further
        text = first.text if isinstance(first, Text) else ""
        end = end_of_turn(text, tokenizer)
        if not end:
            return cls(tokenizer.eos_token or "", template.further)
        return cls(end, (Text(text[len(end) :]), *others))


def end_of_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text as far as its first special token, that one included; nothing where it has none."""
    special = {
        *tokenizer.all_special_tokens,
        *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
    }
    # of two that begin at one place the longer one counts, as for the tokenizer
    places = sorted((text.index(token), -len(token)) for token in special if token in text)
    return text[: places[0][0] - places[0][1]] if places else ""


def conversation_row(
    contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], learnt: Sequence[bool], left_out: int = 0
) -> Row:
    """Return contexts, each followed by its answer, as one row in which answers that are learnt are supervised.

    Args:
        contexts: ids before each answer, without those before it.
        answers: their ids, the last of them empty where it is still to be written.
        learnt: whether each of them is.
        left_out: how many exchanges before them had no room.
    """
    ids: list[int] = []
    labels: list[int] = []
    for context, answer, supervised in zip(contexts, answers, learnt, strict=True):
        ids += [*context, *answer]
        labels += [*[IGNORED] * len(context), *(answer if supervised else [IGNORED] * len(answer))]
    return Row(tuple(ids), tuple(labels), left_out=left_out)
