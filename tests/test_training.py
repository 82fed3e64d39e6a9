"""The loop: it learns, resumes to the last bit after any kill, refuses what cannot be, leaves the backbone alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.file import config_yaml
from ptune.config.run import EncoderConfig, RunConfig
from ptune.engine.engine import Engine
from ptune.errors import ConfigError, DataError, MissingExtraError, OutputError, SoftPromptError, Stopped, TrainingError
from ptune.models.backbone import Backbone
from ptune.records.conversations import Exchange
from ptune.records.record import Record
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.assembly import assemble
from ptune.training.checkpoint import Progress
from ptune.training.comparison import Comparison
from ptune.training.learner import Learner
from ptune.training.reporting import Reporter
from ptune.training.step_plan import StepPlan
from ptune.training.train import train

WORDS = ["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two small sets of records, on disk."""
    folder = tmp_path_factory.mktemp("training")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    chance = random.Random(0)
    for name, count in (("train", 48), ("dev", 24)):
        rows = []
        for _ in range(count):
            good = chance.random() < 0.5
            text = " ".join(chance.sample(WORDS, chance.randint(1, 5)) + ["great" if good else "terrible"])
            label, output = ("positive", "good") if good else ("negative", "bad")
            rows.append({"text": text, "label": label, "output": output})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def settings(folder: Path, output: Path, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": str(folder / "model"),
            "data": {"train": str(folder / "train.jsonl"), "dev": str(folder / "dev.jsonl")},
            "task": {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}},
            "prompt": {
                "template": "{text}[P*4]{answer}",
                "encoder": {"type": "mlp", "hidden_size": 16, "dropout": 0.1},
            },
            "training": {"max_steps": 12, "batch_size": 4, "gradient_accumulation_steps": 2, "evaluations": 3}
            | training,
            "output": str(output),
        }
    )


class Listener(Reporter):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.warnings: list[str] = []

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        self.losses.append(loss)

    def evaluated(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        self.metrics.append(dict(metrics))

    def warned(self, sentence: str) -> None:
        self.warnings.append(sentence)

    def finished(self, prompt: SoftPrompt, progress: Progress, comparison: Comparison | None) -> None:
        self.progress, self.comparison = progress, comparison


def _hashes(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def test_a_run_learns_and_moves_no_bit_of_the_backbone(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(str(folder / "model"))
    before = _hashes(backbone.model)
    listener = Listener()
    config = settings(folder, tmp_path / "prompt", max_steps=60, learning_rate=0.02)
    prompt = train(config, backbone=backbone, reporter=listener)
    assert _hashes(backbone.model) == before
    assert listener.metrics[-1]["loss"] < listener.metrics[0]["loss"] - 0.1
    assert prompt.summary["after"]["accuracy"] > prompt.summary["before"]["accuracy"]
    assert torch.equal(SoftPrompt.load(config.output).rows, prompt.rows)


def test_the_saved_prompt_is_the_best_evaluation_not_the_last(folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    config = settings(folder, tmp_path / "prompt", max_steps=20, learning_rate=3.0, schedule="constant", evaluations=10)
    prompt = train(config, reporter=listener)
    best = max(listener.metrics, key=lambda metrics: metrics["accuracy"])
    assert prompt.summary["after"]["accuracy"] == best["accuracy"]


@pytest.mark.parametrize(("answer", "gains"), [("good", True), ("waiter", False)])
def test_of_equal_evaluations_that_of_least_loss_is_saved(
    folder: Path, tmp_path: Path, answer: str, gains: bool
) -> None:
    listener = Listener()
    never_right = {"type": "generation", "metric": "exact_match", "max_new_tokens": 1, "answer_field": "output"}
    config = settings(folder, tmp_path / "prompt", max_steps=9, learning_rate=0.1, schedule="constant")
    config = RunConfig.model_validate(
        config.model_dump() | {"task": never_right, "prompt": {"template": "[P*4]{answer}"}}
    )
    learnt, scored = ([Record({"output": f"{text} soup"}, "here")] * 8 for text in ("good", answer))
    prompt = train(config, records=(learnt, scored), reporter=listener)
    losses = [metrics["loss"] for metrics in listener.metrics]
    assert {metrics["exact_match"] for metrics in listener.metrics} == {0.0}
    assert prompt.summary["best_step"] == 3 * losses.index(min(losses)) > 0
    assert (prompt.summary["best_step"] == 9) is gains
    assert prompt.summary["after"]["loss"] == min(losses)
    assert listener.progress.evaluations_without_gain == 3  # early stopping goes by the metric


def test_each_plan_is_told_once_with_its_reason(folder: Path, tmp_path: Path) -> None:
    class Plans(Reporter):
        def __init__(self) -> None:
            self.told: list[tuple[str, str]] = []

        def planned(self, plan: str, why: str) -> None:
            self.told.append((plan, why))

    for plan in ("auto", "reference"):
        config = settings(folder, tmp_path / plan, plan=plan, max_steps=3, evaluations=1)
        in_front = config.prompt.model_copy(update={"template": "[P*4]{text}{answer}"})
        heard = Plans()
        train(config.model_copy(update={"prompt": in_front}), reporter=heard)
        names = [name for name, _ in heard.told]
        assert len(names) == len(set(names)) > 0
        if plan == "reference":
            assert heard.told == [("reference", "training.plan says so")]
        else:
            assert set(names) <= {"packed rows", "shared prefix"}
            assert all("4 virtual tokens open every row" in why for _, why in heard.told)


def test_the_same_seed_gives_the_same_prompt_and_another_seed_another(folder: Path, tmp_path: Path) -> None:
    one, same, other = (
        train(settings(folder, tmp_path / name, seed=seed)).rows for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_accumulation_weighs_tokens_so_that_one_by_eight_is_eight_by_one(folder: Path, tmp_path: Path) -> None:
    plans = []
    for name, batch_size, accumulation in (("a", 1, 8), ("b", 8, 1)):
        values = settings(folder, tmp_path / name).model_dump(mode="json")
        values["task"] = {"type": "generation"}
        values["prompt"]["encoder"]["dropout"] = 0.0
        values["data"]["limit"] = 8
        values["training"] |= {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_steps": 5}
        listener = Listener()
        rows = train(RunConfig.model_validate(values), reporter=listener).rows
        plans.append((rows, listener.losses))
    torch.testing.assert_close(plans[0][0], plans[1][0], rtol=1e-4, atol=1e-6)
    assert plans[0][1] == pytest.approx(plans[1][1], rel=1e-5)


SCRIPT = """
import sys
from ptune.config.file import load_config
from ptune.training.train import train
train(load_config(sys.argv[1]), resume=sys.argv[2] == "resume")
"""


def _spawn(config: Path, mode: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(config), mode], env=environment, stderr=subprocess.PIPE)


def test_after_kills_at_random_moments_a_resumed_run_ends_as_the_unbroken_one(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    unbroken = settings(folder, tmp_path / "unbroken", max_steps=40, checkpoint_minutes=1e-9)
    file.write_text(config_yaml(unbroken), encoding="utf-8")
    # in a process like the others, for sums depend on the number of threads
    _, errors = (process := _spawn(file, "new")).communicate()
    assert process.returncode == 0, errors.decode()
    whole = SoftPrompt.load(unbroken.output).rows
    broken = unbroken.model_copy(update={"output": tmp_path / "broken"})
    file.write_text(config_yaml(broken), encoding="utf-8")
    chance, kills = random.Random(7), 0
    checkpoint = broken.output / "run" / "checkpoint.safetensors"
    for attempt in range(40):
        process = _spawn(file, "resume" if (broken.output / "run" / "config.yaml").exists() else "new")
        # the first moments are imports; wait until this attempt writes, then strike somewhere in a step or a save
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.15)
        if process.poll() is None and attempt < 5:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        if process.returncode == 0:
            break
    assert kills >= 3
    assert torch.equal(SoftPrompt.load(broken.output).rows, whole)


def test_ctrl_c_saves_and_resume_goes_on(folder: Path, tmp_path: Path) -> None:
    class Interrupting(Reporter):
        def stepped(self, step: int, loss: float, learning_rate: float) -> None:
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    whole = train(settings(folder, tmp_path / "whole")).rows
    config = settings(folder, tmp_path / "stopped")
    with pytest.raises(Stopped, match=r"stopped after step 5; .*--resume"):
        train(config, reporter=Interrupting())
    assert not (config.output / "ptune.json").exists()
    assert torch.equal(train(config, resume=True).rows, whole)


def test_a_folder_with_another_run_is_refused_and_overwritten_only_when_asked(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path / "prompt", max_steps=1)
    first = train(config)
    with pytest.raises(OutputError, match="another run; choose another --output, or --resume it, or --overwrite it"):
        train(config)
    again = train(config, overwrite=True)
    assert torch.equal(first.rows, again.rows)


def test_resume_with_other_settings_names_them(folder: Path, tmp_path: Path) -> None:
    train(settings(folder, tmp_path / "prompt", max_steps=1))
    with pytest.raises(ConfigError, match=r"training\.learning_rate, training\.seed differ"):
        train(settings(folder, tmp_path / "prompt", max_steps=1, seed=5, learning_rate=0.1), resume=True)


def test_nothing_to_resume_and_foreign_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run to resume"):
        train(settings(folder, tmp_path / "none"), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(OutputError, match=r"holds thesis\.txt"):
        train(settings(folder, tmp_path / "mine"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_mend(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(str(folder / "model"))
    config = settings(folder, tmp_path / "prompt", learning_rate=1e30, schedule="constant", warmup_ratio=0.0)
    with pytest.raises(TrainingError, match=r"at step \d+ the loss is .* lower training\.learning_rate"):
        train(config, backbone=backbone)
    assert (config.output / "run" / "checkpoint.safetensors").exists()


def test_divergence_is_warned_of(folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    config = settings(folder, tmp_path / "prompt", learning_rate=0.05, max_steps=80)
    words = {"positive": "great", "negative": "terrible"}
    rows = [Record({"text": f"{words[label]} soup {n}", "label": label}) for n in range(16) for label in words]
    other = {"positive": "negative", "negative": "positive"}
    against = [
        Record({"text": row["text"], "label": other[row["label"]]}) for row in rows
    ]  # the more it learns, the worse
    train(config, records=(rows, against), reporter=listener)
    assert any("it diverges" in warning for warning in listener.warnings)


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_a_first_evaluation_that_is_no_number_does_not_stay_the_best(folder: Path, tmp_path: Path, metric: str) -> None:
    values = settings(folder, tmp_path / "prompt").model_dump(mode="json")
    values["task"] = {"type": "generation", "max_new_tokens": 2, "metric": metric}
    rows = [Record({"text": f"{number} soup", "output": "good"}) for number in range(4)]
    parts = assemble(RunConfig.model_validate(values), Backbone.load(str(folder / "model")), (rows, rows))
    with parts.prompted:
        learner = Learner(parts.config, parts)
        start = {name: tensor.clone() for name, tensor in parts.prompted.encoder.state_dict().items()}
        with torch.no_grad():
            for parameter in parts.prompted.encoder.parameters():
                parameter.fill_(math.nan)
        assert math.isnan(learner.evaluate(Listener())["loss"])
        parts.prompted.encoder.load_state_dict(start)
        learner.progress.step = 1
        learner.evaluate(Listener())
    assert learner.progress.best_step == 1
    assert learner.progress.evaluations_without_gain == (0 if metric == "loss" else 1)
    assert torch.isfinite(learner.best["rows"]).all()


def test_constant_predictions_are_warned_of(folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    config = settings(folder, tmp_path / "prompt", learning_rate=1e-9, max_steps=2)
    one_label = [Record({"text": f"soup {n}", "label": "positive" if n < 9 else "negative"}) for n in range(10)]
    train(config, records=(one_label, one_label[:1] * 8), reporter=listener)
    assert any("nearly all predictions are one label" in warning for warning in listener.warnings)


def test_a_run_is_compared_with_the_bare_model(folder: Path, tmp_path: Path) -> None:
    learnt = Listener()
    train(settings(folder, tmp_path / "learnt", max_steps=60, learning_rate=0.05), reporter=learnt)
    assert learnt.comparison is not None
    assert 0 < learnt.comparison.changed <= learnt.comparison.total
    assert learnt.comparison.shift is not None
    assert learnt.comparison.shift > 0.05
    assert not any("changes no answer" in warning for warning in learnt.warnings)
    stored = json.loads((tmp_path / "learnt" / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert stored == learnt.comparison.values()
    assert stored["changed"] == learnt.comparison.changed


@pytest.mark.parametrize(
    ("comparison", "said"),
    [
        (Comparison(0, 8), "the prompt changes no answer: train"),
        (Comparison(0, 8, shift=0.001), "the prompt changes no answer: train"),
        (Comparison(0, 8, shift=0.2), "changes no answer, though probabilities move by 0.20 on average: train"),
        (Comparison(0, 8, shift=0.2, by_head=True), "none of the linear head's answers, though probabilities move"),
        (Comparison(8, 8, all_alike=True), "all 8 answers with the prompt are one and the same text"),
    ],
)
def test_what_is_said_where_a_prompt_changes_no_answer_or_makes_all_one(comparison: Comparison, said: str) -> None:
    assert said in (comparison.warning or "")
    assert Comparison(1, 8, shift=0.001).warning is None


def test_a_generation_run_ends_with_a_question_off_the_task(folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    values = settings(folder, tmp_path / "prompt", max_steps=4, learning_rate=0.5).model_dump(mode="json")
    values["task"] = {"type": "generation", "answer_field": "label", "max_new_tokens": 6}
    train(RunConfig.model_validate(values), reporter=listener)
    assert listener.comparison is not None
    assert listener.comparison.off_task is not None
    question, bare, tuned = listener.comparison.off_task
    assert question.endswith("?")
    assert bare != tuned


def test_a_template_without_a_question_has_none_off_the_task(folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    values = settings(folder, tmp_path / "prompt", max_steps=1).model_dump(mode="json")
    values["task"] = {"type": "generation", "max_new_tokens": 4}
    values["prompt"]["template"] = "[P*4]{system}{answer}"
    rows = [Record({"system": f"{number} film", "output": "good"}) for number in range(8)]
    train(RunConfig.model_validate(values), records=(rows, rows), reporter=listener)
    assert listener.comparison is not None
    assert listener.comparison.total == 8
    assert listener.comparison.off_task is None


def test_a_bare_model_that_cannot_read_an_empty_record_is_asked_without_prior(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener()
    values = settings(folder, tmp_path / "prompt", max_steps=1).model_dump(mode="json")
    values["task"]["calibration"] = "prior"
    prompt = train(RunConfig.model_validate(values), reporter=listener)
    assert "scores are taken without calibration by a prior" in caplog.text
    assert listener.comparison is not None
    assert listener.comparison.total == 24
    assert prompt.task.calibration == "prior"


def test_warnings_reach_the_log_of_who_gives_no_reporter(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(folder, tmp_path / "prompt", max_steps=1)
    record = Record({"text": "a great soup", "label": "positive"})
    train(config, records=([record] * 4, [record] * 4))
    assert "1 of 2 labels have no training record (negative)" in caplog.text
    assert "1 of 2 labels have no dev record (negative)" in caplog.text


@pytest.mark.parametrize(
    "task",
    [
        {"type": "classification", "verbalizer": {"positive": " good film", "negative": " bad"}},
        {"type": "linear_classification"},
        {"type": "choice", "choices": ["good", "bad"]},
    ],
    ids=lambda task: task["type"],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_texts_that_are_cut_are_counted(family: str, task: dict[str, Any], tmp_path: Path) -> None:
    backbone = Backbone(tiny_model(family), tiny_tokenizer(family), "tiny")
    values = settings(tmp_path, tmp_path / "prompt").model_dump(mode="json") | {"task": task}
    values["prompt"]["max_length"] = 20
    fields = {"good": "a film", "bad": "a soup"}
    rows = [
        Record({"text": "soup " * 9 * (number % 4 == 0) + "film", "label": label, **fields})
        for number, label in enumerate((["good", "bad"] if task["type"] == "choice" else ["positive", "negative"]) * 6)
    ]
    parts = assemble(RunConfig.model_validate(values), backbone, (rows, rows))
    with parts.prompted:
        assert parts.cut == 3
        whole = backbone.tokenizer.tokenize(rows[0]["text"])
        for example, record in zip(parts.train, rows, strict=True):
            for row in example.rows:
                assert (row.cut > 0) == (record["text"] == rows[0]["text"])
                assert row.cut <= len(whole)


def test_exchanges_that_a_label_s_context_leaves_out_are_told(folder: Path, tmp_path: Path) -> None:
    values = settings(folder, tmp_path / "prompt").model_dump(mode="json")
    values["prompt"] |= {"template": "[P*4]{instruction} so{answer}", "max_length": 20}
    rows = []
    for number in range(4):
        rows.append(Record({"instruction": f"{number} film", "label": ["positive", "negative"][number % 2]}))
        rows[-1].history = (Exchange({"instruction": "soup " * 20}, "good"),) * (number % 2)
    parts = assemble(RunConfig.model_validate(values), Backbone.load(str(folder / "model")), (rows, rows))
    with parts.prompted:
        assert any("2 exchanges of 2 conversations, the oldest of each, are too long" in note for note in parts.notes)


def test_mistakes_in_dev_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path / "prompt")
    good, wrong = Record({"text": "a", "label": "positive"}), Record({"text": "a", "label": "neutral"}, "dev, line 3")
    with pytest.raises(DataError, match=r'dev, line 3: the label "neutral" is not in the verbalizer'):
        train(config, records=([good], [good, wrong]))
    with pytest.raises(DataError, match="there are no dev records"):
        train(config, records=([good], []))
    assert not config.output.exists()


def test_data_is_read_before_a_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    values = settings(folder, tmp_path / "prompt").model_dump(mode="json")
    values["model"]["name"] = str(tmp_path / "absent")
    values["data"] = {"train": str(tmp_path / "nothing.jsonl")}
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        train(RunConfig.model_validate(values))


def test_a_run_leaves_backbone_and_random_generator_as_they_were(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(str(folder / "model"))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    train(settings(folder, tmp_path / "one", gradient_checkpointing=True, plan="reference"), backbone=backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.plan == "auto"
    assert not any(getattr(module, "gradient_checkpointing", False) for module in backbone.model.modules())
    train(settings(folder, tmp_path / "two"), backbone=backbone)
    assert len(backbone.plans.contexts) == 0


def test_training_goes_on_beside_an_engine_on_the_same_backbone(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(str(folder / "model"))
    alone = train(settings(folder, tmp_path / "alone", context_cache="0"), backbone=backbone)
    with Engine(backbone) as engine:
        engine.add("other", alone)
        answers = engine.classify("other", ["a great soup"])
        beside = train(settings(folder, tmp_path / "beside", context_cache="0"), backbone=backbone)
        assert engine.classify("other", ["a great soup"]) == answers
    torch.testing.assert_close(beside.rows, alone.rows, rtol=1e-5, atol=1e-6)


def test_early_stopping_counts_evaluations_without_gain(folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    config = settings(folder, tmp_path / "prompt", learning_rate=1e-9, max_steps=40, evaluations=20, patience=2)
    train(config, reporter=listener)
    assert listener.progress.step == 4


class KilledError(Exception):
    """Stands for a kill at a chosen moment."""


def test_early_stopping_and_the_best_step_are_the_same_wherever_a_run_was_broken(folder: Path, tmp_path: Path) -> None:
    """A resumed run counts the evaluations that were done before, and saves rows that it has not computed itself."""

    def run(name: str, *, interrupt: int | None = None, kill: int | None = None) -> SoftPrompt:
        config = settings(
            folder,
            tmp_path / name,
            learning_rate=0.02,
            schedule="constant",
            max_steps=40,
            evaluations=40,
            patience=4,
            checkpoint_minutes=1e-9,
        )

        class Breaking(Reporter):
            def stopped_early(self, step: int, patience: int) -> None:
                if kill == -1:
                    raise KilledError

            def stepped(self, step: int, loss: float, learning_rate: float) -> None:
                if step == kill:
                    raise KilledError
                if step == interrupt:
                    os.kill(os.getpid(), signal.SIGINT)

        if interrupt is None and kill is None:
            return train(config)
        with pytest.raises((KilledError, Stopped)):
            train(config, reporter=Breaking())
        return train(config, resume=True)

    whole = run("whole")
    best, end = whole.summary["best_step"], whole.summary["steps"]
    assert 1 < best < end - 2 < end < 40
    for name, how in {
        "first": {"kill": 1},
        "behind-best": {"interrupt": best + 2},
        "killed-behind-best": {"kill": best + 2},
        "last": {"kill": -1},
    }.items():
        broken = run(name, **how)
        assert torch.equal(broken.rows, whole.rows)
        assert (broken.summary["best_step"], broken.summary["steps"]) == (best, end)
        assert broken.summary["after"] == whole.summary["after"]
        log = (tmp_path / name / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line)["step"] for line in log if "train_loss" not in line]
        assert steps == list(range(end + 1))


def test_starting_from_a_prompt_of_another_backbone_or_length_is_refused(folder: Path, tmp_path: Path) -> None:
    train(settings(folder, tmp_path / "first", max_steps=1))
    values = settings(folder, tmp_path / "second").model_dump(mode="json")
    values["prompt"]["start"] = {"method": "prompt", "prompt": str(tmp_path / "first")}
    other = Backbone(tiny_model("llama", seed=5), tiny_tokenizer(), "other")
    with pytest.raises(SoftPromptError, match="belongs to another backbone"):
        train(RunConfig.model_validate(values), backbone=other)
    values["prompt"]["template"] = "{text}[P*5]{answer}"
    with pytest.raises(ConfigError, match="has 4 virtual tokens and the template 5; give the template as many"):
        train(RunConfig.model_validate(values))


def test_starting_from_another_prompt_takes_its_rows(folder: Path, tmp_path: Path) -> None:
    first = train(settings(folder, tmp_path / "first", learning_rate=0.02))
    values = settings(folder, tmp_path / "second", max_steps=1, learning_rate=1e-12).model_dump(mode="json")
    values["prompt"]["start"] = {"method": "prompt", "prompt": str(tmp_path / "first")}
    second = train(RunConfig.model_validate(values))
    torch.testing.assert_close(second.rows, first.rows, rtol=1e-5, atol=1e-6)


def test_every_example_is_seen_once_an_epoch_and_rates_warm_up_and_fall() -> None:
    from ptune.config.run import TrainingConfig

    settings = TrainingConfig(batch_size=4, gradient_accumulation_steps=2, epochs=2, warmup_ratio=0.25)
    plan = StepPlan(list(range(1, 24)), settings)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 6)
    seen = [index for step in range(3) for batch in plan.window(step) for index in batch]
    assert sorted(seen) == list(range(23))
    rates = [plan.rate(step) for step in range(6)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] > 0


def test_a_budget_of_tokens_runs_batches_in_parts_to_the_same_prompt(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(str(folder / "model"))
    call, sizes = backbone.logits, [0]

    def watched(input_ids: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        sizes.append(input_ids.numel() if torch.is_grad_enabled() else 0)
        return call(input_ids, *arguments, **named)

    backbone.logits = watched  # type: ignore[method-assign]

    def rows(name: str, **training: Any) -> torch.Tensor:  # without dropout, which each part would have of its own
        config = settings(folder, tmp_path / name, **training)
        prompt = config.prompt.model_copy(update={"encoder": EncoderConfig(hidden_size=16)})
        return train(config.model_copy(update={"prompt": prompt}), backbone=backbone).rows

    whole = rows("whole")
    most = max(sizes)
    sizes.clear()
    parts = rows("parts", max_tokens_per_batch=most // 2)
    assert 0 < max(sizes) <= most // 2
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "template"),
    [
        ({"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}}, "{text}[P*4]{answer}"),
        ({"type": "classification", "verbalizer": {"positive": " good", "negative": " so bad"}}, "{text}[P]{answer}"),
        ({"type": "generation", "max_new_tokens": 5, "metric": "rouge_l"}, "[P*2]{text}[P]{answer}"),
        ({"type": "tagging"}, "[P*2]{tokens}"),
    ],
)
def test_dev_is_scored_within_the_budget_of_tokens_to_the_same_metrics(
    tmp_path: Path, folder: Path, task: dict[str, Any], template: str
) -> None:
    config = settings(folder, tmp_path / "prompt", batch_size=16, samples=0)
    records = [json.loads(line) for line in (folder / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["tokens"] = record["text"].split()
        record["tags"] = ["O" if word in WORDS else "B-X" for word in record["tokens"]]
    values = config.model_dump(mode="json") | {"task": task, "prompt": {"template": template}}
    backbone = Backbone.load(config.model)
    sizes: list[int] = []
    hook = backbone.model.register_forward_pre_hook(
        lambda _module, _args, named: sizes.append(named["input_ids"].numel()), with_kwargs=True
    )
    found = []
    for limit in (None, 60):
        values["training"]["max_tokens_per_batch"] = limit
        parts = assemble(RunConfig.model_validate(values), backbone, (records, records))
        with parts.prompted:
            parts.prompted.use()
            sizes.clear()
            found.append((parts.task.evaluate(backbone, parts.dev, batch_size=32), max(sizes)))
    hook.remove()
    (free, most), (kept, within) = found
    assert most > 60 >= within
    assert kept == pytest.approx(free, rel=1e-5)


def test_a_limit_that_leaves_labels_out_is_named(folder: Path, tmp_path: Path) -> None:
    values = settings(folder, tmp_path / "prompt").model_dump(mode="json") | {"task": {"type": "linear_classification"}}
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    by_label = sorted(records, key=lambda record: str(record["label"]))
    (tmp_path / "sorted.jsonl").write_text("".join(json.dumps(one) + "\n" for one in by_label), encoding="utf-8")
    values["data"] |= {"train": str(tmp_path / "sorted.jsonl"), "limit": 5}
    with pytest.raises(DataError) as caught:
        train(RunConfig.model_validate(values))
    assert str(caught.value) == (
        'data.limit leaves the first 5 training records, which hold 1 labels and lack "positive", which dev has; raise '
        "it, or list all as task.labels; data.shots draws records of each label"
    )
    values["task"]["labels"] = ["negative", "positive"]
    train(RunConfig.model_validate(values))


def test_gradient_checkpointing_gives_the_same_prompt(folder: Path, tmp_path: Path) -> None:
    plain = train(settings(folder, tmp_path / "plain")).rows
    recomputed = train(settings(folder, tmp_path / "recomputed", gradient_checkpointing=True)).rows
    torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def test_tensorboard_gets_what_the_log_gets(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path / "prompt", trackers=["tensorboard"], logging_steps=2, max_steps=4)
    train(config)
    assert list((config.output / "run").rglob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (config.output / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == [2, 4]
    assert all("accuracy" in line for line in lines if "train_loss" not in line)


def test_a_tracker_that_nobody_knows_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.trackers \['nonesuch'\]: "):
        train(settings(folder, tmp_path / "prompt", trackers=["nonesuch"]))


def test_a_tracker_that_is_not_installed_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"training\.trackers names aim, which is not installed; install it"):
        train(settings(folder, tmp_path / "prompt", trackers=["aim"]))


def test_a_half_precision_backbone_learns_float32_rows(folder: Path, tmp_path: Path) -> None:
    values = settings(folder, tmp_path / "half", max_steps=60, learning_rate=0.02).model_dump(mode="json")
    values["model"]["dtype"] = "bfloat16"
    half = train(RunConfig.model_validate(values))
    assert half.rows.dtype == torch.float32
    assert half.summary["dtype"] == "bfloat16"
    assert half.summary["after"]["accuracy"] > half.summary["before"]["accuracy"]


def test_mixed_precision_learns_in_a_process_of_its_own_and_is_refused_in_this_one(
    folder: Path, tmp_path: Path
) -> None:
    config = settings(folder, tmp_path / "mixed", mixed_precision="bf16", max_steps=60, learning_rate=0.02)
    file = tmp_path / "config.yaml"
    file.write_text(config_yaml(config), encoding="utf-8")
    _, errors = (process := _spawn(file, "new")).communicate()
    assert process.returncode == 0, errors.decode()
    summary = SoftPrompt.load(config.output).summary
    assert summary["after"]["accuracy"] > summary["before"]["accuracy"]
    train(settings(folder, tmp_path / "first", max_steps=1))
    with pytest.raises(ConfigError, match=r"training\.mixed_precision bf16 .* restart"):
        train(config.model_copy(update={"output": tmp_path / "second"}))
