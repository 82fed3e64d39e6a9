"""A search: every candidate ends as its run alone would, halves are dropped by the metric, mistakes are named."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.candidates import SearchConfig, candidates_of, load_search, parse_vary
from ptune.config.file import load_config
from ptune.config.run import RunConfig
from ptune.errors import ConfigError, OutputError, Stopped
from ptune.models.backbone import Backbone
from ptune.prompts.encoder import PromptEncoder
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.learner import Learner
from ptune.training.reporting import SearchReporter
from ptune.training.search import rungs, search
from ptune.training.train import train

WORDS = ["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"]
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-5}
CLASSIFICATION = {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}}
CHOICE = {"type": "choice", "choices": ["first", "second"]}
GENERATION = {"type": "generation", "max_new_tokens": 4}
BEHIND, FRONT, BOTH = "{text}[P*4]{answer}", "[P*4]{text}:{answer}", "[P*2]{text}[P*2]{answer}"

Records = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def records(train_count: int = 24, dev_count: int = 8) -> Records:
    chance = random.Random(0)

    def draw() -> dict[str, Any]:
        good = chance.random() < 0.5
        text = " ".join(chance.sample(WORDS, chance.randint(2, 6)) * 2 + ["great" if good else "terrible"])
        label, output = ("positive", "good room") if good else ("negative", "bad soup")
        return {"text": text, "label": label, "output": output, "first": "good", "second": "bad soup"}

    return [draw() for _ in range(train_count)], [draw() for _ in range(dev_count)]


_TRAINING = {"max_steps": 6, "batch_size": 3, "gradient_accumulation_steps": 2, "evaluations": 2}


def config(
    output: Path, template: str = BEHIND, task: Mapping[str, Any] = CLASSIFICATION, **training: Any
) -> RunConfig:
    task = dict(task) | ({"label_field": "right"} if task["type"] == "choice" else {})
    return RunConfig.model_validate(
        {
            "task": task,
            "prompt": {"template": template, "encoder": {"type": "mlp", "hidden_size": 8, "dropout": 0.2}},
            "training": _TRAINING | training,
            "output": str(output),
        }
    )


def backbone_of(family: str, dtype: torch.dtype) -> Backbone:
    return Backbone(tiny_model(family, dtype=dtype), tiny_tokenizer(family), family)


class Listener(SearchReporter):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.halvings: list[tuple[int, list[int], list[int]]] = []
        self.scores: dict[int, dict[int, float]] = {}
        self.plans: list[str] = []
        self.warnings: list[str] = []

    def halved(self, step: int, kept: Sequence[int], dropped: Sequence[int]) -> None:
        self.halvings.append((step, list(kept), list(dropped)))

    def scored(self, step: int, metric: str, values: Mapping[int, float]) -> None:
        self.scores[step] = dict(values)

    def planned(self, plan: str, why: str) -> None:
        self.plans.append(plan)

    def warned(self, sentence: str) -> None:
        self.warnings.append(sentence)


@pytest.fixture
def learners(monkeypatch: pytest.MonkeyPatch) -> list[Learner]:
    """Every learner that is made, so that the rows it ends with can be looked at."""
    made: list[Learner] = []
    begin = Learner.__init__

    def remember(self: Learner, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        made.append(self)

    monkeypatch.setattr(Learner, "__init__", remember)
    return made


def final_rows(learner: Learner) -> torch.Tensor:
    encoder = learner.prompted.encoder
    assert isinstance(encoder, PromptEncoder)
    with torch.no_grad():
        return encoder.eval()().clone()


VARY: dict[str, Any] = {
    "training.seed": (0, 5),
    "training.learning_rate": (0.002, 0.02),
    "prompt.length": (3, 6),
    "prompt.encoder.type": ("mlp", "embedding"),
}
CASES = [
    ("llama", BEHIND, CLASSIFICATION),
    ("llama", FRONT, CLASSIFICATION),
    ("bloom", FRONT, GENERATION),
    ("gpt2", FRONT, GENERATION),
    ("qwen2", BEHIND, CHOICE),
]


def assert_as_alone(
    backbone: Backbone,
    template: str,
    task: Mapping[str, Any],
    limit: float,
    folder: Path,
    learners: list[Learner],
) -> None:
    """Five candidates of a grid of sixteen end with the rows that `train` of each gives."""
    data = records()
    for part in data:
        for record in part:
            record["right"] = "0" if record["label"] == "positive" else "1"
    base = config(folder / "search", template, task)
    settings = SearchConfig(vary=VARY, halvings=0)
    candidates = candidates_of(base, settings)
    assert len(candidates) == 16
    some = SearchConfig(vary=VARY, halvings=0, sample=5)
    candidates = candidates_of(base, some)
    assert len({candidate.config.training.seed for candidate in candidates}) == 2
    search(base, some, backbone=backbone, records=data)
    together = [final_rows(learner) for learner in learners]
    for candidate, ours in zip(candidates, together, strict=True):
        learners.clear()
        alone = candidate.config.model_copy(update={"output": folder / f"alone-{candidate.number}"})
        train(alone, backbone=backbone, records=data)
        expected = final_rows(learners[0])
        started = learners[0].prompted
        assert float((ours - expected).abs().max()) <= limit * float(expected.abs().max()), candidate.varied
        assert started.num_virtual_tokens == len(ours)


@pytest.mark.usefixtures("true_float64")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("family", "template", "task"), CASES)
def test_each_candidate_ends_as_its_run_alone(
    family: str,
    template: str,
    task: Mapping[str, Any],
    dtype: torch.dtype,
    tmp_path: Path,
    learners: list[Learner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == torch.float64:  # encoders too, whose sums would round otherwise in other batches
        move = PromptEncoder.to
        monkeypatch.setattr(PromptEncoder, "to", lambda self, device: move(self.double(), device))
    assert_as_alone(backbone_of(family, dtype), template, task, LIMIT[dtype], tmp_path, learners)


@pytest.mark.parametrize(("family", "task"), [("bert", CLASSIFICATION), ("t5", GENERATION)])
def test_models_that_know_the_reference_plan_only_are_searched_too(
    family: str, task: Mapping[str, Any], tmp_path: Path, learners: list[Learner]
) -> None:
    assert_as_alone(backbone_of(family, torch.float32), BEHIND, task, 1e-5, tmp_path, learners)


def test_the_folder_is_as_training_the_best_candidate_would_have_left_it(tmp_path: Path) -> None:
    backbone, data = backbone_of("llama", torch.float32), records()
    base = config(tmp_path / "search", max_steps=8, evaluations=4)
    found = search(base, SearchConfig(vary={"training.learning_rate": (0.001, 0.03)}), backbone=backbone, records=data)
    chosen = load_config(tmp_path / "search" / "run" / "config.yaml")
    alone = chosen.model_copy(update={"output": tmp_path / "alone"})
    expected = train(alone, backbone=backbone, records=data)
    assert SoftPrompt.load(tmp_path / "search").rows.equal(found.rows)
    assert torch.allclose(found.rows, expected.rows, rtol=1e-5, atol=1e-6)
    files = [sorted(p.name for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("search", "alone")]
    assert files[0] == sorted([*files[1], "search.json"])
    assert found.summary["best_step"] == expected.summary["best_step"]
    logs = [(tmp_path / name / "run" / "log.jsonl").read_text().splitlines() for name in ("search", "alone")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]


def test_halves_are_dropped_by_the_metric_and_the_table_tells_all(tmp_path: Path) -> None:
    backbone, listener = backbone_of("llama", torch.float32), Listener()
    base = config(tmp_path / "search", max_steps=8, evaluations=8, task=GENERATION)
    vary = {"training.learning_rate": (1e-6, 0.01, 0.02, 1e-5), "training.seed": (0, 1)}
    search(base, SearchConfig(vary=vary), backbone=backbone, records=records(), reporter=listener)
    assert [(step, len(kept), len(dropped)) for step, kept, dropped in listener.halvings] == [(2, 4, 4), (4, 2, 2)]
    for step, kept, dropped in listener.halvings:
        best = {
            number: min(scores[number] for at, scores in listener.scores.items() if at <= step and number in scores)
            for number in [*kept, *dropped]
        }
        assert max(best[number] for number in kept) <= min(best[number] for number in dropped)
    table = json.loads((tmp_path / "search" / "run" / "search.json").read_text())
    assert table["rungs"] == [2, 4]
    assert len(table["candidates"]) == 8
    assert [row["dropped_at"] for row in table["candidates"]] == [None, None, 4, 4, 2, 2, 2, 2]
    assert [row["steps"] for row in table["candidates"]] == [8, 8, 4, 4, 2, 2, 2, 2]
    assert table["best"] == table["candidates"][0]["candidate"]
    assert all(row["seconds"] > 0 and len(row["evaluations"]) == row["steps"] + 1 for row in table["candidates"])


def test_candidates_of_equal_metric_are_ranked_by_their_best_loss(tmp_path: Path) -> None:
    never_right = GENERATION | {"metric": "exact_match"}
    settings = SearchConfig(vary={"training.learning_rate": (1e-8, 30.0, 3.0, 1.0, 0.3)}, halvings=0)
    run = config(tmp_path, "[P*4]{text}{answer}", never_right, schedule="constant", evaluations=6)
    learnt, scored = records()
    scored = [record | {"output": "waiter door"} for record in scored]
    search(run, settings, backbone=backbone_of("gpt2", torch.float32), records=(learnt, scored))
    table = json.loads((tmp_path / "run" / "search.json").read_text())
    assert {each["exact_match"] for row in table["candidates"] for each in row["evaluations"]} == {0.0}
    losses = [min(each["loss"] for each in row["evaluations"]) for row in table["candidates"]]
    assert losses == sorted(losses)
    latest = [row["evaluations"][-1]["loss"] for row in table["candidates"]]
    assert latest != sorted(latest)  # else the latest loss would rank them alike


def test_rungs_wait_for_an_evaluation_and_spare_the_last_step() -> None:
    assert rungs(80, {8 * k for k in range(1, 11)}, 2) == {24, 40}
    assert rungs(80, {80}, 2) == set()
    assert rungs(80, set(range(1, 81)), 3) == {10, 20, 40}
    assert rungs(80, set(range(1, 81)), 0) == set()


def test_prompts_in_front_and_behind_are_searched_together(tmp_path: Path) -> None:
    backbone, listener = backbone_of("llama", torch.float32), Listener()
    base = config(tmp_path / "search")
    vary = {"prompt.template": ("[P*30]{text}:{answer}", BEHIND, BOTH), "training.seed": (0, 1)}
    search(base, SearchConfig(vary=vary), backbone=backbone, records=records(), reporter=listener)
    assert set(listener.plans) == {"packed rows", "frozen context"}


def test_a_budget_of_tokens_holds_for_all_candidates_together(tmp_path: Path) -> None:
    backbone, seen = backbone_of("llama", torch.float32), []
    run = backbone.plans._run

    def watched(ids: torch.Tensor, mask: torch.Tensor, *others: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(ids.numel())
        return run(ids, mask, *others, **named)

    backbone.plans._run = watched  # type: ignore[assignment]
    largest = []
    for name, limit in (("whole", None), ("cut", 200)):
        seen.clear()
        base = config(tmp_path / name, FRONT, max_tokens_per_batch=limit)
        settings = SearchConfig(vary={"training.seed": (0, 1, 2, 3)}, halvings=0)
        search(base, settings, backbone=backbone, records=records())
        largest.append(max(seen))
    assert largest[1] <= 200 < largest[0]


def test_a_candidate_whose_loss_is_no_number_is_given_up_alone(tmp_path: Path) -> None:
    backbone, listener = backbone_of("llama", torch.float32), Listener()
    base = config(tmp_path / "search", warmup_ratio=0.0)
    vary = {"training.learning_rate": (1e30, 0.01)}
    search(base, SearchConfig(vary=vary, halvings=0), backbone=backbone, records=records(), reporter=listener)
    table = json.loads((tmp_path / "search" / "run" / "search.json").read_text())
    assert table["best"] == 2
    assert table["candidates"][0]["steps"] == 6
    assert "lower training.learning_rate" in table["candidates"][1]["ended"]
    assert any(sentence.startswith("candidate 1 is given up") for sentence in listener.warnings)


def test_a_stopped_search_keeps_its_best_candidate_as_a_stopped_run(tmp_path: Path) -> None:
    class Interrupting(Listener):
        def went_on(self, step: int, running: int) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    backbone, data = backbone_of("llama", torch.float32), records()
    base = config(tmp_path / "search")
    vary = {"training.learning_rate": (0.001, 0.01), "training.seed": (3, 4)}
    with pytest.raises(Stopped, match=r"after step 4; a search is not resumed, .*--resume.*trains it on alone"):
        search(base, SearchConfig(vary=vary), backbone=backbone, records=data, reporter=Interrupting())
    assert not (tmp_path / "search" / "ptune.json").exists()
    kept = load_config(tmp_path / "search" / "run" / "config.yaml")
    resumed = train(kept, backbone=backbone, records=data, resume=True)
    alone = train(kept.model_copy(update={"output": tmp_path / "alone"}), backbone=backbone, records=data)
    assert resumed.summary["steps"] == 6
    assert torch.allclose(resumed.rows, alone.rows, rtol=1e-5, atol=1e-6)
    with pytest.raises(OutputError, match="holds another run"):
        search(base, SearchConfig(vary=vary), backbone=backbone, records=data)


def test_a_rate_is_a_number_however_it_is_written(tmp_path: Path) -> None:
    found = candidates_of(config(tmp_path), SearchConfig(vary=parse_vary(["learning_rate=1e-2,2e-2"])))
    assert [candidate.varied["training.learning_rate"] for candidate in found] == [0.01, 0.02]


def test_the_dev_part_is_one_for_candidates_of_every_seed(tmp_path: Path) -> None:
    base = config(tmp_path, seed=7)
    found = candidates_of(base, SearchConfig(vary={"training.seed": (0, 1)}))
    assert {candidate.config.data.split_seed for candidate in found} == {7}


def test_what_varies_is_read_from_words_and_from_the_file(tmp_path: Path) -> None:
    assert parse_vary(["learning_rate=0.002,0.01", "prompt.length=5,10", "seed=0"]) == {
        "training.learning_rate": [0.002, 0.01],
        "prompt.length": [5, 10],
        "training.seed": [0],
    }
    assert parse_vary(["prompt.template=a,b[P]{answer}", "prompt.template=[P]{answer}"]) == {
        "prompt.template": ["a,b[P]{answer}", "[P]{answer}"]
    }
    assert parse_vary(["prompt.encoder=[{type: mlp, num_layers: 1}, {type: embedding}]"]) == {
        "prompt.encoder": [{"type": "mlp", "num_layers": 1}, {"type": "embedding"}]
    }
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: {type: generation}\nprompt: {template: '[P*4]{text}{answer}'}\n"
        "search: {vary: {training.seed: [0, 1], prompt.length: 3}, halvings: 1}\n"
    )
    base, settings = load_search(file, search={"vary": {"training.seed": (5,)}, "sample": 2})
    assert (settings.halvings, settings.sample) == (1, 2)
    assert settings.vary == {"training.seed": (5,), "prompt.length": (3,)}
    assert base.prompt.template == "[P*4]{text}{answer}"
    with pytest.raises(ConfigError, match=r'no setting "search".*ptune search'):
        load_config(file)


def test_an_embedding_takes_none_of_the_encoder_s_other_settings(tmp_path: Path) -> None:
    vary = {"prompt.encoder.type": ("mlp", "embedding"), "prompt.encoder.hidden_size": (8, 16)}
    found = candidates_of(config(tmp_path), SearchConfig(vary=vary))
    assert [candidate.varied for candidate in found] == [
        {"prompt.encoder.type": "mlp", "prompt.encoder.hidden_size": 8},
        {"prompt.encoder.type": "mlp", "prompt.encoder.hidden_size": 16},
        {"prompt.encoder.type": "embedding"},
    ]


def test_a_sample_of_the_grid_follows_the_seed(tmp_path: Path) -> None:
    vary = {"training.seed": tuple(range(40)), "training.learning_rate": (0.001, 0.01)}
    settings = SearchConfig(vary=vary, sample=5)
    drawn = [
        [candidate.varied for candidate in candidates_of(config(tmp_path, seed=seed), settings)] for seed in (0, 0, 1)
    ]
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (
            {"training.lerning_rate": (1, 2)},
            r'"training.lerning_rate"\. Did you mean "training.learning_rate"',
        ),
        ({"model.name": ("a", "b")}, r"model.name cannot vary: all candidates share one backbone"),
        ({"data.limit": (1, 2)}, r"data.limit cannot vary: all candidates share one backbone, one data set"),
        ({"training.batch_size": (1, 2)}, r"training.batch_size cannot vary: candidates take their steps together"),
        ({"training.seed": tuple(range(33))}, r"33 candidates are more than search.limit, which is 32; .*--sample 32"),
        ({"training.seed": (0,)}, r"needs two candidates or more"),
        ({}, r"needs two candidates or more"),
        ({"training.seed": (1, 1)}, r"one and the same run"),
        ({"training.learning_rate": (0.1, -1)}, r'candidate 2 \(training.learning_rate=-1\): "training.learning_rate"'),
        ({"prompt.length": (3, 0)}, r"prompt.length is a number of virtual tokens, 1 or more, and is 0"),
    ],
)
def test_what_cannot_vary_is_named(vary: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        candidates_of(config(tmp_path), SearchConfig(vary=vary))


def test_a_mistake_in_the_section_search_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config(tmp_path).model_dump(mode="json") | {"search": {"sample": 1}}))
    with pytest.raises(ConfigError, match=r'run\.yaml: "search\.sample" takes a number greater than 1, and is 1'):
        load_search(file)


def test_a_length_needs_one_run_of_virtual_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 of them; vary prompt.template instead"):
        candidates_of(config(tmp_path, BOTH), SearchConfig(vary={"prompt.length": (3, 4)}))


@pytest.mark.parametrize(
    ("section", "setting", "message"),
    [
        (
            "prompt",
            {"deep": True, "template": FRONT, "encoder": {"type": "embedding"}},
            "deep cannot be searched",
        ),
        ("training", {"mixed_precision": "bf16"}, "no training.mixed_precision; set model.dtype"),
        ("training", {"trackers": ["tensorboard"]}, "no training.trackers"),
    ],
)
def test_what_a_search_does_not_do_is_refused(section: str, setting: Any, message: str, tmp_path: Path) -> None:
    values = config(tmp_path / "search").model_dump(mode="json")
    values[section] |= setting
    settings = SearchConfig(vary={"training.seed": (0, 1)})
    with pytest.raises(ConfigError, match=message):
        search(RunConfig.model_validate(values), settings, records=records())
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search: {vari: {}}", r'no setting "search.vari"\. Did you mean "vary"'),
        ("search: [1]", "section search should hold settings"),
        ("search: {vary: [1]}", "search.vary should hold"),
        ("search: {halvings: -1}", r'"search.halvings" takes a number of 0 or more'),
    ],
)
def test_mistakes_in_the_section_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: {type: generation}\nprompt: {template: '[P*4]{text}{answer}'}\n" + text)
    with pytest.raises(ConfigError, match=message):
        load_search(file)
