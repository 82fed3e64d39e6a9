"""Peak memory of a training step above the model: ptune against PEFT's P-tuning, a fresh process each.

    python benchmarks/train_memory.py [--family qwen|bloom] [--size small|half-billion] [--rounds 3] [--json FILE]

The instruction job of `train_speed.py`: eight rows of its lengths, ten virtual tokens, PEFT's encoder, loss and
gradients. Counted is the highest resident memory (Linux's VmHWM, set back once the model is loaded and has run a word)
less what was resident then. PEFT runs its eight rows as one padded batch, or one by one as the tutorial does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from train_speed import SHAPES, Ours, Peft, Shape, rows_of

Rows = list[tuple[list[int], int]]


Step = Callable[[Rows], None]


def _peft(at_once: int) -> Callable[[Shape, str], Step]:
    return lambda shape, family: Peft(shape.model(family, torch.float32), 10, at_once).step


def _ours(dtype: torch.dtype, at_once: int) -> Callable[[Shape, str], Step]:
    def made(shape: Shape, family: str) -> Step:
        ours = Ours(shape.model(family, dtype), 10)

        def step(rows: Rows) -> None:
            for start in range(0, len(rows), at_once):
                ours.step(rows[start : start + at_once])

        return step

    return made


CASES: dict[str, Callable[[Shape, str], Step]] = {
    "PEFT, 8 rows padded": _peft(8),
    "ptune, 8 rows": _ours(torch.float32, 8),
    "ptune, 8 rows, bfloat16": _ours(torch.bfloat16, 8),
    "PEFT, row by row": _peft(1),
    "ptune, row by row": _ours(torch.float32, 1),
}


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}; this benchmark runs on Linux")


def measure(case: str, size: str, family: str) -> int:
    """Return the peak of one case in this process, in bytes above the loaded model."""
    step = CASES[case](SHAPES[size][family], family)
    step([([11, 12, 13], 1)])
    rows = rows_of("instruction", torch.Generator().manual_seed(1))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(rows)
    return resident("VmHWM") - before


def main() -> None:
    """Run every case in processes of its own and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=["qwen", "bloom"], action="append")
    parser.add_argument("--size", choices=SHAPES, default="small", help="half-billion takes 12 GB of memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help="measure this one here and print its bytes")
    arguments = parser.parse_args()
    families = arguments.family or ["qwen", "bloom"]
    if arguments.case:
        print(measure(arguments.case, arguments.size, families[0]))
        return
    found: dict[str, dict[str, list[int]]] = {family: {case: [] for case in CASES} for family in families}
    for _ in range(arguments.rounds):
        for family in families:
            for case in CASES:
                command = [sys.executable, __file__, "--family", family, "--size", arguments.size, "--case", case]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[family][case].append(int(output.split()[-1]))
    for family, cases in found.items():
        print(f"**instruction**, {family}-shaped, {arguments.size}, peak above the model\n")
        print("| | MB | of PEFT's 8 rows |\n| --- | ---: | ---: |")
        peer = statistics.median(cases["PEFT, 8 rows padded"])
        for case, values in cases.items():
            print(f"| {case} | {statistics.median(values) / 1e6:.0f} | {statistics.median(values) / peer:.0%} |")
        print()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
