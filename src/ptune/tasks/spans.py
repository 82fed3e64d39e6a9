"""Tags to spans: BIO, IOB1, BIOES, BMES and BILOU read alike, as seqeval's default has it.

A span begins at B or S, where the type changes, and at any other letter behind O or behind a span's end; it ends after
E or S, and before what begins anew. M is BMES's I; L and U are BILOU's E and S. Knows no tasks and no models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["BIO", "BIOES", "BMES"]

_ALIKE = {"M": "I", "L": "E", "U": "S"}


@dataclass(frozen=True, order=True)
class Span:
    """A stretch of tokens or characters with its type.

    Attributes:
        start: of its first.
        end: behind its last.
        type: what it is; empty where tags have no types.
    """

    start: int
    end: int
    type: str


def scheme_of(tags: Iterable[str]) -> Scheme:
    """Return the scheme of tags: BMES where an M or, without any I, an E or S occurs, BIOES where an E or S does.

    Raises:
        ValueError: a tag is of none of them.
    """
    marks = {tag[0] for tag in tags if plain_tag(tag) != "O"}
    if "M" in marks or ("I" not in marks and marks & {"E", "S"}):
        if "I" in marks:
            raise ValueError("tags M- and I- both occur, of BMES and BIOES; write them in one scheme")
        return "BMES"
    return "BIOES" if marks & {"E", "S"} else "BIO"


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Return the spans that tags mean, in order.

    Raises:
        ValueError: a tag is of none of the schemes.
    """
    spans: list[Span] = []
    open_span = False
    for place, tag in enumerate(map(plain_tag, tags)):
        letter, _, kind = tag.partition("-")
        if letter == "O":
            open_span = False
            continue
        if letter in "BS" or not open_span or spans[-1].type != kind:
            spans.append(Span(place, place, kind))
        spans[-1] = Span(spans[-1].start, place + 1, kind)
        open_span = letter not in "ES"
    return spans


def plain_tag(tag: str) -> str:
    """Return a tag in the letters B, I, E, S and O.

    Raises:
        ValueError: it is of none of the schemes.
    """
    letter, dash, kind = tag.partition("-")
    letter = _ALIKE.get(letter, letter)
    if letter not in ("B", "I", "E", "S", "O") or bool(dash) != bool(kind) or (letter == "O" and dash):
        raise ValueError(f'the tag "{tag}" is of none of the schemes BIO, BIOES and BMES, as B-PER, I-PER, E-PER or O')
    return letter + dash + kind
