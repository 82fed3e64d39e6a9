"""The whole state of a run in one safetensors file, so that it goes on where it stopped, to the last bit.

One file, replaced atomically: after a kill at any moment there is a complete checkpoint or none, never half of one.
What is no tensor stands as JSON in the file's metadata; nothing is ever pickled. Knows nothing of how a run is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from ptune.errors import ConfigError, TrainingError
from ptune.files import read_tensors, write_tensors

_FORMAT_VERSION = 1
_OTHERS = ("optimizer.", "best_", "random.")
"""How tensors are called that are no part of what is trained."""


@dataclass
class Progress:
    """How far a run has come: the part of its state that is no tensor.

    Attributes:
        step: optimizer steps done.
        best_metric: the best value so far of the task's metric on dev.
        best_step: where it was reached, with the least loss.
        evaluations_without_gain: for early stopping.
        history: one entry an evaluation: step and metrics.
        seconds: time spent training, over all resumptions.
    """

    step: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def best_loss(self) -> float:
        """The loss on dev at the best step; there must have been an evaluation."""
        return next(entry["loss"] for entry in self.history if entry["step"] == self.best_step)


def save_checkpoint(
    path: Path,
    *,
    trained: torch.nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    best: dict[str, Tensor],
    random_state: dict[str, Tensor],
    origin: Mapping[str, str],
) -> None:
    """Write everything that the rest of the run depends on.

    Args:
        path: the file; an older checkpoint there is replaced in one step.
        trained: the prompt encoder, with a linear head where there is one.
        optimizer: over their parameters.
        progress: counters and history.
        best: what the soft prompt of the best evaluation holds, ``rows`` of shape [P, H] and a head's tensors; empty
            before the first.
        random_state: from `random_state` at the last step's end.
        origin: what the run learns from and on, each as a hash: name -> hash.

    Raises:
        OutputError: the disk is full or the folder cannot be written; the older checkpoint is still there.
    """
    state = optimizer.state_dict()
    tensors = dict(trained.state_dict())
    for index, entries in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    tensors |= {f"random.{name}": value for name, value in random_state.items()}
    tensors |= {f"best_{name}": value for name, value in best.items()}
    metadata = {
        "format_version": str(_FORMAT_VERSION),
        "progress": json.dumps(vars(progress)),
        "param_groups": json.dumps(state["param_groups"]),
        "origin": json.dumps(dict(origin)),
    }
    write_tensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def load_checkpoint(
    path: Path, *, trained: torch.nn.Module, optimizer: Optimizer, origin: Mapping[str, str]
) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    """Put the state of `save_checkpoint` where it came from; return progress, the best tensors and random state.

    Tensors are of any shape, as they were saved.

    Raises:
        ConfigError: the run began with another origin: other records, or another model.
        TrainingError: the file is damaged, is of another ptune's form, or was written by a run with another encoder or
            head.
    """
    tensors = read_tensors(path, TrainingError)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    progress = _progress(path, metadata)
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            optimizer_state.setdefault(int(index), {})[entry] = tensor
    _check_origin(metadata, origin)
    try:
        trained.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(_OTHERS)})
        groups: list[dict[str, Any]] = json.loads(metadata["param_groups"])
        for group in groups:
            group["betas"] = tuple(group["betas"])  # JSON knows no tuples
        optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f'checkpoint "{path}" belongs to a run with other settings; start anew with --overwrite'
        ) from error
    return progress, _below(tensors, "best_"), _below(tensors, "random.")


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's random generators, of every device that is in use: uint8 of shape [bytes]."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set what `random_state` returned: one state of shape [bytes] a generator."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _progress(path: Path, metadata: Mapping[str, str]) -> Progress:
    """Return how far the run had come.

    Raises:
        TrainingError: the checkpoint is of a form that this ptune does not read, or is none.
    """
    version = metadata.get("format_version", "1")  # what was written before it was named is of the same form
    if version != str(_FORMAT_VERSION):
        raise TrainingError(
            f'checkpoint "{path}" is of format_version {version}, and this ptune reads {_FORMAT_VERSION}; go on with '
            "the ptune that wrote it, or upgrade this one by pip install -U ptune"
        )
    known = {one.name for one in fields(Progress)}
    try:
        values = dict(json.loads(metadata["progress"]))
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f'checkpoint "{path}" is damaged: it does not say how far the run had come') from error
    if values.keys() != known:
        others = ", ".join(sorted(values.keys() ^ known))
        raise TrainingError(
            f'checkpoint "{path}" differs in its progress from what this ptune writes ({others}); go on with the ptune '
            "that wrote it"
        )
    return Progress(**values)


def _check_origin(metadata: Mapping[str, str], origin: Mapping[str, str]) -> None:
    began_with = json.loads(metadata.get("origin", "{}"))
    changed = [name for name, value in origin.items() if began_with.get(name, value) != value]
    if changed:
        raise ConfigError(
            f"a resumed run goes on with what it began with, and {' and '.join(changed)} changed since; "
            "bring back what it had, or begin anew with --overwrite"
        )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
