"""Verbalizers: scores are the naive sums of log-probabilities, whatever the batch; what cannot be is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from ptune.config.run import EncoderConfig
from ptune.config.task import ClassificationConfig
from ptune.errors import ConfigError, DataError
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.encoder import build_encoder
from ptune.records.record import Record
from ptune.rendering.batch import collate
from ptune.rendering.renderer import Renderer
from ptune.tasks.classification import Classification
from ptune.tasks.registry import build_task
from ptune.template import Template

WORDS = {"praise": " great film", "blame": " terrible", "apple": "苹果很", "pear": "苹果小", "cry": " great soup!"}
RECORDS = [{"text": "soup " * n + "很热情", "label": label} for n, label in enumerate([*WORDS, "blame"], 1)]


def build(backbone: Backbone, first: int, words: dict[str, str] | None = None, **config: Any) -> Classification:
    renderer = Renderer(
        Template.parse("{text}[P*3] It:{answer}"),
        backbone.tokenizer,
        vocabulary_size=backbone.vocabulary_size,
        first_virtual_id=first,
        context_limit=backbone.context_limit,
    )
    task = build_task(ClassificationConfig(verbalizer=words or WORDS, **config), renderer)
    assert isinstance(task, Classification)
    return task


@pytest.fixture(scope="module")
def prompted() -> PromptedModel:
    backbone = Backbone(tiny_model("llama", dtype=torch.float64), tiny_tokenizer(), "tiny")
    initial = backbone.embeddings(torch.tensor([30, 40, 50]))
    model = PromptedModel(backbone, build_encoder(EncoderConfig(type="embedding"), initial, 0).double())
    model.eval()
    model.use()
    return model


def naive_scores(prompted: PromptedModel, task: Classification, record: dict[str, str]) -> list[float]:
    """Each label alone, one token after the other, from the whole softmax."""
    scores = []
    for words in task.config.verbalizer.values():
        ids = task.renderer.context(record)
        total = 0.0
        for token in task.renderer.answer_ids(words, end=False):
            one = torch.tensor([ids])
            with torch.no_grad():
                logits = prompted.backbone.logits(one, torch.ones_like(one))[0, -1]
            total += float(torch.log_softmax(logits, -1)[token])
            ids.append(token)
        scores.append(total)
    return scores


def test_scores_are_the_naive_ones_and_probabilities_their_softmax(prompted: PromptedModel) -> None:
    task = build(prompted.backbone, prompted.first_virtual_id)
    answers = task.predict(prompted.backbone, RECORDS, batch_size=7)
    for record, answer in zip(RECORDS, answers, strict=True):
        scores = torch.tensor(naive_scores(prompted, task, record))
        expected = scores.softmax(-1).tolist()
        assert list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
        assert answer["label"] == list(WORDS)[int(scores.argmax())]
        assert answer["probability"] == max(answer["probabilities"].values())


def test_a_verbalizer_of_single_tokens_costs_one_row_and_longer_ones_only_their_prefixes(
    prompted: PromptedModel,
) -> None:
    single = build(prompted.backbone, prompted.first_virtual_id, {"a": "a", "b": "b", "c": "c"})
    assert len(single.example({"text": "soup", "label": "b"}).rows) == 1
    shared = build(prompted.backbone, prompted.first_virtual_id, {"a": "xa", "b": "xb", "c": "c"})
    assert len(shared.example({"text": "soup", "label": "b"}).rows) == 1
    apart = build(prompted.backbone, prompted.first_virtual_id, {"a": "xya", "b": "xyb", "c": "zc"})
    assert len(apart.example({"text": "soup", "label": "b"}).rows) == 2


def test_batches_of_any_size_and_order_give_the_same_scores(prompted: PromptedModel) -> None:
    task = build(prompted.backbone, prompted.first_virtual_id)
    whole = task.predict(prompted.backbone, RECORDS, batch_size=64)
    for batch_size in (1, 3):
        for one, other in zip(whole, task.predict(prompted.backbone, RECORDS, batch_size=batch_size), strict=True):
            assert list(one["probabilities"].values()) == pytest.approx(list(other["probabilities"].values()), abs=1e-6)
    backwards = task.predict(prompted.backbone, RECORDS[::-1], batch_size=64)[::-1]
    assert [answer["label"] for answer in backwards] == [answer["label"] for answer in whole]


def test_the_loss_is_the_cross_entropy_over_labels_and_moves_the_prompt(prompted: PromptedModel) -> None:
    task = build(prompted.backbone, prompted.first_virtual_id)
    examples = [task.example(record) for record in RECORDS]
    prompted.train()
    loss = task.loss(prompted, examples, prompted.backbone.tokenizer.pad_token_id)
    (gradient,) = torch.autograd.grad(loss, prompted.encoder.embedding.weight)
    prompted.eval()
    prompted.use()
    expected = 0.0
    for record in RECORDS:
        scores = torch.tensor(naive_scores(prompted, task, record), dtype=torch.float64)
        expected -= float(torch.log_softmax(scores, -1)[list(WORDS).index(record["label"])])
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    assert bool((gradient.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_pads_on_either_side_change_nothing(family: str) -> None:
    backbone = Backbone(tiny_model(family), tiny_tokenizer(), family)
    task = build(backbone, backbone.vocabulary_size)
    task = task.with_renderer(task.renderer.without_virtual_tokens())  # type: ignore[assignment]
    rows = [task.example(record).rows[0] for record in RECORDS]
    logits = []
    for side in ("left", "right"):
        batch = collate(rows, 0, side)  # type: ignore[arg-type]
        last = batch.attention_mask.cumsum(-1).argmax(-1)
        positions = torch.nn.functional.one_hot(last, batch.input_ids.shape[1]).bool()
        with torch.no_grad():
            logits.append(backbone.logits(batch.input_ids, batch.attention_mask, positions))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-4)


def test_calibration_by_length_divides_and_by_prior_subtracts_the_empty_records_scores(prompted: PromptedModel) -> None:
    plain = build(prompted.backbone, prompted.first_virtual_id)
    by_length = build(prompted.backbone, prompted.first_virtual_id, calibration="length")
    by_prior = build(prompted.backbone, prompted.first_virtual_id, calibration="prior")
    record = RECORDS[2]
    scores = torch.tensor(naive_scores(prompted, plain, record))
    lengths = torch.tensor([len(plain.renderer.answer_ids(words, end=False)) for words in WORDS.values()])
    prior = torch.tensor(naive_scores(prompted, plain, {"text": ""}))
    for task, expected in ((by_length, scores / lengths), (by_prior, scores - prior)):
        (answer,) = task.predict(prompted.backbone, [record])
        assert list(answer["probabilities"].values()) == pytest.approx(expected.softmax(-1).tolist(), abs=1e-5)


def test_metrics_agree_with_scikit_learn(prompted: PromptedModel) -> None:
    from sklearn.metrics import f1_score

    task = build(prompted.backbone, prompted.first_virtual_id)
    metrics = task.evaluate(prompted.backbone, RECORDS)
    predicted = [answer["label"] for answer in task.predict(prompted.backbone, RECORDS)]
    right = [record["label"] for record in RECORDS]
    assert metrics["accuracy"] == sum(a == b for a, b in zip(predicted, right, strict=True)) / len(right)
    assert metrics["macro_f1"] == pytest.approx(f1_score(right, predicted, average="macro"))
    assert metrics["prediction_share"] == max(map(predicted.count, predicted)) / len(predicted)
    assert math.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"a": "x", "b": "x"}, "cannot be told apart: as tokens are equal; choose others"),
        ({"a": "xy", "b": "xyz"}, "cannot be told apart: as tokens the first begins the second; choose others"),
    ],
)
def test_label_words_that_cannot_be_told_apart_are_refused(
    prompted: PromptedModel, words: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(prompted.backbone, prompted.first_virtual_id, words)


def test_labels_outside_the_verbalizer_and_missing_ones_are_named(prompted: PromptedModel) -> None:
    task = build(prompted.backbone, prompted.first_virtual_id)
    with pytest.raises(
        DataError,
        match=r'^dev\.jsonl, line 4: the label "prase" is not in the verbalizer, which knows praise, .*'
        r'Did you mean "praise"\?$',
    ):
        task.example(Record({"text": "x", "label": "prase"}, "dev.jsonl, line 4"))
    with pytest.raises(DataError, match=r'^a record has no label: it lacks the field "label" and has text, lable; '):
        task.example({"text": "x", "lable": "praise"})


def test_yes_and_true_of_yaml_and_json_are_labels_like_others(prompted: PromptedModel) -> None:
    words: Any = {True: " great", False: " terrible"}
    task = build(prompted.backbone, prompted.first_virtual_id, words)
    assert task.example({"text": "x", "label": False}).target == 1
    assert task.label({"text": "x", "label": "true"}) == "true"
