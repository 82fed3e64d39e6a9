"""The tasks: classification, choice, generation, extraction.

Adding one touches its own file, its settings and the registry below.
"""

from __future__ import annotations

from ptune.backbone import Backbone
from ptune.rendering import Overlong, Renderer
from ptune.settings import Settings
from ptune.task_config import ChoiceConfig, ClassificationConfig, ExtractionConfig, GenerationConfig
from ptune.tasks.choice import Choice
from ptune.tasks.classification import Classification
from ptune.tasks.extraction import Extraction
from ptune.tasks.generation import Generation
from ptune.tasks.scoring import ScoringTask
from ptune.tasks.task import Asked, Assessment, Example, Forward, Task
from ptune.template import Template

__all__ = [
    "Asked",
    "Assessment",
    "Choice",
    "Classification",
    "Example",
    "Extraction",
    "Forward",
    "Generation",
    "ScoringTask",
    "Task",
    "build_task",
    "default_overlong",
    "task_for",
]

_TASKS: dict[type[Settings], type[Task]] = {
    ClassificationConfig: Classification,
    ChoiceConfig: Choice,
    GenerationConfig: Generation,
    ExtractionConfig: Extraction,
}


def build_task(config: Settings, renderer: Renderer) -> Task:
    """Return the task that the settings describe, bound to a renderer.

    Raises:
        ConfigError: the settings do not go with the renderer's tokenizer, or the task with its kind of model.
    """
    return _TASKS[type(config)](config, renderer)


def task_for(
    backbone: Backbone,
    config: Settings,
    template: Template,
    *,
    first_virtual_id: int = -1,
    max_length: int | None = None,
    overlong: Overlong | None = None,
    deep: bool = False,
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
    return task.with_temperature(temperature) if isinstance(task, ScoringTask) else task


def default_overlong(config: Settings) -> Overlong:
    """Return what happens to an answer that is itself too long, where nobody says: cut for free text, else an error."""
    return "cut" if isinstance(config, GenerationConfig | ExtractionConfig) else "error"
