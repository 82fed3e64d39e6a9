"""P-tuning: teach a frozen language model a task by training a few virtual tokens, and nothing else.

The public names. They are loaded on first use, so that ``ptune --help`` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "backbone",
    "ConfigError": "errors",
    "DataError": "errors",
    "BackboneError": "errors",
    "Engine": "engine",
    "GenerationOptions": "generation",
    "MergedModel": "merging.merge",
    "MissingExtraError": "errors",
    "OutputError": "errors",
    "PromptEncoder": "encoder",
    "PromptedModel": "prompted_model",
    "PtuneError": "errors",
    "Reporter": "reporting",
    "RunConfig": "config",
    "SearchConfig": "candidates",
    "SoftPrompt": "soft_prompt",
    "SoftPromptError": "errors",
    "Template": "template",
    "TemplateError": "errors",
    "TrainingError": "errors",
    "VirtualTokens": "virtual_tokens",
    "load_config": "config_file",
    "load_records": "data",
    "merge_prompts": "merging.merge",
    "prompted": "drop_in",
    "search": "searching",
    "train": "training",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from ptune.backbone import Backbone as Backbone
    from ptune.candidates import SearchConfig as SearchConfig
    from ptune.config import RunConfig as RunConfig
    from ptune.config_file import load_config as load_config
    from ptune.data import load_records as load_records
    from ptune.drop_in import prompted as prompted
    from ptune.encoder import PromptEncoder as PromptEncoder
    from ptune.engine import Engine as Engine
    from ptune.errors import BackboneError as BackboneError
    from ptune.errors import ConfigError as ConfigError
    from ptune.errors import DataError as DataError
    from ptune.errors import MissingExtraError as MissingExtraError
    from ptune.errors import OutputError as OutputError
    from ptune.errors import PtuneError as PtuneError
    from ptune.errors import SoftPromptError as SoftPromptError
    from ptune.errors import TemplateError as TemplateError
    from ptune.errors import TrainingError as TrainingError
    from ptune.generation import GenerationOptions as GenerationOptions
    from ptune.merging.merge import MergedModel as MergedModel
    from ptune.merging.merge import merge_prompts as merge_prompts
    from ptune.prompted_model import PromptedModel as PromptedModel
    from ptune.reporting import Reporter as Reporter
    from ptune.searching import search as search
    from ptune.soft_prompt import SoftPrompt as SoftPrompt
    from ptune.template import Template as Template
    from ptune.training import train as train
    from ptune.virtual_tokens import VirtualTokens as VirtualTokens


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptune' has no attribute {name!r}")
    return getattr(import_module(f"ptune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
