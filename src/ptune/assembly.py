"""From the settings of a run to its parts: backbone, records, template, task, prompt encoder, prompted model.

Knows how the parts fit together, and nothing of the training loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ptune.backbone import Backbone
from ptune.chat_template import in_chat
from ptune.config import ClassificationConfig, RunConfig
from ptune.data import Record, data_hash, draw_shots, has_split, load_records, split_dev
from ptune.encoder import build_encoder
from ptune.errors import ConfigError, DataError
from ptune.initial_rows import initial_rows
from ptune.prompted_model import PromptedModel
from ptune.soft_prompt import SoftPrompt
from ptune.tasks import Example, Task, task_for
from ptune.template import Template


@dataclass
class Parts:
    """What a run is made of.

    Attributes:
        prompted: backbone and encoder as one model.
        task: renders records and scores answers, with the ids that `prompted` was given.
        train: examples to learn from; too long ones are cut, or left out, by the template's `overlong`.
        dev: held-out records.
        dropped: how many training records were left out as too long.
        cut: how many were shortened.
        data_hash: of the training records, for the soft prompt's summary.
    """

    prompted: PromptedModel
    task: Task
    train: list[Example]
    dev: list[Record]
    dropped: int
    cut: int
    data_hash: str


def assemble(
    config: RunConfig, backbone: Backbone, records: tuple[Sequence[Record], Sequence[Record]] | None = None
) -> Parts:
    """Build the parts of a run on a loaded backbone.

    Args:
        config: the settings.
        backbone: the frozen model, left as it was once ``Parts.prompted`` is closed.
        records: training and dev records already at hand; read as ``config.data`` says where absent.

    Raises:
        ConfigError, TemplateError, DataError: the settings, the template or a record cannot be used.
    """
    template = template_for(config, backbone)
    train, dev = records or read_records(config, template)
    encoder = build_encoder(config.prompt.encoder, start_rows(config, backbone, template), config.training.seed)
    prompted = PromptedModel(backbone, encoder)
    try:
        task = build_task(config, template, backbone, prompted.first_virtual_id)
        examples = [example for record in train if (example := task.example(record)) is not None]
        if not examples:
            raise DataError(
                f"all {len(train)} training records are longer than max_length {config.prompt.max_length}; raise it"
            )
    except BaseException:
        prompted.close()
        raise
    return Parts(
        prompted=prompted,
        task=task,
        train=examples,
        dev=list(dev),
        dropped=len(train) - len(examples),
        cut=sum(any(row.cut for row in example.rows) for example in examples),
        data_hash=data_hash(train),
    )


def parse_template(config: RunConfig) -> Template:
    """Return the run's template.

    Raises:
        TemplateError: it cannot be parsed.
        ConfigError: it has no virtual tokens, so there is nothing to train.
    """
    template = Template.parse(config.prompt.template)
    if template.num_virtual_tokens == 0:
        raise ConfigError(
            '"prompt.template" has no virtual tokens, so there is nothing to train; put [P*10] where they should stand'
        )
    return template


def template_for(config: RunConfig, backbone: Backbone) -> Template:
    """Return the run's template as the backbone reads it: in its chat template where the settings ask for that.

    Raises:
        TemplateError, ConfigError: as `parse_template` and `in_chat`.
    """
    template = parse_template(config)
    return in_chat(template, backbone.tokenizer, config.prompt.system) if config.prompt.chat else template


def build_task(config: RunConfig, template: Template, backbone: Backbone, first_virtual_id: int = -1) -> Task:
    """Return the run's task on this backbone, its virtual tokens at ids from ``first_virtual_id`` on."""
    prompt = config.prompt
    return task_for(
        backbone,
        config.task,
        template,
        first_virtual_id=first_virtual_id,
        max_length=prompt.max_length,
        overlong=prompt.overlong,
    )


def read_records(config: RunConfig, template: Template) -> tuple[list[Record], list[Record]]:
    """Return training and dev records as ``config.data`` says.

    Dev is what is named; else what the training data's own folder or Hub name holds; else a share of train.

    Raises:
        ConfigError: no training data is named.
        DataError: a file or record cannot be read.
    """
    data = config.data
    if data.train is None:
        raise ConfigError('"data.train" is missing: a file, a folder or a Hub name')
    train = load_records(data.train, split="train", fields=data.fields, limit=data.limit)
    held_out = data.dev or (data.train if has_split(data.train, "dev") else None)
    if held_out is not None:
        dev = load_records(held_out, split="dev", fields=data.fields)
    else:
        # what counts as the same text is what the template shows of it
        train, dev = split_dev(train, data.dev_fraction, data.dev_limit, config.training.seed, fields=template.fields)
    if data.shots is not None and isinstance(config.task, ClassificationConfig):
        label, seed = config.task.label_field, config.training.seed
        train = draw_shots(train, label, data.shots, seed, exact=True)
        dev = draw_shots(dev, label, data.shots, seed)
    return train, dev[: data.dev_limit]


def start_rows(config: RunConfig, backbone: Backbone, template: Template) -> Tensor:
    """Return the rows ``[P, H]`` float32 that the virtual tokens start from."""
    words = list(config.task.verbalizer.values()) if isinstance(config.task, ClassificationConfig) else []
    return initial_rows(
        config.prompt.start,
        template.num_virtual_tokens,
        embeddings=backbone.embeddings,
        tokenizer=backbone.tokenizer,
        vocabulary_size=backbone.vocabulary_size,
        label_words=words,
        prompt_rows=lambda folder: SoftPrompt.load(folder).rows,
        seed=config.training.seed,
    )
