"""Tags of BIO, IOB1, BIOES, BMES and BILOU read alike: which words make an entity, as seqeval's default has it.

An entity begins at B or S, where the type changes, and at any other letter behind O or behind an entity's end; it ends
after E or S, and before what begins anew. M is BMES's I; L and U are BILOU's E and S.

Knows no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ALIKE = {"M": "I", "L": "E", "U": "S"}


@dataclass(frozen=True)
class Span:
    """Words that make an entity.

    Attributes:
        type: of the entity; empty where tags have no types.
        start: its first word.
        end: behind its last word.
    """

    type: str
    start: int
    end: int


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Return the entities of a sequence of tags, in order."""
    spans: list[Span] = []
    open_span = False
    for place, tag in enumerate(map(plain_tag, tags)):
        letter, _, kind = tag.partition("-")
        if letter == "O":
            open_span = False
            continue
        if letter in "BS" or not open_span or spans[-1].type != kind:
            spans.append(Span(kind, place, place))
        spans[-1] = Span(kind, spans[-1].start, place + 1)
        open_span = letter not in "ES"
    return spans


def plain_tag(tag: str) -> str:
    """Return a tag in the letters B, I, E, S and O."""
    return _ALIKE.get(tag[0], tag[0]) + tag[1:]
