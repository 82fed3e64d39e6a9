"""Every setting of a run, typed and checked: the one description behind the command line, YAML and Python.

All mistakes of a config are reported at once, each with its path and the nearest right name.
Knows nothing of models, tensors or files' contents, and imports no torch, so that ``ptune --help`` stays quick.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ptune.config.settings import Settings, bytes_of
from ptune.config.task import (
    ChoiceConfig,
    ClassificationConfig,
    LinearClassificationConfig,
    TaggingConfig,
    TaskConfig,
    check_task_template,
)
from ptune.template import Template

Overlong = Literal["cut", "drop", "error"]
"""What happens to an answer that is itself too long, or to words to tag."""

_DEEP_RATE = 0.05
"""Keys and values want ten times the rate of virtual tokens: docs/recipes.md."""


class ModelConfig(Settings):
    """Which backbone to load and how. A plain string stands for ``name``."""

    name: str = Field("mini", description='Folder, Hub name, or "mini" for the model that comes with ptune.')
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description='Of the frozen weights; "auto" takes bfloat16 where GPU or processor multiplies it fast and hidden '
        "states are 256 wide or wider, else float32.",
    )
    device: str = Field("auto", description='"auto", "cpu", "cuda", "cuda:1", "mps".')
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    attn_implementation: str | None = Field(None, description="Passed to transformers: sdpa, eager, flash_attention_2.")
    quantization: Literal["int8", "int4"] | dict[str, Any] | None = Field(
        None,
        description="Rounds the frozen weights, by torchao on a processor and bitsandbytes on CUDA; or keyword "
        "arguments of a transformers config, with its quant_method.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Off unless asked.")

    @field_validator("name")
    @classmethod
    def _home_folder(cls, value: str) -> str:
        return os.path.expanduser(value)


class DataConfig(Settings):
    """Where records come from. A plain string stands for ``train``."""

    train: str | None = Field(None, description="File (.jsonl, .json, .csv, .parquet), folder or Hub name.")
    dev: str | None = Field(
        None, description="Held-out records; where absent, the folder's own dev part, or else a share of train."
    )
    dev_fraction: float = Field(0.1, gt=0, lt=1, description="Share of train that is held out where dev is absent.")
    dev_limit: int | None = Field(1000, gt=0, description="At most so many records are used for dev.")
    limit: int | None = Field(None, gt=0, description="Use only the first so many training records.")
    split_seed: int | None = Field(
        None, ge=-(2**31), lt=2**32, description="Of what is drawn: dev, shots; training.seed where absent."
    )
    shots: int | None = Field(
        None, gt=0, description="Few-shot: only so many training records a label, drawn by the seed; of dev no more."
    )
    fields: dict[str, str] = Field(
        default_factory=dict,
        description="Template field -> column; a.b is a member of an object in the column a, a.0 of a list.",
    )


class EncoderConfig(Settings):
    """The prompt encoder: what produces the virtual tokens while they are trained."""

    type: Literal["embedding", "mlp", "lstm"] = "mlp"
    hidden_size: int | None = Field(None, gt=0, description="Width of hidden layers; the backbone's where absent.")
    num_layers: int = Field(2, ge=1, description="Hidden layers (mlp), stacked LSTM layers (lstm).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Between hidden layers, while training.")
    residual: bool = Field(True, description="Add the encoder's output, zero at the start, to the initial rows.")

    @model_validator(mode="before")
    @classmethod
    def _settings_that_embedding_lacks(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") == "embedding":
            defaults = {name: field.default for name, field in cls.model_fields.items()}
            useless = sorted(name for name, value in values.items() if name != "type" and value != defaults.get(name))
            if useless:
                raise ValueError(
                    f"an embedding has no encoder, so {', '.join(useless)} would be ignored; "
                    "remove it, or choose mlp or lstm"
                )
        return values


class StartConfig(Settings):
    """What the virtual tokens are before the first step."""

    method: Literal["vocabulary", "text", "labels", "prompt", "normal", "uniform"] = Field(
        "vocabulary",
        description="Sampled vocabulary rows, the words of a text, the label words, another soft prompt, "
        "or noise at the embeddings' own scale.",
    )
    text: str | None = Field(None, description="For method text; repeated or cut to the number of virtual tokens.")
    prompt: str | None = Field(None, description="For method prompt: folder of a soft prompt.")

    @field_validator("prompt")
    @classmethod
    def _home_folder(cls, value: str | None) -> str | None:
        return None if value is None else os.path.expanduser(value)

    @model_validator(mode="after")
    def _what_the_method_needs(self) -> StartConfig:
        for method in ("text", "prompt"):
            value = getattr(self, method)
            if self.method == method and not value:
                raise ValueError(f'method "{method}" needs `{method}`')
            if self.method != method and value is not None:
                raise ValueError(f'`{method}` is only used by method "{method}", and method is "{self.method}"')
        return self


class PromptConfig(Settings):
    """Where virtual tokens stand, and what produces them."""

    template: str = Field(description="As in `[P*10]Human: {instruction}[?\\n{input}]\\n\\nAssistant: {answer}`.")
    chat: bool = Field(
        False, description="Set the words as a user's message into the tokenizer's chat template, before the answer."
    )
    system: str | None = Field(None, description="With chat: words of the system message; may hold fields.")
    deep: bool = Field(
        False,
        description="P-tuning v2: virtual tokens are trained keys and values at every layer, in front of everything; "
        "their encoder is an `embedding` unless another is given.",
    )
    encoder: EncoderConfig = EncoderConfig()
    start: StartConfig = StartConfig()
    max_length: int | None = Field(None, gt=0, description="Text tokens of one example; virtual tokens come on top.")
    overlong: Overlong | None = Field(
        None,
        description="For an answer that is itself too long, or words to tag. Default: cut for generation, extraction "
        "and tagging; others know error alone.",
    )

    @field_validator("template")
    @classmethod
    def _a_template_with_virtual_tokens(cls, value: str) -> str:
        if Template.parse(value).num_virtual_tokens == 0:
            raise ValueError(
                "no virtual tokens stand in it, so there is nothing to train; put [P*10] where they should"
            )
        return value

    @model_validator(mode="after")
    def _system_in_a_chat(self) -> PromptConfig:
        if self.system is not None and not self.chat:
            raise ValueError("`system` is a message of a chat, and chat is off; set chat: true, or leave it out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _encoder_of_a_deep_prompt(cls, values: Any) -> Any:
        # An mlp's last layer would have as many weights as hundreds of the prompts that it gives.
        if isinstance(values, dict) and values.get("deep") and values.get("encoder") is None:
            return values | {"encoder": {"type": "embedding"}}
        return values

    @model_validator(mode="after")
    def _encoders_for_keys_and_values(self) -> PromptConfig:
        if self.deep and self.encoder.type == "lstm":
            raise ValueError(
                "a deep prompt's encoder is embedding or mlp, and encoder.type is lstm; choose one of the two"
            )
        return self


class TrainingConfig(Settings):
    """How the prompt is trained."""

    epochs: float = Field(3.0, gt=0, description="How often the training records are seen; 0.5 is half of them.")
    max_steps: int | None = Field(None, gt=0, description="Optimizer steps; goes before epochs.")
    batch_size: int = Field(16, gt=0, description="Records of one forward.")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="Forwards of one optimizer step; their tokens weigh alike, so 1 x 8 equals 8 x 1."
    )
    max_tokens_per_batch: int | None = Field(
        None,
        gt=0,
        description="A forward of more tokens, padding included, is run in parts, on dev too: less memory, same step.",
    )
    learning_rate: float = Field(
        5e-3, gt=0, description=f"Highest rate, after the warm-up; {_DEEP_RATE:g} where prompt.deep is on."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="How the rate falls to zero.")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="The gradient is clipped to this norm.")
    seed: int = Field(0, ge=-(2**31), lt=2**32, description="Of the start, the order of records and the dropout.")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="Autocast, as accelerate has it. Half precision of the frozen weights is `model.dtype`."
    )
    plan: Literal["auto", "reference"] = Field(
        "auto", description="How forwards are carried out: the cheapest way to the same numbers, or the plain one."
    )
    context_cache: str = Field(
        "2GB", description="Room for keys and values of text before the virtual tokens, kept over epochs; 0 for none."
    )
    context_cache_disk: str = Field(
        "0", description="Room on disk for the same, which later runs find again; the folder is PTUNE_CACHE."
    )
    context_cache_dtype: Literal["backbone", "bfloat16"] = Field(
        "backbone", description="Of what is kept; bfloat16 halves a float32 backbone's, and rounds."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, more time: recompute activations.")
    shard_backbone: bool = Field(
        False,
        description="Under torchrun or accelerate launch, each process holds its part of the frozen layers (FSDP2).",
    )
    logging_steps: int = Field(10, gt=0, description="Optimizer steps between two lines of the log.")
    evaluations: int = Field(
        10, ge=1, description="How often dev is evaluated in the course of the run, at even distances."
    )
    patience: int | None = Field(None, gt=0, description="Stop after so many evaluations without a better metric.")
    samples: int = Field(2, ge=0, description="Dev records answered in the log at each evaluation.")
    trackers: tuple[str, ...] = Field((), description="As accelerate names them: tensorboard, wandb, ...")
    checkpoint_minutes: float = Field(
        5.0, gt=0, description="A checkpoint is written at least so often, and at each evaluation."
    )

    @property
    def context_cache_bytes(self) -> int:
        """The room for kept contexts in bytes."""
        return bytes_of(self.context_cache)

    @property
    def context_cache_disk_bytes(self) -> int:
        """The room on disk in bytes."""
        return bytes_of(self.context_cache_disk)

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_text(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare `no` as a boolean

    @field_validator("context_cache", "context_cache_disk", mode="before")
    @classmethod
    def _a_size(cls, value: Any) -> Any:
        bytes_of(str(value))
        return str(value)


class RunConfig(Settings):
    """One run: a backbone, data, a task, a prompt, and how it is trained."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    task: TaskConfig
    prompt: PromptConfig
    training: TrainingConfig = TrainingConfig()
    output: Path = Field(
        Path("prompts/prompt"), description="Folder of the soft prompt; the run's own files stand in its folder run."
    )

    @field_validator("output")
    @classmethod
    def _home_folder(cls, value: Path) -> Path:
        return Path(os.path.expanduser(value))

    @model_validator(mode="before")
    @classmethod
    def _rate_of_a_deep_prompt(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        prompt, training = values.get("prompt"), values.get("training") or {}
        deep = prompt.get("deep") if isinstance(prompt, dict) else getattr(prompt, "deep", False)
        if deep and isinstance(training, dict) and training.get("learning_rate") is None:
            return values | {"training": training | {"learning_rate": _DEEP_RATE}}
        return values

    @model_validator(mode="after")
    def _deep_prompts_keep_their_cache(self) -> RunConfig:
        if self.prompt.deep and self.training.gradient_checkpointing:
            raise ValueError(
                "prompt.deep does not go with training.gradient_checkpointing, for a layer that recomputes drops the "
                "cache in which a deep prompt stands; turn one of the two off"
            )
        return self

    @model_validator(mode="after")
    def _layers_that_can_be_shared_out(self) -> RunConfig:
        if self.training.shard_backbone and self.model.quantization is not None:
            raise ValueError(
                "training.shard_backbone cannot cut quantised weights in parts, and model.quantization is set; leave "
                "one of the two out"
            )
        if self.training.shard_backbone and self.training.context_cache_disk_bytes:
            raise ValueError(
                "training.shard_backbone does not go with training.context_cache_disk, which names contexts by a hash "
                "of whole weights; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _shots_of_labels(self) -> RunConfig:
        one_label = isinstance(self.task, ClassificationConfig) or (
            isinstance(self.task, LinearClassificationConfig) and not self.task.multi_label
        )
        if self.data.shots is not None and not one_label:
            raise ValueError(
                f"data.shots draws records of each label, and the task is {self.task.type}; use data.limit instead"
            )
        return self

    @model_validator(mode="after")
    def _answers_that_can_be_cut(self) -> RunConfig:
        whole = isinstance(self.task, ClassificationConfig | LinearClassificationConfig | ChoiceConfig)
        if whole and self.prompt.overlong not in (None, "error"):
            raise ValueError(
                f"prompt.overlong {self.prompt.overlong} is for answers that are written, or words to tag, and the "
                f"task is {self.task.type}, whose records are cut to max_length and whose answers are read whole; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_template_for_the_task(self) -> RunConfig:
        if self.prompt.chat and isinstance(self.task, TaggingConfig):
            raise ValueError(
                "prompt.chat sets the template into a conversation that ends in an answer, and a tagging has none; "
                "turn prompt.chat off"
            )
        check_task_template(self.task, Template.parse(self.prompt.template))
        return self

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _data_by_name(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value
