"""Tags to spans: BIO, BIOES and BMES read alike. Pure functions; knows no tasks and no models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["BIO", "BIOES", "BMES"]

_PLACES = {"B": "first", "I": "inside", "M": "inside", "E": "last", "S": "only"}


@dataclass(frozen=True, order=True)
class Span:
    """A stretch of tokens or characters with its type.

    Attributes:
        start: of its first.
        end: behind its last.
        type: what it is.
    """

    start: int
    end: int
    type: str


def scheme_of(tags: Iterable[str]) -> Scheme:
    """Return the scheme of tags: BMES where an M or, without any I, an E or S occurs, BIOES where an E or S does.

    Raises:
        ValueError: a tag is of none of them.
    """
    marks = {tag.partition("-")[0] for tag in tags if _place(tag)}
    if "M" in marks or ("I" not in marks and marks & {"E", "S"}):
        if "I" in marks:
            raise ValueError("tags M- and I- both occur, of BMES and BIOES; write them in one scheme")
        return "BMES"
    return "BIOES" if marks & {"E", "S"} else "BIO"


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Return the spans that tags mean, in order.

    A span goes on as long as its type does; one that begins inside (``I-`` behind ``O``) is a span all the same.

    Raises:
        ValueError: a tag is of none of the schemes.
    """
    spans: list[Span] = []
    start, kind = 0, ""
    for number, tag in enumerate([*tags, "O"]):
        place, own = _place(tag), tag.partition("-")[2]
        if kind and (place in ("", "first", "only") or own != kind):
            spans.append(Span(start, number, kind))
            kind = ""
        if place and not kind:
            start, kind = number, own
        if place in ("last", "only"):
            spans.append(Span(start, number + 1, kind))
            kind = ""
    return spans


def _place(tag: str) -> str:
    """Return where in a span a tag stands; nothing for ``O``."""
    if tag == "O":
        return ""
    mark, dash, kind = tag.partition("-")
    if mark not in _PLACES or not dash or not kind:
        raise ValueError(f'the tag "{tag}" is of none of the schemes BIO, BIOES and BMES, as B-PER, I-PER, E-PER or O')
    return _PLACES[mark]
