"""A list of words as one text, and as tokens in which every word begins one of its own; a text as a list of words.

Words are joined as their language does: by blanks, but not between Chinese or Japanese ones, and by nothing where a
text in such a script is given by characters. Mostly every word then begins a token of its own, and the text's own
tokens stay. Where a token holds the beginnings of two words (tokenizers join Chinese characters freely), each word is
tokenised apart.

Tokenizers in the manner of sentencepiece put a blank in front of a text, and where that is a token of its own it counts
as part of the first word's first character. No word is read there, but at the token that holds the character.

Knows tokenizers, and nothing of models or tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from ptune.rendering.filling import WITHOUT_BLANKS, gap

_LETTERS = rf"(?:(?!{WITHOUT_BLANKS.pattern})\w)+"
_BLANK = "\u2581"
"""How sentencepiece writes a blank."""
_WORD = re.compile(rf"(?!\s){WITHOUT_BLANKS.pattern}|(?:[A-Za-z]\.){{2,}}|{_LETTERS}(?:[-.'’]{_LETTERS})*|[^\w\s]")


def split_text(text: str) -> list[str]:
    """Return a text's words: marks stand alone, and so does every Chinese or Japanese character."""
    return _WORD.findall(text)


def spelled_out(words: Sequence[str]) -> tuple[str, list[int]]:
    """Return words as one text, and where each begins in it, by characters."""
    by_character = all(len(word) == 1 for word in words) and any(map(WITHOUT_BLANKS.match, words))
    starts, text = [], ""
    for word in words:
        text += "" if by_character else gap(text, word)
        starts.append(len(text))
        text += word
    return text, starts


def tokenised_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
    """Return the ids of words as one text, and for each word the place of its first token among them.

    A word that tokenises to nothing has no place: None.
    """
    text, starts = spelled_out(words)
    if tokenizer.is_fast:
        ids, spans = _tokens(tokenizer, text)
        places = list(_first_tokens(tokenizer, ids, spans, starts))
        if all(one is not None and other is not None and one < other for one, other in pairwise(places)):
            return ids, places
    ids, places = [], []
    for number, word in enumerate(words):
        before = text[starts[number - 1] + len(words[number - 1]) : starts[number]] if number else ""
        if tokenizer.is_fast:
            own, spans = _tokens(tokenizer, before + word)
            (place,) = _first_tokens(tokenizer, own, spans, [len(before)])
        else:
            own = list(tokenizer(before + word, add_special_tokens=False, verbose=False)["input_ids"])
            place = next((n for n, token in enumerate(own[:-1]) if not _is_blank(tokenizer, token)), len(own) - 1)
        places.append(None if place is None or place < 0 else len(ids) + place)
        ids += own
    return ids, places


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(given["input_ids"]), list(given["offset_mapping"])


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], spans: Sequence[tuple[int, int]], starts: Sequence[int]
) -> Iterator[int | None]:
    """Give for each place in a text the number of the first token that reaches over it and is more than a blank."""
    token = 0
    for start in starts:
        while token < len(spans) and spans[token][1] <= start:
            token += 1
        # looked at where the next one reaches over it as well
        while token + 1 < len(spans) and spans[token + 1][0] <= start and _is_blank(tokenizer, ids[token]):
            token += 1
        yield token if token < len(spans) else None


def _is_blank(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not str(tokenizer.decode([token])).replace(_BLANK, "").strip()
