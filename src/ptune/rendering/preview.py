"""A row as the model will read it, decoded back for people to look at. Knows no models and no training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ptune.rendering.batch import IGNORED, Row
from ptune.rendering.renderer import Renderer

SegmentKind = Literal["virtual", "special", "text", "answer"]


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered row for people to read."""

    kind: SegmentKind
    text: str


def preview(renderer: Renderer, row: Row) -> list[Segment]:
    """Return a row that a renderer made in stretches of one kind each."""
    pairs = groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: _kind(renderer, *pair))
    return [Segment(kind, _decoded(renderer, kind, [token for token, _ in run])) for kind, run in pairs]


def _kind(renderer: Renderer, token: int, label: int) -> SegmentKind:
    if token >= renderer.vocabulary_size:
        return "virtual"
    if label != IGNORED:
        return "answer"  # its end token, too
    return "special" if token in renderer.tokenizer.all_special_ids else "text"


def _decoded(renderer: Renderer, kind: SegmentKind, ids: list[int]) -> str:
    if kind == "virtual":
        return "".join(f"[P{token - renderer.virtual_ids.start}]" for token in ids)
    return str(renderer.tokenizer.decode(ids))
