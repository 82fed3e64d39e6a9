"""Runs with `prompt.deep`: they learn, resume, describe themselves on disk, serve; what cannot be is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from soft_prompts import assert_same
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from ptune.config.file import load_config
from ptune.config.run import RunConfig
from ptune.config.task import GenerationConfig
from ptune.engine.engine import Engine
from ptune.errors import BackboneError, ConfigError, SoftPromptError, Stopped, TemplateError
from ptune.models.backbone import Backbone
from ptune.models.deep_start import keys_and_values_of
from ptune.records.record import Record
from ptune.soft_prompts.peft_format import read_peft_adapter
from ptune.soft_prompts.soft_prompt import SoftPrompt, import_peft
from ptune.training.assembly import template_for
from ptune.training.reporting import Reporter
from ptune.training.train import train

WORDS = ["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}
CLASSIFICATION = {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}}
GENERATION = {"type": "generation", "max_new_tokens": 6}


def records(count: int, seed: int) -> list[Record]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        good = chance.random() < 0.5
        text = " ".join([*chance.sample(WORDS, chance.randint(1, 5)), "great" if good else "terrible"])
        values = {"text": text, "label": "positive" if good else "negative", "output": "good" if good else "bad"}
        made.append(Record(values, f"record {number}"))
    return made


RECORDS = (records(32, 0), records(16, 1))


def backbone_of(family: str) -> Backbone:
    return Backbone(tiny_model(family), tiny_tokenizer(family), family)


def settings(output: Path, task: dict[str, Any], prompt: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    answer = "{answer}" if task is GENERATION else " It was{answer}"
    values = {"template": f"[P*4]{{text}}{answer}", "deep": True, "start": {"method": "text", "text": "the film was"}}
    steps = {"max_steps": 8, "batch_size": 4, "evaluations": 2, "learning_rate": 0.02}
    return RunConfig.model_validate(
        {
            "model": "tiny",
            "task": task,
            "prompt": values | (prompt or {}),
            "training": steps | training,
            "output": str(output),
        }
    )


def losses(prompt: SoftPrompt) -> tuple[float, float]:
    return prompt.summary["before"]["loss"], prompt.summary["after"]["loss"]


@pytest.mark.parametrize("encoder", [{"type": "embedding"}, {"type": "mlp", "hidden_size": 8, "dropout": 0.1}])
@pytest.mark.parametrize("task", [CLASSIFICATION, GENERATION], ids=lambda task: task["type"])
@pytest.mark.parametrize("family", ["bloom", "qwen3", "roberta"])
def test_a_run_learns_saves_and_serves(
    family: str, task: dict[str, Any], encoder: dict[str, Any], tmp_path: Path
) -> None:
    if family == "roberta" and task is GENERATION:
        pytest.skip("a masked model writes no text")
    backbone = backbone_of(family)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    listener = Listener()
    config = settings(tmp_path, task, {"encoder": encoder})
    prompt = train(config, backbone=backbone, records=RECORDS, reporter=listener)
    assert listener.losses[-1] < listener.losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())
    loaded = SoftPrompt.load(tmp_path)
    assert_same(loaded, prompt)
    with Engine(backbone) as engine:
        name = engine.load(tmp_path, "deep")
        dev = RECORDS[1]
        assert engine.evaluate(name, dev)["loss"] == pytest.approx(losses(prompt)[1], rel=1e-4)
        together = engine.predict(name, dev, batch_size=8)
        key = "text" if task is GENERATION else "label"
        assert [answer[key] for answer in together] == [engine.predict(name, [one])[0][key] for one in dev]
        if task is GENERATION:
            assert engine.generate(name, dev[0]).text == together[0]["text"]


def test_untrained_it_scores_as_a_soft_prompt_of_the_same_words(tmp_path: Path) -> None:
    scores = []
    for deep in (True, False):
        config = settings(
            tmp_path / str(deep), CLASSIFICATION, {"deep": deep, "encoder": {"type": "embedding"}}, max_steps=1
        )
        prompt = train(config, backbone=backbone_of("llama"), records=RECORDS)
        scores.append(prompt.summary["before"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_the_files_describe_themselves_and_peft_reads_them(tmp_path: Path) -> None:
    backbone = backbone_of("llama")
    prompt = train(settings(tmp_path, CLASSIFICATION), backbone=backbone, records=RECORDS)
    description = json.loads((tmp_path / "ptune.json").read_text(encoding="utf-8"))
    assert description["deep"] == {"layers": 2, "heads": 2, "head_width": 8}
    assert description["virtual_tokens"]["width"] == 2 * 2 * 2 * 8
    tensors = load_file(tmp_path / "soft_prompt.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"keys_and_values": (4, 64)}
    assert "at each of 2 layers (a deep prompt" in (tmp_path / "README.md").read_text(encoding="utf-8")
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    ids = torch.tensor([[5, 17, 300, 42, 42, 7]])
    tokens = backbone.attach()
    first = tokens.allocate(4)
    tokens.set_rows(first, prompt.rows, prompt.deep)
    behind = torch.cat([torch.arange(first, first + 4)[None], ids], dim=-1)
    places = torch.arange(behind.shape[1])[None] >= 4
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits[0], backbone.logits(behind, torch.ones_like(behind), places)
    assert torch.allclose(found, expected, atol=1e-5)
    again = import_peft(tmp_path, backbone=backbone, template=prompt.template, task=prompt.task)
    assert torch.equal(again.rows, prompt.rows)
    assert again.deep == prompt.deep


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bloom", "qwen2"])
def test_prefix_tuning_of_pefts_is_imported_and_answers_as_in_peft(
    family: str, projection: bool, tmp_path: Path
) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projection)
    theirs = get_peft_model(tiny_model(family), config).eval()
    theirs.save_pretrained(tmp_path)
    backbone = backbone_of(family)
    prompt = import_peft(tmp_path, backbone=backbone, template="[P*4]{text}{answer}", task=GenerationConfig())
    ids = torch.tensor([[5, 17, 300, 42, 42, 7]])
    tokens = backbone.attach()
    first = tokens.allocate(4)
    tokens.set_rows(first, prompt.rows, prompt.deep)
    behind = torch.cat([torch.arange(first, first + 4)[None], ids], dim=-1)
    places = torch.arange(behind.shape[1])[None] >= 4
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits[0], backbone.logits(behind, torch.ones_like(behind), places)
    assert torch.allclose(found, expected, atol=1e-5)
    if family == "bloom":  # whose shape is GPT-2's
        return
    other = backbone_of("llama" if family == "gpt2" else "gpt2")
    with pytest.raises(SoftPromptError, match="keys and values of 2 layers"):
        import_peft(tmp_path, backbone=other, template=prompt.template, task=GenerationConfig())


def test_an_adapter_that_does_not_say_its_shape_is_refused(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny_model("gpt2"), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"num_layers": None}
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(SoftPromptError, match="expected num_layers, .* and holds 0, 4, 32; load the adapter"):
        read_peft_adapter(tmp_path)


class Listener(Reporter):
    """Remembers the dev losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def evaluated(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        self.losses.append(metrics["loss"])


class StopsAt(Reporter):
    """Stops the run at a step, by the signal that Ctrl-C sends."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        if step == self._step:
            os.kill(os.getpid(), 2)


@pytest.mark.parametrize("encoder", [{"type": "embedding"}, {"type": "mlp", "hidden_size": 8, "dropout": 0.2}])
def test_a_resumed_run_ends_as_the_unbroken_one(encoder: dict[str, Any], tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    whole = train(settings(tmp_path / "a", CLASSIFICATION, {"encoder": encoder}), backbone=backbone, records=RECORDS)
    config = settings(tmp_path / "b", CLASSIFICATION, {"encoder": encoder})
    with pytest.raises(Stopped):
        train(config, backbone=backbone, records=RECORDS, reporter=StopsAt(3))
    resumed = train(config, backbone=backbone, records=RECORDS, resume=True)
    assert torch.equal(resumed.rows, whole.rows)


def test_a_run_goes_on_from_a_deep_prompt_and_from_one_at_the_input(tmp_path: Path) -> None:
    backbone = backbone_of("llama")
    first = train(settings(tmp_path / "first", CLASSIFICATION), backbone=backbone, records=RECORDS)
    start = {"method": "prompt", "prompt": str(tmp_path / "first")}
    for encoder in ({"type": "embedding"}, {"type": "mlp", "hidden_size": 8}):
        config = settings(tmp_path / encoder["type"], CLASSIFICATION, {"start": start, "encoder": encoder}, max_steps=1)
        second = train(config, backbone=backbone, records=RECORDS)
        assert second.summary["before"]["loss"] == pytest.approx(losses(first)[1], rel=1e-5)
    plain = {"start": start, "encoder": {"type": "mlp", "residual": False}}
    with pytest.raises(ConfigError, match="set prompt.encoder.residual to true, or prompt.encoder.type to embedding"):
        train(settings(tmp_path / "plain", CLASSIFICATION, plain), backbone=backbone, records=RECORDS)
    shallow = {"start": start, "deep": False, "encoder": {"type": "embedding"}}
    with pytest.raises(SoftPromptError, match="keys and values, and there are no rows at the input in it"):
        train(settings(tmp_path / "shallow", CLASSIFICATION, shallow), backbone=backbone, records=RECORDS)
    del shallow["start"]
    train(settings(tmp_path / "input", CLASSIFICATION, shallow), backbone=backbone, records=RECORDS)
    from_input = {"start": {"method": "prompt", "prompt": str(tmp_path / "input")}}
    config = settings(tmp_path / "deeper", CLASSIFICATION, from_input, max_steps=1)
    deeper = train(config, backbone=backbone, records=RECORDS)
    assert deeper.summary["before"]["loss"] == pytest.approx(losses(SoftPrompt.load(tmp_path / "input"))[1], rel=1e-5)


def test_deep_prompts_others_and_the_bare_model_answer_side_by_side(tmp_path: Path) -> None:
    backbone = backbone_of("qwen2")
    for name, prompt in (("one", {}), ("two", {}), ("input", {"deep": False})):
        config = settings(tmp_path / name, GENERATION, prompt, seed=len(name) + (name == "two"), learning_rate=0.1)
        train(config, backbone=backbone, records=RECORDS)
    with Engine(backbone) as engine:
        bare = engine.generate(None, "soup and song").text
        alone = {}
        for name in ("one", "two", "input"):
            engine.load(tmp_path / name)
            alone[name] = engine.predict(name, RECORDS[1])
            engine.remove(name)
        for name in alone:
            engine.load(tmp_path / name)
        assert {name: engine.predict(name, RECORDS[1]) for name in alone} == alone
        assert engine.generate(None, "soup and song").text == bare


@pytest.mark.parametrize("template", ["{text}[P*4]{answer}", "[P*2]{text}[P*2]{answer}", "[bos][P*4]{text}{answer}"])
def test_virtual_tokens_elsewhere_than_in_front_are_refused(template: str, tmp_path: Path) -> None:
    config, backbone = settings(tmp_path, CLASSIFICATION, {"template": template}), backbone_of("gpt2")
    with pytest.raises(TemplateError, match="something stands before some of them; put all of them first"):
        template_for(config, backbone)


def test_settings_that_do_not_go_with_it_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    values = {
        "task": CLASSIFICATION,
        "prompt": {"template": "[P*4]{text}{answer}", "deep": True},
        "training": {"gradient_checkpointing": True},
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError, match="turn one of the two off"):
        load_config(path)
    with pytest.raises(ConfigError, match="embedding or mlp, and encoder.type is lstm"):
        load_config(path, {"prompt.encoder.type": "lstm", "training.gradient_checkpointing": False})
    config = load_config(path, {"training.gradient_checkpointing": False})
    assert config.prompt.encoder.type == "embedding"
    assert load_config(path, {"prompt.deep": False}).prompt.encoder.type == "mlp"


@pytest.mark.parametrize("family", ["distilbert", "albert", "t5", "bart"])
def test_families_that_cannot_are_refused_before_anything_is_written(family: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="so it cannot carry a deep prompt"):
        train(settings(tmp_path / "run", CLASSIFICATION), backbone=backbone_of(family), records=RECORDS)
    assert not (tmp_path / "run" / "ptune.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_its_keys_and_values_are_learnt_in_half_precision_as_well(family: str, tmp_path: Path) -> None:
    backbone = Backbone(tiny_model(family, dtype=torch.bfloat16), tiny_tokenizer(family), family)
    values, _ = keys_and_values_of(backbone, backbone.embeddings(torch.arange(4)))
    assert values.dtype == torch.float32
    listener = Listener()
    config = settings(tmp_path, CLASSIFICATION, max_steps=4)
    prompt = train(config, backbone=backbone, records=RECORDS, reporter=listener)
    assert prompt.rows.dtype == torch.float32
    assert listener.losses[-1] != listener.losses[0]


def test_the_command_line_trains_scores_uses_and_looks_into_one(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in zip(("train", "dev"), RECORDS, strict=True):
        lines = "".join(json.dumps(dict(row)) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    values = settings(tmp_path / "prompt", CLASSIFICATION, mixed_precision="bf16").model_dump(mode="json")
    values |= {"model": str(tmp_path / "model")}
    values["data"] = {"train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl")}
    (tmp_path / "deep.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ptune", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
        assert done.returncode == code, done.stderr
        return done

    assert "4 virtual tokens" in run("train", tmp_path / "deep.yaml").stdout
    run("eval", tmp_path / "prompt", "--data", tmp_path / "dev.jsonl", "--json", tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["metrics"]["loss"]
    assert found == pytest.approx(losses(SoftPrompt.load(tmp_path / "prompt"))[1], rel=0.05)  # trained under autocast
    answer = json.loads(run("predict", tmp_path / "prompt", "the soup was great").stdout)
    assert answer["label"] in ("positive", "negative")
    shown = run("inspect", tmp_path / "prompt").stdout
    assert "at each of 2 layers, as keys and values of 2 heads 8 wide" in shown
    assert "A deep prompt is keys and values at every layer" in shown
    refused = run("train", tmp_path / "deep.yaml", "--gradient-checkpointing", "true", "--overwrite", code=2)
    assert "turn one of the two off" in refused.stderr
