"""How a run's batches will be carried out and why, found out from the ids alone, before anything is trained.

Knows learners, plans and backbones; runs one token through the model, to see what a context costs. Shapes: B batch, T
tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ptune.config.run import TrainingConfig
from ptune.models.backbone import Backbone
from ptune.plans.choosing import long_enough
from ptune.plans.openings import context_of, padding_share
from ptune.prompts.keys_and_values import read_cache
from ptune.tasks.side_by_side import one_forward_each, stacked_rows
from ptune.training.kept_contexts import rows_to_keep
from ptune.training.learner import Learner

_STEPS = 50
"""Steps that are looked at: enough for a mean, few enough to be quick."""


@dataclass(frozen=True)
class Explanation:
    """What is known of a run before it begins.

    Attributes:
        plans: name and reason of each plan -> forwards that go by it, the most frequent first.
        steps: how many steps were looked at.
        total_steps: of the run.
        padding: mean share of padding in a batch as it stands.
        tokens: that the layers compute in a step, mean.
        reference_tokens: that they would compute by the plain forward pass, mean.
        contexts: distinct texts before the virtual tokens; 0 where none is kept.
        context_bytes: what their keys and values come to.
        kept_share: how much of them there is room for.
    """

    plans: dict[tuple[str, str], int]
    steps: int
    total_steps: int
    padding: float
    tokens: float
    reference_tokens: float
    contexts: int
    context_bytes: int
    kept_share: float


def explain(learners: Sequence[Learner]) -> Explanation:
    """Look at the first steps of runs that are trained together, or of one, on one backbone.

    Args:
        learners: at their start; nothing of them changes.
    """
    first = learners[0]
    backbone, schedule = first.prompted.backbone, first.schedule
    backbone.plan = first.settings.plan
    if first.settings.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    for learner in learners:
        learner.prompted.eval()
        learner.prompted.use()  # plans ask what the ids mean
    contexts = _contexts(learners, backbone)
    size = sum(map(len, contexts)) * _bytes_per_token(backbone, first.settings) if contexts else 0
    room = first.settings.context_cache_bytes + first.settings.context_cache_disk_bytes
    kept_share = min(1.0, room / size) if size else 0.0
    plans: Counter[tuple[str, str]] = Counter()
    tokens = reference = padding = 0.0
    forwards = 0
    steps = min(_STEPS, schedule.total_steps)
    for step in range(steps):
        queues = [learner.forwards(learner.schedule.window(step)) for learner in learners]
        for number in range(max(map(len, queues))):
            asked = [
                learner.task.asks(queue[number], backbone.tokenizer.pad_token_id)
                for learner, queue in zip(learners, queues, strict=True)
                if number < len(queue)
            ]
            kept = kept_share == 1
            for together in one_forward_each(asked, backbone, first.settings.max_tokens_per_batch, kept=kept):
                ids, mask, positions = stacked_rows([asked[place] for place in together], backbone.kind)
                forwards += 1
                padding += padding_share(mask)
                reference += ids.numel()
                choice = backbone.choose(ids, mask, positions)
                plans[choice.plan, choice.why] += 1
                tokens += choice.tokens - kept_share * choice.context_tokens
    return Explanation(
        plans=_by_name(plans),
        steps=steps,
        total_steps=schedule.total_steps,
        padding=padding / forwards,
        tokens=tokens / steps,
        reference_tokens=reference / steps,
        contexts=len(contexts),
        context_bytes=size,
        kept_share=kept_share,
    )


def _by_name(plans: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Return each plan with the reason that it was given most often, for reasons hold numbers that differ."""
    reasons: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for (plan, why), count in plans.most_common():
        reasons.setdefault(plan, why)
        counts[plan] += count
    return {(plan, reasons[plan]): count for plan, count in counts.most_common()}


def _contexts(learners: Sequence[Learner], backbone: Backbone) -> list[tuple[int, ...]]:
    """Return the texts that a run would keep: none where nothing reads them again."""
    if learners[0].prompted.deep is not None:
        return []
    rows = {ids for part in rows_to_keep(learners) for ids in part}
    planned = [ids for ids in rows if backbone.hindrance(len(ids)) is None]
    contexts = {context_of(ids, backbone.vocabulary_size) for ids in planned} - {()}
    return sorted(contexts) if long_enough(list(contexts)) else []


def _bytes_per_token(backbone: Backbone, settings: TrainingConfig) -> int:
    ids = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
    with torch.no_grad():
        past = backbone.model(**backbone.inputs(ids, torch.ones_like(ids)), use_cache=True).past_key_values
    dtype = torch.bfloat16 if settings.context_cache_dtype == "bfloat16" else backbone.dtype
    return sum(half.numel() * dtype.itemsize for pair in read_cache(past) for half in pair)
