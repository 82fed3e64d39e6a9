"""Text before the virtual tokens of a run's records, run once where it will be read again and again.

Knows learners and backbones, and nothing of loops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptune.config.run import TrainingConfig
from ptune.errors import ConfigError
from ptune.models.backbone import Backbone
from ptune.plans.context_cache import ContextCache
from ptune.plans.context_store import ContextStore
from ptune.pretrained.fingerprint import exact_key
from ptune.training.learner import Learner
from ptune.training.reporting import Reporter

_LOW_SHARE = 0.5
"""Share of the contexts below which it is said that few are kept."""


def keep_contexts(learners: Sequence[Learner], reporter: Reporter) -> None:
    """Keep what stands before virtual tokens in the rows of some learners on one backbone, and tell."""
    first = learners[0]
    settings, backbone = first.settings, first.prompted.backbone
    again = reads_again(first)
    store = _store(backbone, settings) if again else None
    dtype = torch.bfloat16 if settings.context_cache_dtype == "bfloat16" else None
    kept = ContextCache(settings.context_cache_bytes, store, dtype)
    for rows in rows_to_keep(learners):
        backbone.keep_contexts(rows, kept)
    if len(kept):
        reporter.kept_contexts(len(kept), kept.bytes, full=kept.full)
    if store is not None and store.mistake is not None:
        reporter.warned(
            f"contexts cannot be kept on disk: {store.mistake}; mend it, or set PTUNE_CACHE to another folder"
        )
    if settings.context_cache_bytes and kept.wanted and len(kept) < _LOW_SHARE * kept.wanted:
        reporter.warned(_few(kept, settings))


def reads_again(learner: Learner) -> bool:
    """Whether a run's records are read more than once, in it or by a later run from the disk."""
    schedule = learner.schedule
    return schedule.total_steps > schedule.steps_per_epoch or learner.settings.context_cache_disk_bytes > 0


def rows_to_keep(learners: Sequence[Learner]) -> list[list[tuple[int, ...]]]:
    """Return the rows that are read again and again: those of training, and behind them those of dev.

    Several learners evaluate dev several times at each evaluation; one reads training's alone.
    """
    train = [row.ids for learner in learners for example in learner.parts.train for row in example.rows]
    return [train if reads_again(learners[0]) else [], _dev_rows(learners) if len(learners) > 1 else []]


def _dev_rows(learners: Sequence[Learner]) -> list[tuple[int, ...]]:
    return [
        row.ids
        for learner in learners
        for record in learner.parts.dev
        if (example := learner.task.example(record)) is not None
        for row in example.rows
    ]


def check_store(backbone: Backbone, settings: TrainingConfig) -> None:
    """See that contexts can be kept where the settings say.

    Raises:
        ConfigError: on disk, for a quantised model.
    """
    if settings.context_cache_disk_bytes and getattr(backbone.model, "is_quantized", False):
        raise ConfigError(
            "training.context_cache_disk does not go with a quantised model, whose weights have no exact name; "
            "leave it out"
        )


def _store(backbone: Backbone, settings: TrainingConfig) -> ContextStore | None:
    if not settings.context_cache_disk_bytes:
        return None
    dtype = "bfloat16" if settings.context_cache_dtype == "bfloat16" else str(backbone.dtype).removeprefix("torch.")
    family = f"{type(backbone.model).__module__}.{type(backbone.model).__qualname__}"
    key = exact_key(family, backbone.model.config, backbone.model.state_dict())
    return ContextStore(key, settings.context_cache_disk_bytes, name=backbone.name, dtype=dtype)


def _few(kept: ContextCache, settings: TrainingConfig) -> str:
    """Return what to say where most contexts are not kept."""
    enough = f", to about {_written(kept.bytes * kept.wanted_tokens / kept.kept_tokens)}" if kept.kept_tokens else ""
    return (
        f"only {len(kept):,} of {kept.wanted:,} texts before the virtual tokens fit into training.context_cache "
        f"({settings.context_cache}), and the others are run in every epoch: raise it{enough}, or give "
        "training.context_cache_disk room on disk"
    )


def _written(size: float) -> str:
    """Return a size as settings have it, rounded up."""
    return f"{int(size / 1e9) + 1}GB" if size >= 1e9 else f"{int(size / 1e6) + 1}MB"
