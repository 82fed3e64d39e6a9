"""How the cost of one optimizer step grows: with tokens, virtual tokens, rows, candidates and the size of the model.

    python benchmarks/growth.py                     run what is missing, draw the picture, print the table
    python benchmarks/growth.py --only tokens size  of these axes alone
    python benchmarks/growth.py --quick --output FILE --picture FILE    tiny sizes, to see that it runs
    python benchmarks/growth.py --markdown          print the table of what is stored

A step is forward and backward of a batch of texts with a label of one token, without the optimizer, as in
`train_speed.py`; weights are random. Lengths lie evenly between 6/11 and 16/11 of their mean, as 24 to 64 do around 44.
"in front" is the plan of shared prefixes and packed rows, "behind" that of frozen contexts from the second epoch on.
PEFT sets virtual tokens in front, in one padded batch, and trains candidates one after another; ptune trains them at
once, as `ptune.search` does. All cases take turns in one process, in float32, and each point is stored as soon as it is
measured.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from cells import Cells, tell
from growth_picture import Panel, Point, picture
from tables import markdown_table
from timing import interleaved
from train_speed import SHAPES, SMALL, Ours, Peft, Shape, row
from transformers import PreTrainedModel

from ptune.models.backbone import Backbone
from ptune.plans.context_cache import ContextCache
from ptune.rendering.batch import collate
from ptune.tasks.side_by_side import answer_side_by_side, one_forward_each
from ptune.tasks.task import Asked

OUTPUT, PICTURE = Path("benchmarks/results/growth.json"), Path("docs/growth.svg")
Rows = list[tuple[list[int], int]]
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """One point of an axis.

    Attributes:
        shape: of the model.
        tokens: of a text, on average.
        virtual: virtual tokens.
        rows: of a batch.
        candidates: trained in the same step, each on the whole batch.
    """

    shape: Shape = SMALL
    tokens: int = 44
    virtual: int = 10
    rows: int = 16
    candidates: int = 1

    def batch(self) -> Rows:
        """Return its rows as ids, the last of each supervised."""
        shares = [(number + 0.5) / self.rows for number in range(self.rows)]
        lengths = [round(self.tokens * (6 + 10 * share) / 11) for share in shares]
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(self.rows, generator=generator).tolist()
        vocabulary = self.shape.vocabulary
        return [
            (torch.randint(10, vocabulary, (lengths[place] + 1,), generator=generator).tolist(), 1) for place in order
        ]


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        title: of its panel and its line.
        points: name -> setting; the names are numbers, and those of sizes millions of parameters.
    """

    title: str
    points: Mapping[str, Setting]


def axis(title: str, base: Setting, field: str, values: Sequence[int]) -> Axis:
    """Return the axis along which one number of a setting grows."""
    return Axis(title, {str(value): replace(base, **{field: value}) for value in values})


def axis_of_sizes(base: Setting, shapes: Sequence[Shape]) -> Axis:
    """Return the axis of models, each named by its millions of parameters."""
    points = {
        f"{_millions(shape):.{0 if _millions(shape) > 5 else 2}f}": replace(base, shape=shape) for shape in shapes
    }
    return Axis("parameters of the model, millions", points)


def _millions(shape: Shape) -> float:
    """Return how many weights a Qwen-shaped model has, in millions, biases and norms left out."""
    between, heads = shape.between or 4 * shape.hidden, shape.shared_heads or shape.heads
    attention = 2 * shape.hidden**2 * (1 + heads / shape.heads)
    return (shape.vocabulary * shape.hidden + shape.layers * (attention + 3 * shape.hidden * between)) / 1e6


EIGHT = Setting(rows=8)
AXES = {
    "tokens": axis("text tokens of a row", EIGHT, "tokens", (16, 32, 64, 128, 256, 512)),
    "virtual": axis("virtual tokens", Setting(), "virtual", (2, 5, 10, 20, 50, 100, 200)),
    "rows": axis("rows of a batch", Setting(), "rows", (1, 2, 4, 8, 16, 32)),
    "candidates": axis("candidates in a step", EIGHT, "candidates", (1, 2, 4, 8)),
    "size": axis_of_sizes(
        EIGHT,
        [Shape(128, 4, 4), Shape(256, 6, 4), SMALL, Shape(768, 12, 12), SHAPES["half-billion"]["qwen"]],
    ),
}
TINY = Setting(Shape(64, 2, 4, 300), tokens=11, virtual=2, rows=2)
QUICK = {
    "tokens": axis("text tokens of a row", TINY, "tokens", (11, 22, 44)),
    "virtual": axis("virtual tokens", TINY, "virtual", (2, 10)),
    "rows": axis("rows of a batch", TINY, "rows", (1, 4)),
    "candidates": axis("candidates in a step", TINY, "candidates", (1, 3)),
    "size": axis_of_sizes(TINY, [TINY.shape, Shape(96, 3, 4, 300)]),
}


class AtOnce:
    """Prompts of several candidates on one model, in one forward and one backward pass."""

    def __init__(self, model: PreTrainedModel, setting: Setting) -> None:
        self.candidates = [Ours(model, setting.virtual) for _ in range(setting.candidates)]
        self.backbone: Backbone = self.candidates[0].prompted.backbone

    def step(self, rows: Rows, *, behind: bool) -> None:
        """Give every encoder its gradient, all virtual tokens in front of the text or behind it."""
        asked = []
        for ours in self.candidates:
            batch = collate(
                [row([*ids[:-1], *ours.virtual, ids[-1]] if behind else [*ours.virtual, *ids], 1) for ids, _ in rows], 0
            )
            asked.append(Asked(batch.input_ids, batch.attention_mask, labels=batch.labels))
        for together in one_forward_each(asked, self.backbone):
            candidates = [self.candidates[place] for place in together]
            tables = [ours.prompted.rows() for ours in candidates]
            for ours, table in zip(candidates, tables, strict=True):
                ours.prompted.use(table)
            losses = answer_side_by_side(self.backbone, [asked[place] for place in together])
            (torch.stack(losses).sum() / len(rows)).backward()
            for ours, table in zip(candidates, tables, strict=True):
                ours.prompted.use(table.detach())  # else the next backward pass of others goes through a freed graph
                ours.prompted.encoder.zero_grad()

    def keep(self, rows: Rows) -> None:
        """Run the texts once, as the first epoch does."""
        self.backbone.plans.prepare([ids[:-1] for ids, _ in rows], ContextCache(10**10))

    def close(self) -> None:
        """Leave the model to others."""
        for ours in self.candidates:
            ours.prompted.close()


class Models:
    """The models of the shape that is measured now; those before are let go."""

    def __init__(self) -> None:
        self._shape: Shape | None = None
        self._models: list[PreTrainedModel] = []

    def of(self, shape: Shape) -> list[PreTrainedModel]:
        """Return one for the peer, so that no hook of ours slows it, and one for ptune."""
        if shape != self._shape:
            self._models = []
            gc.collect()  # else those of half a billion would stand beside the others while they are made
            self._models = [shape.model("qwen", torch.float32) for _ in range(2)]
            self._shape = shape
        return self._models


def measured(setting: Setting, models: Models, rounds: int) -> dict[str, Any]:
    """Return for each case the median of its seconds over the rounds, the least and the greatest."""
    rows, (peer, own) = setting.batch(), models.of(setting.shape)
    theirs = Peft(peer, setting.virtual, at_once=setting.rows)

    def one_after_another() -> None:
        for _ in range(setting.candidates):
            theirs.step(rows)

    front, behind = AtOnce(own, setting), AtOnce(own, setting)
    behind.keep(rows)
    cases: dict[str, Step] = {
        "PEFT": one_after_another,
        "in front": partial(front.step, rows, behind=False),
        "behind": partial(behind.step, rows, behind=True),
    }
    seconds = interleaved(cases, rounds)
    front.close()
    behind.close()
    return {
        name: {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
        for name, values in seconds.items()
    }


def machine() -> dict[str, Any]:
    """Return what must be the same for all points of a picture."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), **versions}


def run(axes: Mapping[str, Axis], cells: Cells, rounds: int) -> None:
    """Measure what is missing."""
    models = Models()
    for name, one in axes.items():
        settings = {point: asdict(setting) for point, setting in one.points.items()}
        cells.begin(name, {"points": settings, "machine": machine(), "rounds": rounds})
        for point, setting in one.points.items():
            cells.get(name, point, partial(measured, setting, models, rounds))


def panels(content: Mapping[str, Any], axes: Mapping[str, Axis] = AXES) -> list[Panel]:
    """Return what is stored, a panel an axis and a line a case."""
    found = []
    for name, one in axes.items():
        cells = content["tasks"].get(name, {}).get("cells", {})
        points = [point for point in one.points if point in cells]
        if not points:
            continue
        cases = [case for case in cells[points[0]] if isinstance(cells[points[0]][case], dict)]
        lines = {case: [Point(float(at), **cells[at][case]) for at in points] for case in cases}
        found.append(Panel(one.title, lines))
    return found


def markdown(content: Mapping[str, Any], axes: Mapping[str, Axis] = AXES) -> str:
    """Return the table of the first and the last point of each axis, and the picture beside it."""
    drawn = panels(content, axes)
    if not drawn:
        return ""
    cases = list(drawn[0].lines)
    lines = [["what grows", "from, to", *cases]]
    for panel in drawn:
        ends = [(panel.lines[case][0], panel.lines[case][-1]) for case in cases]
        first, last = ends[0]
        seconds = [f"{one.median:.3f}, {other.median:.3f} (x{other.median / one.median:.1f})" for one, other in ends]
        lines.append([panel.title, f"{first.at:g}, {last.at:g} (x{last.at / first.at:.0f})", *seconds])
    return f"{markdown_table(lines)}\n\n![How the cost of a step grows]({PICTURE.name})"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes; say --output and --picture as well")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print what is stored")
    given = parser.parse_args(arguments)
    if given.quick and (given.output == OUTPUT or given.picture == PICTURE):
        parser.error("--quick needs an --output and a --picture of its own")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; draw the picture; return the exit status."""
    options = _options(arguments)
    axes = QUICK if options.quick else AXES

    def compute(cells: Cells) -> None:
        run({name: axes[name] for name in options.only}, cells, options.rounds)

    def shown(content: Mapping[str, Any]) -> str:
        if drawn := panels(content, axes):
            options.picture.write_text(picture(drawn), encoding="utf-8")
        return markdown(content, axes)

    return tell(options.output, None if options.markdown else compute, shown)


if __name__ == "__main__":
    sys.exit(main())
