"""From which width on is bfloat16 faster than float32 on this machine?

    python benchmarks/dtype_speed.py [--rounds 7] [--width 64 128 256 512]

Random models, both dtypes in turns in one process: a training step of both jobs of `train_speed.py` with ten virtual
tokens in front, and behind texts that are kept; the same rows scored as an engine does; texts of 32 tokens written by
an engine, one and eight at once. Printed are float32's seconds over bfloat16's: above 1, bfloat16 is faster. The
default of ``model.dtype`` follows this table (`ptune.pretrained.precision`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from engine_models import Size, tokenizer_of
from tables import markdown_table
from timing import interleaved, ratio
from train_speed import Ours, Shape, row, rows_of

from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.rendering.batch import collate

SHAPES = {
    width: Shape(width, layers, heads)
    for width, layers, heads in ((64, 4, 4), (128, 4, 4), (256, 6, 4), (320, 7, 5), (512, 8, 8), (768, 6, 12))
}
DTYPES = (torch.float32, torch.bfloat16)
NEW_TOKENS = 32
Cases = dict[str, Callable[[], object]]


def score(ours: Ours, rows: list[tuple[list[int], int]]) -> None:
    """Score rows without gradient."""
    whole = [row([*ours.virtual, *ids], answered) for ids, answered in rows]
    batch = collate(whole, 0)
    ours.prompted.eval()
    with torch.no_grad():
        ours.prompted(batch.input_ids, batch.attention_mask, labels=batch.labels)
    ours.prompted.train()


def cases_of(shape: Shape, family: str, dtype: torch.dtype) -> Cases:
    """Return what is timed, by name."""
    cases: Cases = {}
    model = shape.model(family, dtype)
    for job in ("classify", "instruction"):
        rows = rows_of(job, torch.Generator().manual_seed(1))
        front, behind = Ours(model, 10), Ours(model, 10)
        behind.keep(rows)
        cases[f"{job}, in front"] = lambda ours=front, rows=rows: ours.step(rows)
        cases[f"{job}, behind"] = lambda ours=behind, rows=rows: ours.step(rows, behind=True)
        cases[f"{job}, scored"] = lambda ours=front, rows=rows: score(ours, rows)
    tokenizer = tokenizer_of(Size(shape.hidden, shape.layers, shape.vocabulary))
    backbone = Backbone(model, tokenizer, "random")
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    for count in (1, 8):
        texts = [[10 + number + place for place in range(32)] for number in range(count)]
        cases[f"{count} written"] = lambda texts=texts: generate(
            backbone, texts, options, go_on=lambda _, length: length < NEW_TOKENS
        )
    return cases


def measure(shape: Shape, family: str, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return how many times faster bfloat16 is in each case: median, least and greatest over the rounds."""
    full, half = (cases_of(shape, family, dtype) for dtype in DTYPES)
    cases = {
        f"{dtype} {name}": case for dtype, own in zip(DTYPES, (full, half), strict=True) for name, case in own.items()
    }
    seconds = interleaved(cases, rounds)
    return {name: ratio(seconds, f"{torch.bfloat16} {name}", f"{torch.float32} {name}") for name in full}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--family", nargs="+", choices=["qwen", "bloom"], default=["qwen", "bloom"])
    arguments = parser.parse_args()
    lines: list[list[str]] = []
    for width in arguments.width:
        for family in arguments.family:
            found = measure(SHAPES[width], family, arguments.rounds)
            lines = lines or [["width", *found]]
            shown = [f"{median:.1f} ({least:.1f}-{greatest:.1f})" for median, least, greatest in found.values()]
            lines.append([f"{width}, {family}", *shown])
            print(markdown_table([lines[0], lines[-1]]).splitlines()[-1], flush=True)
    print("\n" + markdown_table(lines))


if __name__ == "__main__":
    main()
