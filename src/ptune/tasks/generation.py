"""Free text: a record is answered by words, learnt token by token and written by ``generate``.

Metrics are the loss in nats a token with its perplexity, and where the task chooses by one of them ROUGE-L, BLEU or
exact match, which need every dev record to be answered.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptune.config.task import ExtractionConfig, GenerationConfig
from ptune.errors import ConfigError, DataError, MissingExtraError
from ptune.generation.generate import Generated, GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.records.record import Record
from ptune.rendering.batch import Row, collate
from ptune.rendering.filling import lacking, location
from ptune.rendering.renderer import Renderer
from ptune.tasks.metrics import prediction_share
from ptune.tasks.reading import in_batches
from ptune.tasks.task import Asked, Example, Task

# Scripts that write no blanks between words: every character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
_HAN = re.compile(r"[\u4e00-\u9fff]")


class Generation(Task):
    """A record is answered by text."""

    answer_key = "text"
    config: GenerationConfig | ExtractionConfig

    def __init__(self, config: GenerationConfig | ExtractionConfig, renderer: Renderer) -> None:
        """Bind the task.

        Raises:
            ConfigError: the model writes no text.
        """
        super().__init__(config, renderer)
        if not renderer.kind.generates:
            raise ConfigError(
                f"{renderer.kind.words} writes no text, so it cannot learn a task of type {config.type}; "
                "choose type classification, or another model"
            )
        self.metric = config.metric
        self.greater_is_better = config.metric != "loss"

    @property
    def answer_field(self) -> str:
        """The record's field that holds its answer."""
        return getattr(self.config, "answer_field", "")

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the record's answer as it stands.

        Raises:
            DataError: the record lacks it, or holds no text in its place.
        """
        field = self.answer_field
        if not isinstance(record.get(field), str):
            if isinstance(record, Record) and record.open_question:
                raise DataError(
                    f"{record.location} is a conversation that ends with a question, so nothing can be learnt at its "
                    "end; write its answer, or remove the question"
                )
            if record.get(field) is not None:
                found = "a number" if type(record[field]) in (int, float) else type(record[field]).__name__
                raise DataError(
                    f'{location(record)}: its answer in the field "{field}" is {found}, not a text; put quotes around '
                    "it, or name another field as task.answer_field"
                )
            said = f'has no answer: it lacks text in the field "{field}"'
            raise lacking(record, field, said, "name the right one as task.answer_field")
        return str(record[field])

    def shown(self, record: Mapping[str, Any]) -> Row | None:
        """Return the row of a record with its answer and the token that ends it; None where ``overlong`` drops it.

        A record that is tokenised already is taken as it is.
        """
        tokenised = "input_ids" in record and self.answer_field not in record
        return self.renderer.tokenised_row(record) if tokenised else self.renderer.row(record, self.answer(record))

    def example(self, record: Mapping[str, Any]) -> Example | None:
        """Return a record as one row whose answer is supervised; None where that is too long.

        Raises:
            DataError: it has no answer, or none of its tokens is supervised.
        """
        row = self.shown(record)
        if row is None:
            return None
        if weight := _supervised(row):
            return Example((row,), None, weight)
        if row.cut or row.left_out:  # what it would teach was too long
            return None
        raise DataError(f"{location(record)} supervises no token, so it teaches nothing; leave the record out")

    def asks(self, examples: Sequence[Example], pad_id: int) -> Asked:
        """Return the examples' rows with their labels."""
        batch = collate([example.rows[0] for example in examples], pad_id)
        return Asked(batch.input_ids, batch.attention_mask, labels=batch.labels)

    def loss_of(self, answer: Tensor, examples: Sequence[Example]) -> Tensor:
        """Return the cross-entropy summed over supervised tokens, a scalar: what the model gave."""
        return answer

    def predict(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Return for each record its ``text``, greedily decoded, and why that ended, ``stop`` or ``length``."""
        answers = self.written(backbone, records, batch_size=batch_size)
        return [self.answer_from(record, answer) for record, answer in zip(records, answers, strict=True)]

    def answer_from(self, record: Mapping[str, Any], generated: Generated) -> dict[str, Any]:
        """Return what `predict` says of a record for which this was written."""
        return {"text": generated.text, "finish_reason": generated.finish_reason}

    def written(self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int) -> list[Generated]:
        """Return what is written for each record, greedily decoded, in order."""
        contexts = [self.renderer.question(record, self.config.max_new_tokens) for record in records]
        options = GenerationOptions(max_new_tokens=self.config.max_new_tokens)
        if self.max_tokens is not None and contexts:
            longest = max(map(len, contexts)) + options.max_new_tokens
            batch_size = max(1, min(batch_size, self.max_tokens // longest))
        return generate(backbone, contexts, options, batch_size=batch_size)

    def evaluate(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> dict[str, float]:
        """Return loss, perplexity, and the metric that the task chooses by.

        Raises:
            MissingExtraError: BLEU is asked for and sacrebleu is not installed.
            DataError: all records are too long, and dropped.
        """
        examples = [example for record in records if (example := self.example(record)) is not None]
        if not examples:
            raise DataError(
                f"all {len(records)} records are left out as longer than {self.renderer.limit} tokens of text, so none "
                "can be scored; shorten them, or train with a higher max_length"
            )
        total, pad_id = 0.0, backbone.tokenizer.pad_token_id
        with torch.no_grad():
            for together in in_batches([example.rows for example in examples], batch_size, self.max_tokens):
                total += float(self.loss(backbone, [examples[number] for number in together], pad_id))
        loss = total / sum(example.weight for example in examples)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.metric != "loss":
            metrics |= self.scores(backbone, records, batch_size=batch_size)
        return metrics

    def scores(self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int) -> dict[str, float]:
        """Return the metrics of written answers that go with the one that the task chooses by, and how alike they are.

        With all of them goes how many are right to the letter, ``exact_match``.
        """
        texts = [answer.text for answer in self.written(backbone, records, batch_size=batch_size)]
        references = [self.answer(record) for record in records]
        names = ("rouge_1", "rouge_2", "rouge_l") if self.metric == "rouge_l" else (self.metric,)
        scores = {name: score_texts(name, texts, references) for name in dict.fromkeys((*names, "exact_match"))}
        return scores | {"prediction_share": prediction_share(texts)}


def score_texts(metric: str, texts: Sequence[str], references: Sequence[str]) -> float:
    """Return a metric of texts against one reference each: ROUGE and exact match 0 to 1, BLEU 0 to 100.

    Raises:
        MissingExtraError: BLEU needs sacrebleu.
    """
    pairs = list(zip(texts, references, strict=True))
    if metric == "exact_match":
        return sum(text.strip() == reference.strip() for text, reference in pairs) / len(pairs)
    if metric == "rouge_l":
        return math.fsum(rouge_l(text, reference) for text, reference in pairs) / len(pairs)
    if metric in ("rouge_1", "rouge_2"):
        length = int(metric[-1])
        return math.fsum(rouge_n(text, reference, length) for text, reference in pairs) / len(pairs)
    try:
        import sacrebleu
    except ImportError as error:
        raise MissingExtraError("task.metric bleu needs sacrebleu: pip install ptune[metrics]") from error
    tokenizer = "zh" if any(_HAN.search(reference) for reference in references) else "13a"
    return float(sacrebleu.corpus_bleu(list(texts), [list(references)], tokenize=tokenizer).score)


def rouge_l(text: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words (Lin 2004, section 3); Han characters count as words."""
    ours, theirs = _WORD.findall(text.lower()), _WORD.findall(reference.lower())
    if not ours or not theirs:
        return float(ours == theirs)
    before = [0] * (len(theirs) + 1)
    for word in ours:
        row = [0]
        for place, other in enumerate(theirs, 1):
            row.append(before[place - 1] + 1 if word == other else max(before[place], row[-1]))
        before = row
    return 2 * before[-1] / (len(ours) + len(theirs))


def rouge_n(text: str, reference: str, length: int) -> float:
    """Return the F1 of the runs of ``length`` words that both texts have (Lin 2004, section 2)."""
    ours, theirs = (
        Counter(zip(*(words[start:] for start in range(length)), strict=False))
        for words in (_WORD.findall(text.lower()), _WORD.findall(reference.lower()))
    )
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def _supervised(row: Row) -> int:
    return sum(label >= 0 for label in row.labels[1:])
