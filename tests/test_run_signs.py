"""What a run says of itself where something looks wrong, and when it says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import RECORDS, TAGGING, backbone_of, settings
from tiny_models import tiny_model, tiny_tokenizer

from ptune import __version__
from ptune.config.candidates import SearchConfig
from ptune.errors import TrainingError
from ptune.models.backbone import Backbone
from ptune.records.data import data_hash
from ptune.records.record import Record
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.task import Assessment
from ptune.training.reporting import SearchReporter
from ptune.training.search import search
from ptune.training.signs import new_signs, no_gain
from ptune.training.train import train

LABELS = {"type": "classification", "verbalizer": {"good": " great", "bad": " terrible", "fair": " film"}}
GENERATION = {"type": "generation", "max_new_tokens": 3}
EXTRACTION = {"type": "extraction", "types": {"FOOD": "food", "SIGN": "sign"}, "max_new_tokens": 6}


class Warned(SearchReporter):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.latest: Mapping[str, float] = {}

    def evaluated(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        self.latest = metrics

    def warned(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def heard(self, part: str) -> int:
        return sum(part in sentence for sentence in self.sentences)


def told(losses: Sequence[float], **metrics: Sequence[float]) -> list[list[str]]:
    """Return what each evaluation after the first shows."""
    history = [
        {"step": 10.0 * number, "loss": loss, "accuracy": 0.5}
        | {name: values[number] for name, values in metrics.items()}
        for number, loss in enumerate(losses)
    ]
    return [new_signs(history[:count], "accuracy") for count in range(2, len(history) + 1)]


def test_a_loss_that_rises_over_the_best_is_told() -> None:
    ((said,),) = told([4, 7])
    assert said == (
        "dev loss is 7.000 and was 4.000 before training: it diverges or overfits; lower training.learning_rate, or "
        "take fewer steps"
    )
    nothing, (said,) = told([8, 1, 15.9])
    assert nothing == []
    assert said.startswith("dev loss is 15.900 and was 1.000 at step 10: it diverges")
    ((said,),) = told([1, 2.5])
    assert said == "dev loss is 2.500 and was 1.000 before training: it diverges; lower training.learning_rate"


def test_a_loss_that_rises_is_told_once_and_again_only_where_it_doubles_the_untrained_one() -> None:
    assert [len(signs) for signs in told([1, 0.2, 0.25, 0.29, 0.22])] == [0, 0, 0, 0]  # no run falls at every step
    overfitting = [1, 0.2, 0.31, 0.25, 0.35, 0.29, 0.4, 0.9]
    assert [len(signs) for signs in told(overfitting)] == [0, 1, 0, 0, 0, 0, 0]
    assert [len(signs) for signs in told([*overfitting, 2.1, 1.9, 5.0])] == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]


def test_constant_answers_are_told_as_they_begin_unless_all_are_right() -> None:
    shares, accuracy = [1.0, 0.99, 1.0, 0.6, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5, 0.5, 1.0]
    found = told([1.0] * 6, prediction_share=shares, accuracy=accuracy)
    assert [len(signs) for signs in found] == [1, 0, 0, 1, 0]
    assert found[0][0].startswith("nearly all predictions are one label: the prompt has learnt nothing yet but")


def test_a_start_that_nothing_beats_is_told() -> None:
    assert (no_gain(0, 30) or "").startswith("no evaluation in 30 steps was better than the untrained prompt")
    assert no_gain(0, 0) is None
    assert no_gain(10, 30) is None


def test_a_tagging_that_finds_no_entity_is_told(tmp_path: Path) -> None:
    """Entities are where chance puts them, so the tag of no entity is all that can be learnt."""
    chance = torch.Generator().manual_seed(0)
    parts = []
    for part in RECORDS:
        tags = [["B-X" if torch.rand((), generator=chance) < 0.08 else "O" for _ in one["tokens"]] for one in part]
        parts.append([Record(one | {"tags": own}, one.location) for one, own in zip(part, tags, strict=True)])
    heard = Warned()
    config = settings(tmp_path / "prompt", TAGGING, max_steps=30, learning_rate=0.01)
    train(config, backbone=backbone_of("llama"), records=(parts[0], parts[1]), reporter=heard)
    assert (heard.latest["entity_f1"], heard.latest["prediction_share"]) == (0.0, 1.0)
    assert heard.heard("nearly all answers are the same: the prompt has learnt nothing yet but the majority") == 1


@pytest.mark.parametrize(
    ("task", "right"),
    [
        (LABELS, "accuracy"),
        ({"type": "linear_classification"}, "accuracy"),
        ({"type": "linear_classification", "multi_label": True, "label_field": "topics"}, "exact_match"),
        (TAGGING, "token_accuracy"),
        (GENERATION | {"metric": "rouge_l"}, "exact_match"),
        (EXTRACTION, "exact_match"),
    ],
)
def test_every_task_says_how_alike_and_how_right_its_answers_are(
    tmp_path: Path, task: dict[str, Any], right: str
) -> None:
    config = settings(tmp_path / "prompt", task, max_steps=1)
    metrics = train(config, backbone=backbone_of("llama"), records=RECORDS).summary["after"]
    assert 0 <= metrics[right] <= 1
    assert 1 / len(RECORDS[1]) <= metrics["prediction_share"] <= 1


def test_texts_that_are_one_whatever_is_asked_are_told(tmp_path: Path) -> None:
    """Where the loss chooses, no text is written before the end."""
    learnt, asked = ([Record(one | {"output": "soup"}, one.location) for one in part] for part in RECORDS)
    asked[0]["output"] = "good"
    heard = Warned()
    config = settings(
        tmp_path / "prompt", GENERATION, {"template": "{text}[P*8]{answer}"}, max_steps=100, learning_rate=0.03
    )
    train(config, backbone=backbone_of("llama"), records=(learnt, asked), reporter=heard)
    assert heard.heard("all 8 answers with the prompt are one and the same text, whatever is asked") == 1


def _against() -> tuple[list[Record], list[Record]]:
    """Return records to learn, and dev records of which all is the other way round."""
    other = {"good": "bad", "bad": "good"}
    rows = [one for one in RECORDS[0] if one["label"] in other]
    return rows, [Record(one | {"label": other[one["label"]]}, one.location) for one in rows]


def test_a_run_and_a_search_say_where_no_evaluation_beat_the_start(tmp_path: Path) -> None:
    task = LABELS | {"verbalizer": {"good": " great", "bad": " terrible"}}
    backbone = backbone_of("llama")
    heard = Warned()
    config = settings(tmp_path / "prompt", task, {"start": {"method": "labels"}}, max_steps=60, evaluations=1)
    prompt = train(config, backbone=backbone, records=_against(), reporter=heard)
    assert prompt.summary["best_step"] == 0
    assert heard.heard("no evaluation in 60 steps was better than the untrained prompt") == 1
    searched = Warned()
    config = settings(tmp_path / "search", task, {"start": {"method": "labels"}}, max_steps=60, evaluations=1)
    found = search(
        config,
        SearchConfig(vary={"training.learning_rate": (0.02, 0.03)}),
        backbone=backbone,
        records=_against(),
        reporter=searched,
    )
    assert found.summary["best_step"] == 0
    assert searched.heard("no evaluation in 60 steps was better than the untrained prompt") == 1
    assert (tmp_path / "search" / "run" / "comparison.json").is_file()


def _deaf_model(attention: float) -> Backbone:
    """Return a model in which a token hears others by so much only."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= attention
    return Backbone(model, tiny_tokenizer("llama"), "deaf")


def test_a_prompt_that_nobody_hears_has_no_gradient(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="^no gradient reaches the virtual tokens at the first step; the loss does"):
        train(settings(tmp_path / "prompt", LABELS), backbone=_deaf_model(0.0), records=RECORDS)
    headed = settings(tmp_path / "head", {"type": "linear_classification"})
    with pytest.raises(TrainingError, match="no gradient reaches the virtual tokens"):  # the head has one, all the same
        train(headed, backbone=_deaf_model(0.0), records=RECORDS)


def test_a_run_that_changes_no_answer_says_so(tmp_path: Path) -> None:
    heard = Warned()
    config = settings(tmp_path / "prompt", LABELS, learning_rate=1e-9, max_steps=2)
    train(config, backbone=_deaf_model(1e-4), records=RECORDS, reporter=heard)
    assert heard.heard("the prompt changes no answer: train longer, or at another learning rate") == 1


def test_a_comparison_that_cannot_be_stored_does_not_undo_a_run(tmp_path: Path) -> None:
    class Occupying(Warned):
        def assessed(self, assessment: Assessment, sentence: str) -> None:
            (tmp_path / "prompt" / "run" / "comparison.json").mkdir()  # no file takes the place of a folder

    heard = Occupying()
    prompt = train(
        settings(tmp_path / "prompt", LABELS), backbone=backbone_of("llama"), records=RECORDS, reporter=heard
    )
    assert torch.equal(SoftPrompt.load(tmp_path / "prompt").rows, prompt.rows)
    assert heard.heard("the soft prompt is saved, but not its comparison with the bare model: cannot write") == 1


def test_a_soft_prompt_tells_of_its_run(tmp_path: Path) -> None:
    train(settings(tmp_path / "prompt", LABELS, max_steps=2, seed=7), backbone=backbone_of("llama"), records=RECORDS)
    summary = SoftPrompt.load(tmp_path / "prompt").summary
    assert (summary["training"]["seed"], summary["steps"]) == (7, 2)
    assert summary["versions"] == {"ptune": __version__, "torch": torch.__version__} | {
        name: __import__(name).__version__ for name in ("transformers", "accelerate")
    }
    assert (summary["device"], summary["dtype"]) == ("cpu", "float32")
    assert summary["data_hash"] == data_hash(RECORDS[0])
    assert (summary["train_examples"], summary["dev_records"]) == (len(RECORDS[0]), len(RECORDS[1]))
