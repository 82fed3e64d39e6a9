"""Which task its settings describe. Adding one touches a file of its own, its settings and the registry below.

Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ptune.config.run import Overlong
from ptune.config.settings import Settings
from ptune.config.task import (
    ChoiceConfig,
    ClassificationConfig,
    ExtractionConfig,
    GenerationConfig,
    LinearClassificationConfig,
    TaggingConfig,
    check_task_template,
)
from ptune.models.backbone import Backbone
from ptune.prompts.linear_head import LinearHead, head_from, head_tensors
from ptune.rendering.renderer import Renderer
from ptune.tasks.choice import Choice
from ptune.tasks.classification import Classification
from ptune.tasks.extraction import Extraction
from ptune.tasks.generation import Generation
from ptune.tasks.linear_classification import learnt_labels, linear_classification
from ptune.tasks.scoring import ScoringTask
from ptune.tasks.tagging import Tagging, learnt_tags
from ptune.tasks.task import Task
from ptune.template import Template

_TASKS: dict[type[Settings], Callable[[Any, Renderer], Task]] = {
    ClassificationConfig: Classification,
    LinearClassificationConfig: linear_classification,
    ChoiceConfig: Choice,
    TaggingConfig: Tagging,
    GenerationConfig: Generation,
    ExtractionConfig: Extraction,
}


def build_task(config: Settings, renderer: Renderer) -> Task:
    """Return the task that the settings describe, bound to a renderer.

    Raises:
        ConfigError: the settings do not go with the renderer's tokenizer, or the task with its kind of model.
        TemplateError: the template lacks what the task needs.
    """
    check_task_template(config, renderer.template)
    return _TASKS[type(config)](config, renderer)


def task_for(
    backbone: Backbone,
    config: Settings,
    template: Template,
    *,
    first_virtual_id: int | None = None,
    max_length: int | None = None,
    overlong: Overlong | None = None,
    deep: bool = False,
    head: LinearHead | None = None,
    temperature: float | None = None,
) -> Task:
    """Return the task that the settings describe, bound to a template on a backbone.

    Args:
        backbone: whose tokenizer renders and whose limit counts.
        config: the task's settings.
        template: where everything stands.
        first_virtual_id: of the template's first virtual token; V where absent.
        max_length: text tokens of a row; None for no limit but the backbone's.
        overlong: what happens to an answer that is itself too long; `default_overlong` where absent.
        deep: whether the virtual tokens are keys and values, in front of everything.
        head: the trained linear head of a task that has one; copied to the backbone's device.
        temperature: that scores are divided by before they become probabilities; None for none.

    Raises:
        TemplateError: the template does not go with the backbone.
        ConfigError: as `build_task`.
    """
    renderer = Renderer(
        template,
        backbone.tokenizer,
        vocabulary_size=backbone.vocabulary_size,
        first_virtual_id=first_virtual_id,
        max_length=max_length,
        context_limit=backbone.context_limit,
        overlong=overlong or default_overlong(config),
        kind=backbone.kind,
        deep=deep,
    )
    task = build_task(config, renderer)
    task.head = head_from(head_tensors(head), backbone.device)
    return task.with_temperature(temperature) if isinstance(task, ScoringTask) else task


def completed(config: Settings, records: Sequence[Mapping[str, Any]]) -> Settings:
    """Return a task's settings with what they leave to the training records: the labels or tags of a linear head.

    Raises:
        DataError: a record has none, or cannot be read.
    """
    if isinstance(config, LinearClassificationConfig) and not config.labels:
        return config.model_copy(update={"labels": learnt_labels(config, records)})
    if isinstance(config, TaggingConfig) and not config.tags:
        return config.model_copy(update={"tags": learnt_tags(config, records)})
    return config


def default_overlong(config: Settings) -> Overlong:
    """Return what happens to an answer that is itself too long, or to words, where nobody says.

    Free text and words to tag are cut; else it is an error.
    """
    return "cut" if isinstance(config, GenerationConfig | ExtractionConfig | TaggingConfig) else "error"
