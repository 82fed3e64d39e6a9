"""The tasks: classification and generation. Adding one touches its own file and the registry below."""

from __future__ import annotations

from ptune.config import ClassificationConfig, GenerationConfig, Settings
from ptune.rendering import Renderer
from ptune.tasks.classification import Classification
from ptune.tasks.generation import Generation
from ptune.tasks.task import Example, Forward, Task

__all__ = ["Classification", "Example", "Forward", "Generation", "Task", "build_task"]

_TASKS: dict[type[Settings], type[Task]] = {ClassificationConfig: Classification, GenerationConfig: Generation}


def build_task(config: Settings, renderer: Renderer) -> Task:
    """Return the task that the settings describe, bound to a renderer.

    Raises:
        ConfigError: the settings do not go with the renderer's tokenizer.
    """
    return _TASKS[type(config)](config, renderer)
