"""`ptune train --explain` and `ptune search --explain`: how batches would be carried out, without training."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptune.config.candidates import SearchConfig
    from ptune.config.run import ModelConfig, RunConfig
    from ptune.models.backbone import Backbone


def explain_run(config: RunConfig) -> None:
    """Print what is known of a run before it begins; nothing is written."""
    _explain([config])


def explain_search(config: RunConfig, settings: SearchConfig) -> None:
    """Print what is known of a search before it begins; nothing is written."""
    from ptune.config.candidates import candidates_of
    from ptune.training.search import check_searchable

    candidates = candidates_of(config, settings)
    check_searchable(config)
    _explain([candidate.config for candidate in candidates])


def _precision(settings: ModelConfig, backbone: Backbone) -> str:
    """Return a line on the dtype of the backbone and why it has that one."""
    from ptune.pretrained.precision import precision_for

    why = precision_for(settings.dtype, backbone.device, backbone.model.config.get_text_config().hidden_size).why
    rounded = f", weights of {settings.quantization}" if isinstance(settings.quantization, str) else ""
    return f"backbone: {str(backbone.dtype).removeprefix('torch.')} ({why}){rounded}"


def _explain(configs: list[RunConfig]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from ptune.models.backbone import Backbone
    from ptune.training.assembly import assemble, train_and_dev_records
    from ptune.training.checkpoint import random_state, set_random_state
    from ptune.training.explanation import explain
    from ptune.training.learner import Learner

    records = train_and_dev_records(configs[0])
    backbone, before = Backbone.load(configs[0].model), random_state()
    with ExitStack() as stack:
        stack.callback(set_random_state, before)
        stack.enter_context(backbone.left_as_it_was())
        learners = []
        for config in configs:
            parts = assemble(config, backbone, records)
            stack.enter_context(parts.prompted)
            learners.append(Learner(config, parts))
        found = explain(learners)
    console = Console(highlight=False, soft_wrap=True)
    together = f", {len(configs)} candidates at once" if len(configs) > 1 else ""
    console.print(f"{found.steps:,} of {found.total_steps:,} steps looked at{together}")
    console.print(_precision(configs[0].model, backbone))
    forwards = sum(found.plans.values())
    for (plan, why), count in found.plans.items():
        console.print(f"plan: [bold]{plan}[/] for {count / forwards:.0%} of forwards ({escape(why)})")
    console.print(f"padding in batches as they stand: {found.padding:.0%}")
    share = found.tokens / found.reference_tokens
    console.print(
        f"tokens a step: {found.tokens:,.0f} in place of {found.reference_tokens:,.0f} by the plain pass ({share:.0%})"
    )
    if found.contexts:
        room = "all of it fits" if found.kept_share == 1 else f"{found.kept_share:.0%} of it fits"
        console.print(
            f"text before the virtual tokens: {found.contexts:,} texts, {found.context_bytes / 1e6:,.1f} MB of keys "
            f"and values; {room} into training.context_cache ({configs[0].training.context_cache})"
        )
    console.print("nothing was trained; leave --explain out to begin")
