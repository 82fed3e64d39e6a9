"""Speed of training: ptune's plans against PEFT's P-tuning, the same encoder, the same rows, the same gradients.

    python benchmarks/train_speed.py [--job classify|instruction] [--family qwen|bloom]
                                     [--size small|half-billion|bloom-1b4] [--rounds 7] [--json FILE]
    python benchmarks/train_speed.py --device cuda --family bloom --size bloom-1b4      on a GPU, all in bfloat16

A row is one optimizer step: forward and backward of all its rows, without the optimizer itself, which costs both the
same. PEFT runs as its tutorials have it, float32, in a bare loop without Trainer's own overhead. Weights are random:
only time is measured. "behind" is a template whose virtual tokens stand behind the text; PEFT can set them in front
only.

Rates of the machine's own matrix products at the model's shapes are measured in the same run, and the products of each
step are counted: "of products" is the share of that rate at which a step's own products come. Tokens a second are the
rows' own, virtual ones and pads left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from peft import PromptEncoderConfig, TaskType, get_peft_model
from timing import interleaved, ratio
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel, Qwen2Config

from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.plans.context_cache import ContextCache
from ptune.prompts.encoder import PromptEncoder
from ptune.rendering.batch import IGNORED, Row, collate

ENCODER_HIDDEN = 1024
VOCABULARY = 46145


@dataclass(frozen=True)
class Shape:
    """Of a model; key-value heads and the width of the MLP are those of Qwen-shaped ones.

    Attributes:
        hidden: H.
        layers: L.
        heads: of attention.
        vocabulary: V.
        shared_heads: heads of keys and values; as many as ``heads`` where absent.
        between: width inside the MLP; four times H where absent.
    """

    hidden: int
    layers: int
    heads: int
    vocabulary: int = VOCABULARY
    shared_heads: int | None = None
    between: int | None = None

    def model(self, family: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
        """Return a random model, the same for the same shape."""
        if family == "bloom":
            config = BloomConfig(
                vocab_size=self.vocabulary, hidden_size=self.hidden, n_layer=self.layers, n_head=self.heads
            )
        else:
            config = Qwen2Config(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.between or 4 * self.hidden,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.shared_heads or self.heads,
                tie_word_embeddings=True,
            )
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(device, dtype).eval()


SMALL = Shape(512, 8, 8)
SHAPES = {
    "small": {"qwen": SMALL, "bloom": SMALL},
    # Qwen2.5-0.5B and bloom-560m
    "half-billion": {"qwen": Shape(896, 24, 14, 151936, 2, 4864), "bloom": Shape(1024, 24, 16, 250880)},
    # Qwen2.5-1.5B and the BLOOM of 1.4 billion parameters that the tutorial trains
    "bloom-1b4": {"qwen": Shape(1536, 28, 12, 151936, 2, 8960), "bloom": Shape(2048, 24, 16, 46145)},
}
"""By size and family."""


def rows_of(job: str, generator: torch.Generator) -> list[tuple[list[int], int]]:
    """Return the rows of one step as ids and how many of the last are supervised.

    ``classify``: 16 texts of 24 to 64 tokens and a label of one. ``instruction``: 8 rows whose lengths are drawn as
    those of the Chinese Alpaca set in BLOOM's tokens: 16 to 80 tokens of instruction, 16 to 176 of answer.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def words(count: int) -> list[int]:
        return torch.randint(10, VOCABULARY, (count,), generator=generator).tolist()

    if job == "classify":
        return [(words(draw(24, 64) + 1), 1) for _ in range(16)]
    lengths = [(draw(16, 80), draw(16, 176)) for _ in range(8)]
    return [(words(asked + answered), answered) for asked, answered in lengths]


class Peft:
    """PEFT's P-tuning in a bare loop."""

    def __init__(self, model: PreTrainedModel, virtual_tokens: int, at_once: int) -> None:
        config = PromptEncoderConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=virtual_tokens,
            encoder_reparameterization_type="MLP",
            encoder_hidden_size=ENCODER_HIDDEN,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(model, config).to(model.device)
        self.device = model.device
        self.at_once = at_once

    def step(self, rows: list[tuple[list[int], int]], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Run forward and backward of all rows, ``at_once`` in a batch, and the optimizer where there is one."""
        for start in range(0, len(rows), self.at_once):
            batch = collate([row(ids, answered) for ids, answered in rows[start : start + self.at_once]], 0)
            ids, mask, labels = (part.to(self.device) for part in (batch.input_ids, batch.attention_mask, batch.labels))
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            (loss / len(rows) * self.at_once).backward()
        if optimizer is not None:
            optimizer.step()
        self.model.zero_grad()


class Ours:
    """ptune's prompted model with PEFT's encoder; several may share one model."""

    def __init__(self, model: PreTrainedModel, virtual_tokens: int) -> None:
        backbone = Backbone(model, None, "random")
        encoder = PromptEncoder.peft("mlp", virtual_tokens, backbone.hidden_size, ENCODER_HIDDEN)
        self.prompted = PromptedModel(backbone, encoder)
        first = self.prompted.first_virtual_id
        self.virtual = list(range(first, first + virtual_tokens))

    def step(self, rows: list[tuple[list[int], int]], *, behind: bool = False) -> None:
        """Run forward and backward of all rows at once; the virtual tokens stand in front of the text or behind it."""
        whole = []
        for ids, answered in rows:
            before = [] if not behind else ids[:-answered]
            whole.append(row([*before, *self.virtual, *ids[len(before) :]], answered))
        batch = collate(whole, 0)
        loss = self.prompted(batch.input_ids, batch.attention_mask, labels=batch.labels)
        (loss / sum(answered for _, answered in rows)).backward()
        self.prompted.encoder.zero_grad()

    def keep(self, rows: list[tuple[list[int], int]]) -> None:
        """Run the texts once, as the first epoch does."""
        self.prompted.backbone.plans.prepare([ids[:-answered] for ids, answered in rows], ContextCache(10**10))


def row(ids: list[int], answered: int) -> Row:
    """Return ids with the last ``answered`` of them supervised."""
    return Row(tuple(ids), (*[IGNORED] * (len(ids) - answered), *ids[-answered:]))


def product_rate(dtype: torch.dtype, tokens: int, hidden: int, device: str = "cpu") -> float:
    """Return the machine's rate of ``[tokens, H] x [H, 4 H]`` products in GFLOP/s, the best of several."""
    left = torch.randn(tokens, hidden, dtype=dtype, device=device)
    right = torch.randn(hidden, 4 * hidden, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        finished(lambda: left @ right, device)
        best = min(best, time.perf_counter() - begun)
    return 2 * tokens * hidden * 4 * hidden / best / 1e9


def finished(work: Callable[[], object], device: str) -> None:
    """Do some work, and wait until a GPU has done it."""
    work()
    if device != "cpu":
        torch.cuda.synchronize()


def products_of(step: Callable[[], None]) -> int:
    """Return the floating-point operations of a step's matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def cases_of(
    job: str, family: str, virtual_tokens: int, rows: list[tuple[list[int], int]], shape: Shape, device: str
) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name; the first is the peer. On a GPU everything is in bfloat16."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    theirs = Peft(shape.model(family, dtypes[0], device), virtual_tokens, at_once=16 if job == "classify" else 1)
    cases: dict[str, Callable[[], None]] = {f"PEFT, {str(dtypes[0])[6:]}": lambda: theirs.step(rows)}
    for dtype in dtypes:
        model, name = shape.model(family, dtype, device), str(dtype)[6:]  # not PEFT's: no hook slows it
        ours, kept = Ours(model, virtual_tokens), Ours(model, virtual_tokens)
        kept.keep(rows)
        cases[f"in front, {name}"] = partial(ours.step, rows)
        if dtype is dtypes[0]:
            cases[f"behind, first epoch, {name}"] = partial(ours.step, rows, behind=True)
        cases[f"behind, later epochs, {name}"] = partial(kept.step, rows, behind=True)
    return {name: partial(finished, case, device) for name, case in cases.items()}


def measure(
    job: str, family: str, virtual_tokens: int, rounds: int, size: str = "small", device: str = "cpu"
) -> dict[str, object]:
    """Return one table of the benchmark."""
    rows = rows_of(job, torch.Generator().manual_seed(1))
    tokens = sum(len(ids) for ids, _ in rows)
    shape = SHAPES[size][family]
    cases = cases_of(job, family, virtual_tokens, rows, shape, device)
    seconds = interleaved(cases, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    dtypes = {name.rpartition(" ")[2] for name in cases}
    rates = {name: product_rate(getattr(torch, name), tokens, shape.hidden, device) for name in sorted(dtypes)[::-1]}
    counts = {name: products_of(case) for name, case in cases.items()}
    peer = next(iter(cases))
    return {
        "job": job,
        "family": family,
        "size": size,
        "virtual_tokens": virtual_tokens,
        "rows": len(rows),
        "text_tokens": tokens,
        "gflops": rates,
        "seconds": medians,
        "ratio": {name: ratio(seconds, name, peer) for name in cases},
        "of_products": {name: counts[name] / 1e9 / medians[name] / rates[name.rpartition(" ")[2]] for name in cases},
    }


def markdown(tables: list[dict[str, object]]) -> str:
    """Return the tables as Markdown."""
    lines = []
    for table in tables:
        rates = ", ".join(f"{rate:.0f} GFLOP/s {name}" for name, rate in table["gflops"].items())
        lines += [
            "",
            f"**{table['job']}**, {table['family']}-shaped, {table['size']}, {table['virtual_tokens']} virtual tokens, "
            f"{table['rows']} rows of {table['text_tokens']} text tokens together; matrix products here: {rates}",
            "",
            "| virtual tokens | seconds a step | tokens a second | times PEFT | over the rounds | of products |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, seconds in table["seconds"].items():
            median, least, greatest = table["ratio"][name]
            share = table["of_products"][name]
            rate = table["text_tokens"] / seconds
            lines.append(
                f"| {name} | {seconds:.3f} | {rate:,.0f} | {median:.1f} | {least:.1f} to {greatest:.1f} | {share:.0%} |"
            )
    return "\n".join(lines[1:])


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=["classify", "instruction"], action="append")
    parser.add_argument("--family", choices=["qwen", "bloom"], action="append")
    parser.add_argument(
        "--size",
        choices=SHAPES,
        default="small",
        help="half-billion takes 12 GB of memory, and minutes; bloom-1b4 is for GPUs",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tables = []
    for job in arguments.job or ["classify", "instruction"]:
        for family in arguments.family or ["qwen", "bloom"]:
            for virtual_tokens in (10, 100) if job == "classify" else (10,):
                tables.append(measure(job, family, virtual_tokens, arguments.rounds, arguments.size, arguments.device))
                print(markdown(tables[-1:]), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    print(f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"versions": versions, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
