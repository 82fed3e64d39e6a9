"""Pretrain `ptune-mini`, from the text to the folder that ptune ships, or `mini-mlm`, its masked sibling.

    torchrun --nproc-per-node 2 recipes/pretrain_mini.py --data DIR --output DIR      two processes, one thread each
    python recipes/pretrain_mini.py --data DIR --output DIR                           one process
    python recipes/pretrain_mini.py --kind masked --data DIR --output DIR             mini-mlm

`--data` holds a folder per source (see `corpus.py`). `--output` gets `corpus/` (tokenizer and streams of tokens),
`checkpoint-STEP/` (the newest only), `training.jsonl` (losses) and at the end `model/`. Started again with the same
options, a stopped training goes on from its checkpoint, and a finished one does nothing.

Three things make the little time count. The first half of the layers learn alone, at half the cost; the others join
later, adding nothing at first. The matrices learn by Muon. And the rates fall to zero while the text is of the kind
that the model is for, after the mixed text was learned at full rates.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from corpus import prepare, training_rows
from kinds import learner
from muon import Muon
from tokenizers import Tokenizer
from torch import Tensor

from ptune.errors import ConfigError, PtuneError, TrainingError
from ptune.files import (
    folder_lock,
    read_json,
    read_tensors,
    remove_leftovers,
    write_atomically,
    write_json,
    write_tensors,
)

ROW_LENGTH = 320  # tokens
ROWS_PER_STEP = 32  # of all processes together
ALL_LAYERS_FROM = 0.40  # of the steps
REVIEW_FROM = 0.55  # of the steps: the review stream begins, and the rates begin to fall
MUON_RATE, MUON_WEIGHT_DECAY = 0.02, 0.02
ADAM_RATE, ADAM_BETAS = 3e-3, (0.9, 0.95)
WARM_UP_STEPS = 100
SAVE_EVERY, REPORT_EVERY = 100, 10  # steps


def rate_factor(step: int, steps: int) -> float:
    """What the rates are multiplied by at a step: up during the warm-up, then 1, then down to zero in a line."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm_up * min(1.0, (1 - step / steps) / (1 - REVIEW_FROM))


@dataclass(frozen=True)
class Progress:
    """How far a training is; with the seed and the steps it fixes everything that is still to come."""

    kind: str
    seed: int
    steps: int
    step: int = 0
    seconds: float = 0.0

    @property
    def options(self) -> str:
        """What it was asked for, as on the command line."""
        return f"--kind {self.kind} --seed {self.seed} --steps {self.steps}"


class Pretraining:
    """The model, its two optimizers and the text; one in each process."""

    def __init__(self, corpus: Path, progress: Progress) -> None:
        torch.manual_seed(progress.seed)
        self.corpus = corpus
        self.progress = progress
        self.trained_tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
        self.learner = learner(progress.kind, self.trained_tokenizer)
        named = dict(self.learner.model.named_parameters())
        self.matrices = {name: each for name, each in named.items() if each.ndim == 2 and "embed" not in name}
        self.others = {name: each for name, each in named.items() if name not in self.matrices}
        self.muon = Muon(list(self.matrices.values()), MUON_WEIGHT_DECAY)
        self.adam = torch.optim.AdamW(self.others.values(), ADAM_RATE, ADAM_BETAS, weight_decay=0.0)

    def tensors(self) -> dict[str, Tensor]:
        """All that learning has changed, by name."""
        found = {f"model/{name}": each for name, each in (self.matrices | self.others).items()}
        found |= {f"muon/{name}": each for name, each in zip(self.matrices, self.muon.momenta, strict=True)}
        for name, parameter in self.others.items():
            found |= {f"adam/{key}/{name}": each for key, each in self.adam.state[parameter].items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        with torch.no_grad():
            for name, parameter in (self.matrices | self.others).items():
                parameter.copy_(tensors[f"model/{name}"])
        self.muon.momenta = [tensors[f"muon/{name}"] for name in self.matrices]
        for name, parameter in self.others.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[parameter] = {key: tensors[f"adam/{key}/{name}"] for key in keys}

    def run(self) -> Iterator[tuple[Progress, float]]:
        """Train to the end; after each step give how far it is and the loss, per token, of this process's rows."""
        self._phase: tuple[bool, bool] | None = None
        started = time.monotonic() - self.progress.seconds
        for step in range(self.progress.step, self.progress.steps):
            self._enter_phase(step)
            loss = self._step(step)
            seconds = time.monotonic() - started
            self.progress = replace(self.progress, step=step + 1, seconds=seconds)
            yield self.progress, loss
        self.learner.use_layers(len(self.learner.layers))

    def _enter_phase(self, step: int) -> None:
        """At its first step and wherever the schedule says, choose the layers and the stream of this step."""
        seed, steps = self.progress.seed, self.progress.steps
        phase = step >= ALL_LAYERS_FROM * steps, step >= REVIEW_FROM * steps
        if phase == self._phase:
            return
        self._phase = phase
        all_layers, review = phase
        self.learner.use_layers(len(self.learner.layers) if all_layers else self.learner.first_layers)
        torch.compiler.reset()
        self._trunk = torch.compile(self.learner.trunk)
        tokens = np.load(self.corpus / ("review.npy" if review else "train.npy"))
        since = math.ceil(REVIEW_FROM * steps) if review else 0  # the step at which this stream began
        rows = training_rows(tokens, ROW_LENGTH, seed + (100 if review else 1))
        self._rows = islice(rows, (step - since) * ROWS_PER_STEP, None)

    def _step(self, step: int) -> float:
        rows = np.stack(list(islice(self._rows, ROWS_PER_STEP)))[dist.get_rank() :: dist.get_world_size()]
        rng = np.random.default_rng([self.progress.seed, step, dist.get_rank()])
        loss = self.learner.loss(self._trunk, torch.from_numpy(rows.astype(np.int64)), rng)
        loss.backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.others.values(), 1.0)
        factor = rate_factor(step, self.progress.steps)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * factor
        self.muon.step(MUON_RATE * factor, momentum=min(0.95, 0.85 + 0.1 * step / 300))
        self.adam.step()
        self.learner.model.zero_grad()
        return loss.item()

    def _share_gradients(self) -> None:
        """Average the gradients over the processes, in one message; layers that have not joined yet count as zero."""
        parameters = [*self.matrices.values(), *self.others.values()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, part in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def save_checkpoint(output: Path, pretraining: Pretraining) -> None:
    """Write a whole checkpoint, then remove the older ones."""
    progress = pretraining.progress

    def write(folder: Path) -> None:
        write_tensors(folder / "state.safetensors", pretraining.tensors())
        write_json(folder / "progress.json", asdict(progress))

    newest = output / f"checkpoint-{progress.step:06}"
    write_atomically(newest, write)
    for folder in checkpoints(output):
        if folder != newest:
            shutil.rmtree(folder)


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(output.glob("checkpoint-*"))


def resumed(output: Path, start: Progress) -> Pretraining:
    """The training where it was left, or at its `start`.

    Raises:
        ConfigError: the checkpoint is of another kind, seed or number of steps.
        TrainingError: the checkpoint cannot be read.
    """
    found = checkpoints(output)
    if not found:
        return Pretraining(output / "corpus", start)
    progress = Progress(**read_json(found[-1] / "progress.json", TrainingError))
    if progress.options != start.options:
        raise ConfigError(
            f"{found[-1]} is of {progress.options}, not of {start.options}; give its options or another --output"
        )
    pretraining = Pretraining(output / "corpus", progress)
    pretraining.load(read_tensors(found[-1] / "state.safetensors", TrainingError))
    return pretraining


def export(pretraining: Pretraining, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer as transformers loads them."""
    pretraining.learner.trim(ROW_LENGTH)
    model = pretraining.learner.model.to(torch.bfloat16)
    tokenizer = pretraining.learner.tokenizer(pretraining.trained_tokenizer)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    write_atomically(folder, write)


def pretrain(data: Path, output: Path, start: Progress) -> None:
    """Train in this process, which may be one of several; the first of them writes the files."""
    first = dist.get_rank() == 0
    if first:
        remove_leftovers(output)
    if first and not (output / "corpus").exists():
        print(f"reading {data}", flush=True)
        write_atomically(output / "corpus", lambda folder: prepare(data, folder, start.seed))
    dist.barrier()
    pretraining = resumed(output, start)
    dist.barrier()  # no process may still be reading the checkpoint that the first replaces
    for progress, loss in pretraining.run():
        if first and progress.step % REPORT_EVERY == 0:
            report(output / "training.jsonl", progress, loss)
        if first and (progress.step % SAVE_EVERY == 0 or progress.step == start.steps):
            save_checkpoint(output, pretraining)
    if first:
        export(pretraining, output / "model")


def report(log: Path, progress: Progress, loss: float) -> None:
    """Print a line and add it to the log."""
    line = json.dumps({"step": progress.step, "loss": round(loss, 4), "seconds": round(progress.seconds)})
    print(line, flush=True)
    with log.open("a", encoding="utf-8") as lines:
        lines.write(line + "\n")


def main() -> int:
    """Read the options, train, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per source")
    parser.add_argument("--output", type=Path, required=True, help="folder for the corpus, checkpoints and model")
    parser.add_argument("--kind", choices=("causal", "masked"), default="causal")
    parser.add_argument("--steps", type=int, default=2400, help="of 10,240 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.output / "model").exists():
        print(f"{options.output / 'model'} is there already")
        return 0
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if ROWS_PER_STEP % dist.get_world_size():
        parser.error(f"{ROWS_PER_STEP} rows a step cannot be shared evenly by {dist.get_world_size()} processes")
    try:
        with folder_lock(options.output) if dist.get_rank() == 0 else nullcontext():
            pretrain(options.data, options.output, Progress(options.kind, options.seed, options.steps))
    except PtuneError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
