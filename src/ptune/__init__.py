"""P-tuning: teach a frozen language model a task by training a few virtual tokens, and nothing else.

The public names. They are loaded on first use, so that ``ptune --help`` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "models.backbone",
    "BackboneError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "EncoderConfig": "config.run",
    "Engine": "engine.engine",
    "Generated": "generation.sampling",
    "GenerationOptions": "generation.sampling",
    "MINI": "pretrained.loading",
    "MergedModel": "merging.merge",
    "MissingExtraError": "errors",
    "ModelConfig": "config.run",
    "OutputError": "errors",
    "PromptEncoder": "prompts.encoder",
    "PromptedModel": "models.prompted_model",
    "PtuneError": "errors",
    "Reporter": "training.reporting",
    "RunConfig": "config.run",
    "SearchConfig": "config.candidates",
    "SearchReporter": "training.reporting",
    "SoftPrompt": "soft_prompts.soft_prompt",
    "SoftPromptError": "errors",
    "StartConfig": "config.run",
    "Stopped": "errors",
    "Template": "template",
    "TemplateError": "errors",
    "TrainingError": "errors",
    "VirtualTokens": "prompts.virtual_tokens",
    "load_config": "config.file",
    "load_records": "records.data",
    "merge_prompts": "merging.merge",
    "prompted": "drop_in.prompted",
    "search": "training.search",
    "train": "training.train",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from ptune.config.candidates import SearchConfig as SearchConfig
    from ptune.config.file import load_config as load_config
    from ptune.config.run import EncoderConfig as EncoderConfig
    from ptune.config.run import ModelConfig as ModelConfig
    from ptune.config.run import RunConfig as RunConfig
    from ptune.config.run import StartConfig as StartConfig
    from ptune.drop_in.prompted import prompted as prompted
    from ptune.engine.engine import Engine as Engine
    from ptune.errors import BackboneError as BackboneError
    from ptune.errors import ConfigError as ConfigError
    from ptune.errors import DataError as DataError
    from ptune.errors import MissingExtraError as MissingExtraError
    from ptune.errors import OutputError as OutputError
    from ptune.errors import PtuneError as PtuneError
    from ptune.errors import SoftPromptError as SoftPromptError
    from ptune.errors import Stopped as Stopped
    from ptune.errors import TemplateError as TemplateError
    from ptune.errors import TrainingError as TrainingError
    from ptune.generation.sampling import Generated as Generated
    from ptune.generation.sampling import GenerationOptions as GenerationOptions
    from ptune.merging.merge import MergedModel as MergedModel
    from ptune.merging.merge import merge_prompts as merge_prompts
    from ptune.models.backbone import Backbone as Backbone
    from ptune.models.prompted_model import PromptedModel as PromptedModel
    from ptune.pretrained.loading import MINI as MINI
    from ptune.prompts.encoder import PromptEncoder as PromptEncoder
    from ptune.prompts.virtual_tokens import VirtualTokens as VirtualTokens
    from ptune.records.data import load_records as load_records
    from ptune.soft_prompts.soft_prompt import SoftPrompt as SoftPrompt
    from ptune.template import Template as Template
    from ptune.training.reporting import Reporter as Reporter
    from ptune.training.reporting import SearchReporter as SearchReporter
    from ptune.training.search import search as search
    from ptune.training.train import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptune' has no attribute {name!r}")
    return getattr(import_module(f"ptune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
