"""From the settings of a run to its parts: backbone, records, template, task, prompt encoder, prompted model.

Knows how the parts fit together, and nothing of the training loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptune.config.run import RunConfig, StartConfig
from ptune.config.settings import Settings, label_text
from ptune.config.task import ClassificationConfig, LinearClassificationConfig, head_outputs
from ptune.errors import ConfigError, DataError
from ptune.models.backbone import Backbone
from ptune.models.deep_start import check_deep_family, keys_and_values_of
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.deep_encoder import DeepEncoder, build_deep_encoder
from ptune.prompts.deep_prompts import check_deep_template
from ptune.prompts.encoder import PromptEncoder, build_encoder
from ptune.prompts.initial_rows import initial_rows
from ptune.prompts.linear_head import LinearHead
from ptune.records.data import data_hash, draw, draw_shots, has_split, load_records, split_dev
from ptune.records.record import Record
from ptune.rendering.chat_template import in_chat
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.reading import ReadingTask
from ptune.tasks.registry import completed, task_for
from ptune.tasks.task import Example, Task
from ptune.template import SYSTEM, Template

_EXAMPLES_FOR_SCALE = 8
"""How many training examples show how large hidden states are."""


@dataclass
class Parts:
    """What a run is made of.

    Attributes:
        config: the settings, with the labels or tags that they left to the training data.
        prompted: backbone and encoder as one model, with a linear head where the task has one.
        task: renders records and scores answers, with the ids that `prompted` was given.
        train: examples to learn from; too long ones are cut, or left out, by the template's `overlong`.
        dev: held-out records.
        dropped: how many training records were left out as too long.
        cut: how many were shortened.
        data_hash: of the training records, for the soft prompt's summary.
        notes: what its maker should know of the data and the start, a sentence each.
    """

    config: RunConfig
    prompted: PromptedModel
    task: Task
    train: list[Example]
    dev: list[Record]
    dropped: int
    cut: int
    data_hash: str
    notes: list[str]

    def origin(self) -> dict[str, str]:
        """Return what the run learns from and on, each as a hash: a resumed run must find the same."""
        return {
            "the training records": self.data_hash,
            "the dev records": data_hash(self.dev),
            "the model": self.prompted.backbone.identity(),
        }


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
    train, dev = records or train_and_dev_records(config)
    task_settings = completed(config.task, train)
    if task_settings is not config.task and config.data.limit is not None:
        _check_labels_left(config, task_settings, dev)
    config = config.model_copy(update={"task": task_settings})
    prompted = PromptedModel(backbone, build_prompt_encoder(config, backbone, template))
    try:
        task = task_of_run(config, template, backbone, prompted.first_virtual_id)
        task.max_tokens = config.training.max_tokens_per_batch
        examples = [example for record in train if (example := task.example(record)) is not None]
        scored = sum(task.example(record) is not None for record in dev)  # mistakes in dev show before the first step
        for usable, given, what in ((len(examples), len(train), "training"), (scored, len(dev), "dev")):
            if not given:
                raise DataError(f"there are no {what} records; give at least one")
            if not usable:
                limit = config.prompt.max_length
                raise DataError(f"all {given} {what} records are longer than max_length {limit}; raise it")
        notes = [*_missing_labels(config, train, dev), *_of_conversations(train, examples, template)]
        if isinstance(task, ReadingTask) and task.reads_states:
            head, note = build_head(config, task, prompted, examples)
            task.head = prompted.head = head.to(backbone.device)
            notes += note
    except BaseException:
        prompted.close()
        raise
    return Parts(
        config=config,
        prompted=prompted,
        task=task,
        train=examples,
        dev=list(dev),
        dropped=len(train) - len(examples),
        cut=sum(any(row.cut for row in example.rows) for example in examples),
        data_hash=data_hash(train),
        notes=notes,
    )


def _check_labels_left(config: RunConfig, task: Settings, dev: Sequence[Record]) -> None:
    """See that the training records which the limit leaves hold every label or tag of dev, where none are listed.

    Raises:
        DataError: they do not.
    """
    known = head_outputs(task) or ()
    missing = [label for label in head_outputs(completed(config.task, dev)) or () if label not in known]
    if missing:
        labels = isinstance(task, LinearClassificationConfig)
        setting, one_each = "labels" if labels else "tags", labels and not getattr(task, "multi_label", False)
        raise DataError(
            f"data.limit leaves the first {config.data.limit} training records, which hold {len(known)} {setting} and "
            f'lack "{missing[0]}", which dev has; raise it, or list all as task.{setting}'
            + ("; data.shots draws records of each label" if one_each else "")
        )


def template_for(config: RunConfig, backbone: Backbone) -> Template:
    """Return the run's template as the backbone reads it: in its chat template where the settings ask for that.

    Raises:
        ConfigError: as `in_chat`.
        TemplateError: a deep prompt's virtual tokens stand elsewhere than in front.
    """
    template = Template.parse(config.prompt.template)
    if config.prompt.deep:
        check_deep_template(template)
    return in_chat(template, backbone.tokenizer, config.prompt.system) if config.prompt.chat else template


def task_of_run(config: RunConfig, template: Template, backbone: Backbone, first_virtual_id: int | None = None) -> Task:
    """Return the run's task on this backbone, its virtual tokens from ``first_virtual_id`` on (V if absent)."""
    prompt = config.prompt
    return task_for(
        backbone,
        config.task,
        template,
        first_virtual_id=first_virtual_id,
        max_length=prompt.max_length,
        overlong=prompt.overlong,
        deep=prompt.deep,
    )


def build_prompt_encoder(config: RunConfig, backbone: Backbone, template: Template) -> PromptEncoder | DeepEncoder:
    """Return the encoder of the run's virtual tokens, at its start.

    A deep prompt goes on from another one's keys and values, or else starts from those of the initial rows.

    Raises:
        BackboneError: the prompt is deep, and the family takes none.
        ConfigError: an mlp without residual should start from a deep prompt, which has no rows for it.
        SoftPromptError: the prompt to start from does not fit.
    """
    settings, seed = config.prompt, config.training.seed
    if not settings.deep:
        return build_encoder(settings.encoder, start_rows(config, backbone, template), seed)
    check_deep_family(backbone)
    source = _source(settings.start.prompt, backbone, template) if settings.start.prompt else None
    if source is None or source.deep is None:
        rows = start_rows(config, backbone, template)
        values, shape = keys_and_values_of(backbone, rows)
        return build_deep_encoder(settings.encoder, shape, rows, values, seed)
    if settings.encoder.type == "mlp" and not settings.encoder.residual:
        raise ConfigError(
            f'"{settings.start.prompt}" is a deep prompt, from whose keys and values an mlp cannot start unless it is '
            "residual; set prompt.encoder.residual to true, or prompt.encoder.type to embedding"
        )
    rows = start_rows(config, backbone, template, StartConfig())  # for an mlp to read
    return build_deep_encoder(settings.encoder, source.deep, rows, source.rows, seed)


def build_head(
    config: RunConfig, task: ReadingTask, prompted: PromptedModel, examples: Sequence[Example]
) -> tuple[LinearHead, list[str]]:
    """Return the linear head of a run at its start, and what its maker should know of it.

    It goes on from that of the soft prompt to start from, where that one scores the same labels or tags.

    Args:
        config: the settings, their task's labels or tags known.
        task: that will read by it.
        prompted: the model, its virtual tokens at their start.
        examples: some of which show the size of hidden states.
    """
    outputs, start = head_outputs(config.task) or (), config.prompt.start.prompt
    prompted.use()
    with torch.no_grad():
        rows = [row for example in examples[:_EXAMPLES_FOR_SCALE] for row in example.rows]
        states = task.read(prompted.backbone, rows, prompted.backbone.tokenizer.pad_token_id)
    source = SoftPrompt.load(start) if start else None
    if source is not None and source.head is not None and head_outputs(source.task) == outputs:
        return source.head.rescaled(states), []
    notes = [f'the linear head starts anew, for "{start}" has none of the same labels or tags'] if start else []
    return LinearHead.new(len(outputs), states, config.training.seed), notes


def train_and_dev_records(config: RunConfig) -> tuple[list[Record], list[Record]]:
    """Return training and dev records as ``config.data`` says.

    Dev is what is named; else what the training data's own folder or Hub name holds; else a share of train.

    Raises:
        ConfigError: no training data is named.
        DataError: a file or record cannot be read.
    """
    data = config.data
    if data.train is None:
        raise ConfigError('"data.train" is missing: a file, a folder or a Hub name')
    seed = config.training.seed if data.split_seed is None else data.split_seed
    train = load_records(data.train, split="train", fields=data.fields, limit=data.limit)
    held_out = data.dev or (data.train if has_split(data.train, "dev") else None)
    if held_out is not None:
        dev = load_records(held_out, split="dev", fields=data.fields)
    else:
        # what counts as the same text is what the template shows of it
        fields = Template.parse(config.prompt.template).fields
        train, dev = split_dev(train, data.dev_fraction, data.dev_limit, seed, fields=fields)
    if data.shots is not None and isinstance(config.task, ClassificationConfig | LinearClassificationConfig):
        label = config.task.label_field
        train = draw_shots(train, label, data.shots, seed, exact=True)
        dev = draw_shots(dev, label, data.shots, seed)
    if data.dev_limit is not None and len(dev) > data.dev_limit:
        dev = draw(dev, data.dev_limit, seed)  # not the first ones: files are often sorted by label
    return train, dev


def start_rows(config: RunConfig, backbone: Backbone, template: Template, start: StartConfig | None = None) -> Tensor:
    """Return the rows ``[P, H]`` float32 that the virtual tokens start from, as ``start`` or the config says."""
    words = list(config.task.verbalizer.values()) if isinstance(config.task, ClassificationConfig) else []
    return initial_rows(
        start or config.prompt.start,
        template.num_virtual_tokens,
        embeddings=backbone.embeddings,
        tokenizer=backbone.tokenizer,
        vocabulary_size=backbone.vocabulary_size,
        label_words=words,
        prompt_rows=lambda folder: _source(folder, backbone, template).input_rows,
        seed=config.training.seed,
    )


def _source(folder: str, backbone: Backbone, template: Template) -> SoftPrompt:
    """Return the soft prompt to start from, which must be of this backbone and of as many virtual tokens."""
    prompt = SoftPrompt.load(folder)
    prompt.check(backbone)
    if len(prompt.rows) != template.num_virtual_tokens:
        raise ConfigError(
            f'the soft prompt "{folder}" to start from has {len(prompt.rows)} virtual tokens and the template '
            f"{template.num_virtual_tokens}; give the template as many"
        )
    return prompt


def _missing_labels(config: RunConfig, train: Sequence[Record], dev: Sequence[Record]) -> Iterator[str]:
    if isinstance(config.task, ClassificationConfig):
        labels = list(config.task.verbalizer)
    elif isinstance(config.task, LinearClassificationConfig) and not config.task.multi_label:
        labels = list(config.task.labels)
    else:
        return
    for records, what in ((train, "training"), (dev, "dev")):
        seen = {label_text(record.get(config.task.label_field)) for record in records}
        missing = [label for label in labels if label not in seen]
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            yield (
                f"{len(missing)} of {len(labels)} labels have no {what} record ({some}): "
                "is the file sorted, and data.limit or data.dev_limit too small?"
            )


def _of_conversations(train: Sequence[Record], examples: Sequence[Example], template: Template) -> Iterator[str]:
    if any(record.history for record in train if isinstance(record, Record)):
        left_out = [max(row.left_out for row in example.rows) for example in examples]
        if shortened := [count for count in left_out if count]:
            yield (
                f"{sum(shortened)} exchanges of {len(shortened)} conversations, the oldest of each, are too long and "
                "left out; raise max_length to keep more"
            )
    spoken = sum(isinstance(record.get(SYSTEM), str) and bool(record[SYSTEM].strip()) for record in train)
    if spoken and SYSTEM not in template.fields:
        yield (
            f"{spoken} records have a system message that the template does not show; name {{{SYSTEM}}} in it, or in "
            "prompt.system beside chat: true"
        )
