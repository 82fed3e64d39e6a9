"""The temperature of probabilities: fitted on dev, kept with the soft prompt, used by whoever answers; labels stay."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from soft_prompts import make
from tiny_models import tiny_model, tiny_tokenizer
from torch.nn import functional

from ptune import Engine, Reporter, RunConfig, SoftPrompt, SoftPromptError, train
from ptune.config.file import config_yaml
from ptune.config.task import ClassificationConfig
from ptune.errors import ConfigError
from ptune.models.backbone import Backbone
from ptune.records.record import Record
from ptune.tasks.calibration import fit_temperature, reliability
from ptune.tasks.task import Assessment
from ptune.training.assembly import assemble
from ptune.training.dev_assessment import assess_dev, temperature_sentence

WORDS = ["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"]
SCRIPT = """
import os, sys
from pathlib import Path
from ptune.config.file import load_config
from ptune.training.train import train
prompt = train(load_config(sys.argv[1]))
Path(sys.argv[1] + os.environ["RANK"]).write_text(repr(prompt.temperature))
"""


def drawn(scale: float, count: int = 400, answers: int = 3) -> tuple[torch.Tensor, list[int]]:
    """Scores ``scale`` times too far apart, and answers drawn by the scores as they should be."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(count, answers, generator=generator) * 2
    return scores * scale, torch.multinomial(scores.softmax(-1), 1, generator=generator).flatten().tolist()


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_is_that_of_the_least_negative_log_likelihood(scale: float) -> None:
    scores, targets = drawn(scale)
    fitted = fit_temperature(scores, targets).value
    assert fitted is not None
    grid = torch.logspace(-1.3, 1.3, 2000, dtype=torch.float64)
    losses = [float(functional.cross_entropy(scores.double() / t, torch.tensor(targets))) for t in grid]
    assert fitted == pytest.approx(float(grid[losses.index(min(losses))]), rel=5e-3)
    assert 0.8 * scale < fitted < 1.25 * scale


def test_choices_of_which_the_first_is_always_right_have_a_temperature(tmp_path: Path) -> None:
    chance = random.Random(0)
    rows = [Record({"text": " ".join(chance.sample(WORDS, 3)), "one": "good", "two": "bad"}) for _ in range(60)]
    config = RunConfig.model_validate(
        {
            "task": {"type": "choice", "choices": ["one", "two"], "label_by": "number"},
            "prompt": {"template": "{text}[P*2]{answer}"},
            "output": tmp_path / "prompt",
        }
    )
    for row in rows:
        row["label"] = 0
    parts = assemble(config, Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny"), (rows, rows))
    with parts.prompted:
        parts.prompted.use()
        answers = parts.task.predict(parts.prompted.backbone, rows, batch_size=8)
        for row, answer in zip(rows, answers, strict=True):
            if (answer["label"] == "one") == (chance.random() < 0.25):  # so three in four are answered rightly
                row["one"], row["two"] = row["two"], row["one"]
        assessed = assess_dev(parts, batch_size=8)
    assert assessed is not None
    assert assessed[0].metrics["accuracy"] > 0.5
    assert assessed[0].temperature is not None, assessed[1]


@pytest.mark.parametrize(
    ("scores", "targets", "why"),
    [
        (torch.eye(2)[[0, 1] * 20], [0, 1] * 20, "40 held-out records are too few for a temperature, which takes 50"),
        (torch.randn(60, 2), [1] * 60, "all held-out records are of one label"),
        (torch.eye(2)[[0, 1] * 40], [0, 1] * 40, "so well that no temperature fits best"),
        (torch.eye(2)[[0, 1] * 40], [1, 0] * 40, "scores say too little about held-out records"),
        (torch.zeros(80, 2), [0, 1] * 40, "no temperature fits best"),
    ],
    ids=["few", "one-label", "all-right", "all-wrong", "flat"],
)
def test_where_no_temperature_can_be_had_it_says_why(scores: torch.Tensor, targets: list[int], why: str) -> None:
    fitted = fit_temperature(scores, targets)
    assert fitted.value is None
    assert why in fitted.why


def test_bins_hold_every_prediction_once() -> None:
    scores, targets = drawn(1.0)
    bins = reliability(scores.softmax(-1), torch.tensor(targets))
    assert sum(one.records for one in bins) == len(targets)
    assert all(low.confidence < high.confidence for low, high in zip(bins, bins[1:], strict=False))
    right = (scores.argmax(-1) == torch.tensor(targets)).sum()
    assert sum(one.accuracy * one.records for one in bins) == pytest.approx(float(right))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and records of which every eighth has the wrong label, so that nobody can be sure."""
    folder = tmp_path_factory.mktemp("calibration")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    chance = random.Random(0)
    for name, count in (("train", 60), ("dev", 60), ("small", 20)):
        rows = []
        for number in range(count):
            good = chance.random() < 0.5
            text = " ".join(chance.sample(WORDS, 3) + ["great" if good else "terrible"])
            rows.append({"text": text, "label": "good" if good == (number % 8 > 0) else "bad"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def config_of(folder: Path, output: Path, dev: str = "dev", **task: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": str(folder / "model"),
            "data": {"train": str(folder / "train.jsonl"), "dev": str(folder / f"{dev}.jsonl")},
            "task": {"type": "classification", "verbalizer": {"good": " good", "bad": " bad"}} | task,
            "prompt": {"template": "{text}[P*4]{answer}", "encoder": {"type": "embedding"}},
            "training": {"max_steps": 80, "batch_size": 8, "evaluations": 2, "learning_rate": 0.02, "samples": 0},
            "output": str(output),
        }
    )


def test_a_calibration_error_that_rises_is_told_with_what_the_fit_is_to() -> None:
    said = temperature_sentence(0.984, "fitted on 60 held-out records", 0.019, 0.032)
    assert said.endswith(
        "-> 0.032, labels unchanged; the fit is to the likelihood of the right labels, which rose even so"
    )
    assert temperature_sentence(0.5, "fitted on 60 held-out records", 0.032, 0.019).endswith(", labels unchanged")


class Listener(Reporter):
    """Remembers what dev said at the end."""

    def assessed(self, assessment: Assessment, sentence: str) -> None:
        self.assessment, self.sentence = assessment, sentence


@pytest.fixture(scope="module")
def calibrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a temperature."""
    listener, output = Listener(), tmp_path_factory.mktemp("runs") / "prompt"
    prompt = train(config_of(folder, output), reporter=listener)
    assert prompt.temperature is not None
    assert f"temperature {prompt.temperature:.3g}, fitted on 60 held-out records: calibration" in listener.sentence
    assert "labels unchanged" in listener.sentence
    return output


def test_a_run_keeps_its_temperature_and_what_dev_said(calibrated: Path, folder: Path) -> None:
    prompt = SoftPrompt.load(calibrated)
    told = json.loads((calibrated / "run" / "assessment.json").read_text(encoding="utf-8"))
    assert told["calibration"]["temperature"] == prompt.temperature
    assert told["labels"] == ["good", "bad"]
    assert sum(map(sum, told["confusion"])) == 60
    with Engine.for_prompt(calibrated) as engine:
        records = [json.loads(line) for line in (folder / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
        metrics = engine.evaluate("prompt", records)
    assert metrics == pytest.approx(told["metrics"], abs=1e-5)
    assert {name: prompt.summary["after"][name] for name in ("accuracy", "loss")} == pytest.approx(
        {name: metrics[name] for name in ("accuracy", "loss")}, abs=1e-5
    )
    assert metrics["calibration_error_before"] == pytest.approx(prompt.summary["after"]["calibration_error"], abs=1e-5)


def test_probabilities_are_divided_by_the_temperature_and_labels_stay(calibrated: Path) -> None:
    texts = [f"{word} {end}" for word in WORDS for end in ("great", "terrible", "wonder")]
    prompt = SoftPrompt.load(calibrated)
    assert prompt.temperature is not None
    with Engine.for_prompt(calibrated) as engine:
        engine.add("plain", replace(prompt, temperature=None))
        with_one, without = engine.classify("prompt", texts), engine.classify("plain", texts)
        mixed = engine.predict(["prompt"] * len(texts), [{"text": text} for text in texts])
    for one, other, third in zip(with_one, without, mixed, strict=True):
        assert one["label"] == other["label"] == third["label"]
        scores = torch.tensor(list(other["probabilities"].values()), dtype=torch.float64).log()
        expected = (scores / prompt.temperature).softmax(-1).tolist()
        assert list(one["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
        assert list(third["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        assert one["probability"] == max(one["probabilities"].values())
    assert max(abs(one["probability"] - other["probability"]) for one, other in zip(with_one, without, strict=True)) > 0


@pytest.mark.parametrize(
    ("dev", "task", "why"),
    [
        ("small", {}, "no temperature: 20 held-out records are too few"),
        ("dev", {"fit_temperature": False}, "no temperature: task.fit_temperature is off"),
    ],
)
def test_without_a_temperature_probabilities_stay(
    folder: Path, tmp_path: Path, dev: str, task: dict[str, Any], why: str
) -> None:
    listener = Listener()
    prompt = train(config_of(folder, tmp_path / "prompt", dev, **task), reporter=listener)
    assert prompt.temperature is None
    assert why in listener.sentence
    assert "calibration_error_before" not in listener.assessment.metrics
    assert listener.assessment.before == listener.assessment.after


def test_a_soft_prompt_from_before_temperatures_loads_as_it_was(tmp_path: Path) -> None:
    backbone = Backbone(tiny_model("gpt2"), tiny_tokenizer(), "tiny")
    make(backbone, temperature=2.5).save(tmp_path / "new")
    assert SoftPrompt.load(tmp_path / "new").temperature == 2.5
    file = tmp_path / "new" / "ptune.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["temperature"], values["task"]["fit_temperature"]
    file.write_text(json.dumps(values), encoding="utf-8")
    assert SoftPrompt.load(tmp_path / "new").temperature is None
    file.write_text(json.dumps(values | {"temperature": 0}), encoding="utf-8")
    with pytest.raises(SoftPromptError, match="temperature takes a number greater than 0"):
        SoftPrompt.load(tmp_path / "new")
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SoftPromptError, match="a temperature is a number above 0"):
            make(backbone, temperature=wrong)


def test_two_processes_agree_on_the_temperature(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(config_yaml(config_of(folder, tmp_path / "two")), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0", str(tmp_path / "script.py"), str(tmp_path / "run.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launcher, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"run.yaml{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert told == [repr(SoftPrompt.load(tmp_path / "two").temperature)] * 2
    assert "None" not in told


def test_evaluation_weighs_labels_as_training_does_and_a_resumed_run_keeps_the_weights(
    folder: Path, tmp_path: Path
) -> None:
    backbone = Backbone.load(str(folder / "model"))
    records = [json.loads(line) for line in (folder / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    words = {"good": " good", "bad": " bad"}
    with Engine(backbone) as engine:
        for name, weights in (("plain", {}), ("weighted", {"bad": 3.0})):
            engine.add(name, make(backbone, task=ClassificationConfig(verbalizer=words, label_weights=weights)))
        plain, weighted = (engine.evaluate(name, records) for name in ("plain", "weighted"))
        task = engine.prompts["weighted"].task
        examples = [example for record in records if (example := task.example(record)) is not None]
        loss = float(task.loss(backbone, examples, backbone.tokenizer.pad_token_id)) / len(records)
    assert weighted["loss"] == pytest.approx(loss, rel=1e-5)
    assert weighted["loss"] > plain["loss"]
    assert weighted["accuracy"] == plain["accuracy"]
    config = config_of(folder, tmp_path / "prompt", label_weights={"bad": 3.0})
    whole = train(config, backbone=backbone)
    assert torch.equal(train(config, backbone=backbone, resume=True).rows, whole.rows)
    with pytest.raises(ConfigError, match=r"task\.label_weights"):
        train(config_of(folder, tmp_path / "prompt", label_weights={"bad": 2.0}), backbone=backbone, resume=True)
