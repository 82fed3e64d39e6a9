"""Linear heads: the mathematics of a plain forward, every plan, runs that resume, files, the engine, bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from heads import LINEAR, MULTI, RECORDS, TAGGING, VERBALIZER, backbone_of, settings
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn import functional

from ptune.config.file import parse_config
from ptune.config.run import EncoderConfig
from ptune.config.task import LinearClassificationConfig, TaggingConfig
from ptune.engine.engine import Engine
from ptune.errors import ConfigError, DataError, SoftPromptError, Stopped
from ptune.merging.merge import merge_prompts
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.encoder import build_encoder
from ptune.prompts.linear_head import LinearHead, head_from, head_tensors
from ptune.prompts.virtual_tokens import input_embedding
from ptune.records.record import Record
from ptune.rendering.batch import Row
from ptune.soft_prompts.files import read_description
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.linear_classification import learnt_labels
from ptune.tasks.metrics import average_f1s
from ptune.tasks.registry import task_for
from ptune.tasks.task import Task
from ptune.template import Template
from ptune.training.assembly import assemble
from ptune.training.checkpoint import load_checkpoint
from ptune.training.reporting import Reporter
from ptune.training.train import train

P = 4
TASKS = {"linear": LINEAR, "several": MULTI, "tagging": TAGGING}
TAGS = ("B-FOOD", "B-SIGN", "O")


class StopsAt(Reporter):
    """Stops the run at a step, by the signal that Ctrl-C sends."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        if step == self._step:
            os.kill(os.getpid(), 2)


class Listener(Reporter):
    """Remembers the losses of steps and what was warned of."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.warnings: list[str] = []

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        self.losses.append(loss)

    def warned(self, sentence: str) -> None:
        self.warnings.append(sentence)


def prompted_task(backbone: Backbone, kind: str, template: str) -> tuple[PromptedModel, Task]:
    """A prompted model in float64 with a task bound to it and a head for the task."""
    initial = backbone.embeddings(torch.arange(30, 30 + P))
    encoder = build_encoder(EncoderConfig(type="mlp", hidden_size=8, residual=False), initial, 0)
    prompted = PromptedModel(backbone, encoder.double())
    config = (
        TaggingConfig(tags=TAGS)
        if kind == "tagging"
        else LinearClassificationConfig(
            labels=("soup", "film") if kind == "several" else ("bad", "fair", "good"),
            multi_label=kind == "several",
            label_field="topics" if kind == "several" else "label",
        )
    )
    task = task_for(backbone, config, Template.parse(template), first_virtual_id=prompted.first_virtual_id)
    states = torch.randn(9, backbone.model.config.hidden_size, generator=torch.Generator().manual_seed(4)) * 3
    outputs = len(TAGS) if kind == "tagging" else len(config.labels)  # type: ignore[union-attr]
    prompted.head = task.head = LinearHead.new(outputs, states, seed=1).double()
    return prompted, task


def gradients(loss: Tensor, prompted: PromptedModel) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(prompted.parameters()))]


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> None:
    assert len(ours) == len(expected) > 4
    for one, other in zip(ours, expected, strict=True):
        assert float((one - other).abs().max()) <= limit * float(other.abs().max())
        assert float(other.abs().max()) > 0


def plain_states(prompted: PromptedModel, rows: Sequence[Row]) -> Tensor:
    """The last layer's states where rows are read, of each row alone, from concatenated embeddings."""
    model, first, virtual = prompted.backbone.model, prompted.first_virtual_id, prompted.encoder()
    embed = input_embedding(model)
    states = []
    for row in rows:
        embeddings = [virtual[i - first] if i >= first else embed(torch.tensor(i)) for i in row.ids]
        hidden = model.base_model(inputs_embeds=torch.stack(embeddings)[None]).last_hidden_state[0]
        states += [hidden[place] for place in row.read_at]
    return torch.stack(states)


@pytest.mark.usefixtures("true_float64")
@pytest.mark.parametrize("kind", list(TASKS))
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_loss_and_gradients_are_those_of_a_plain_forward(family: str, kind: str) -> None:
    template = "[P*4]{tokens}" if kind == "tagging" else "{text}[P*2] It[P*2] was{answer}"
    prompted, task = prompted_task(backbone_of(family, dtype=torch.float64), kind, template)
    some = [task.example(record) for record in RECORDS[0][:5]]
    examples = [example for example in some if example is not None]
    ours = gradients(task.loss(prompted, examples, 0), prompted)
    head = prompted.head
    assert head is not None
    states = plain_states(prompted, [row for example in examples for row in example.rows])
    scores = states @ (head.weight / head.scale).T + head.bias
    if kind == "several":
        wanted = torch.zeros_like(scores)
        for number, example in enumerate(examples):
            wanted[number, list(example.target)] = 1
        expected = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none").mean(-1).sum()
    else:
        targets = [t for e in examples for t in (e.target if kind == "tagging" else [e.target])]
        expected = functional.cross_entropy(scores, torch.tensor(targets), reduction="sum")
    assert_same(ours, gradients(expected, prompted), 1e-9)
    assert float(head.scale) == 4.0  # the power of two nearest to the states' size


@pytest.mark.usefixtures("true_float64")
@pytest.mark.parametrize(
    ("kind", "template", "plan"),
    [
        ("linear", "[P*4]{text} It was{answer}", "packed rows"),
        ("tagging", "[P*4]{tokens}", "packed rows"),
        ("linear", "The waiter was right, and {text}[P*4]{answer}", "frozen context"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_plan_gives_the_states_of_the_reference(family: str, kind: str, template: str, plan: str) -> None:
    prompted, task = prompted_task(backbone_of(family, dtype=torch.float64), kind, template)
    examples = [example for record in RECORDS[0][:6] if (example := task.example(record)) is not None]
    found: dict[str, list[Tensor]] = {}
    for name in ("auto", "reference", "shared"):
        prompted.backbone.plan = "reference" if name == "reference" else "auto"
        prompted.backbone.plans.may_pack = name == "auto"
        found[name] = gradients(task.loss(prompted, examples, 0), prompted)
        used = prompted.backbone.plans.last
        shared = "frozen context" if plan == "frozen context" else "shared prefix"
        assert used == {"auto": plan, "reference": "reference", "shared": shared}[name]
    assert_same(found["auto"], found["reference"], 1e-9)
    assert_same(found["shared"], found["reference"], 1e-9)


@pytest.mark.parametrize("family", ["bert", "electra", "distilbert", "albert", "t5", "bart", "bloom", "opt", "gemma"])
def test_states_are_those_of_the_model_below_its_head(family: str) -> None:
    backbone = backbone_of(family)
    ids, mask = torch.tensor([[5, 17, 300, 42], [9, 8, 7, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    places = torch.tensor([[False, False, False, True], [False, False, True, False]])
    with torch.no_grad():
        states = backbone(ids, mask, positions=places, states=True)
        arguments, where = backbone.forward_pass.arguments(ids, mask, places)
        output = backbone.model(**arguments, output_hidden_states=True)
    last = (output.decoder_hidden_states if "decoder_hidden_states" in output else output.hidden_states)[-1]
    scale = 32**-0.5 if family == "t5" and backbone.model.config.tie_word_embeddings else 1.0
    assert torch.allclose(states, last[where] * scale, atol=1e-5)
    assert backbone(ids, mask, positions=places).shape == (2, 352)  # the hook is gone


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("kind", list(TASKS))
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_run_learns_saves_and_serves(family: str, kind: str, deep: bool, tmp_path: Path) -> None:
    backbone, listener = backbone_of(family), Listener()
    config = settings(tmp_path, TASKS[kind], {"deep": deep}, max_steps=40, batch_size=8, evaluations=4)
    prompt = train(config, backbone=backbone, records=RECORDS, reporter=listener)
    assert sum(listener.losses[-5:]) < sum(listener.losses[:5])
    loaded = SoftPrompt.load(tmp_path)
    assert torch.equal(loaded.rows, prompt.rows)
    assert loaded.task == prompt.task
    assert {"linear": ("bad", "fair", "good"), "several": ("film", "soup"), "tagging": TAGS}[kind] == (
        loaded.task.tags if isinstance(loaded.task, TaggingConfig) else loaded.task.labels  # type: ignore[union-attr]
    )
    for name, tensor in head_tensors(prompt.head).items():
        assert torch.equal(head_tensors(loaded.head)[name], tensor)
    with Engine(backbone) as engine:
        name = engine.load(tmp_path, "one")
        dev = RECORDS[1]
        assert engine.evaluate(name, dev)["loss"] == pytest.approx(prompt.summary["after"]["loss"], rel=1e-4)
        together, key = engine.predict(name, dev, batch_size=8), engine.prompts[name].task.answer_key
        assert [answer[key] for answer in together] == [engine.predict(name, [one])[0][key] for one in dev]
    assert not (tmp_path / "adapter_config.json").exists()
    assert not prompt.fits_peft


def test_the_prompt_itself_learns_and_not_the_head_alone(tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    config = settings(tmp_path, LINEAR, {"encoder": {"type": "embedding"}})
    parts = assemble(config, backbone, RECORDS)
    start = parts.prompted.rows().detach().clone()
    parts.prompted.close()
    prompt = train(config, backbone=backbone, records=RECORDS)
    assert float((prompt.rows - start).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["linear", "tagging"])
def test_a_resumed_run_ends_as_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    prompt = {"encoder": {"type": "mlp", "hidden_size": 8, "dropout": 0.2}, "deep": kind == "tagging"}
    whole = train(settings(tmp_path / "a", TASKS[kind], prompt), backbone=backbone, records=RECORDS)
    config = settings(tmp_path / "b", TASKS[kind], prompt)
    with pytest.raises(Stopped):
        train(config, backbone=backbone, records=RECORDS, reporter=StopsAt(5))
    resumed = train(config, backbone=backbone, records=RECORDS, resume=True)
    assert torch.equal(resumed.rows, whole.rows)
    assert head_tensors(resumed.head).keys() == {"head.weight", "head.bias"}
    for name, tensor in head_tensors(whole.head).items():
        assert torch.equal(head_tensors(resumed.head)[name], tensor)


def test_the_best_checkpoint_keeps_its_own_head(tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    rising = settings(tmp_path, LINEAR, max_steps=6, evaluations=6, learning_rate=3.0, warmup_ratio=0)
    prompt = train(rising, backbone=backbone, records=RECORDS)
    assert prompt.summary["best_step"] < 6  # else the last head would do as well
    with Engine(backbone) as engine:
        engine.add("best", prompt)
        found = engine.evaluate("best", RECORDS[1])
    assert found["accuracy"] == prompt.summary["after"]["accuracy"]
    assert found["loss"] == pytest.approx(prompt.summary["after"]["loss"], rel=1e-4)


def test_a_run_goes_on_from_another_ones_head_where_labels_are_the_same(tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    first = train(settings(tmp_path / "first", LINEAR), backbone=backbone, records=RECORDS)
    start = {"start": {"method": "prompt", "prompt": str(tmp_path / "first")}, "encoder": {"type": "embedding"}}
    second = train(settings(tmp_path / "second", LINEAR, start, max_steps=1), backbone=backbone, records=RECORDS)
    assert second.summary["before"]["loss"] == pytest.approx(first.summary["after"]["loss"], rel=1e-5)
    listener = Listener()
    config = settings(tmp_path / "third", TAGGING, start, max_steps=1)
    train(config, backbone=backbone, records=RECORDS, reporter=listener)
    assert any("the linear head starts anew, for" in warning for warning in listener.warnings)


def test_prompts_of_every_task_answer_in_mixed_batches(tmp_path: Path) -> None:
    backbone = backbone_of("llama")
    generation = {"type": "generation", "max_new_tokens": 3}
    runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "words": (VERBALIZER, {}),
        "linear": (LINEAR, {}),
        "several": (MULTI, {}),
        "tagging": (TAGGING, {}),
        "deep": (TAGGING, {"deep": True}),
        "text": (generation, {}),
    }
    with Engine(backbone) as engine:
        for name, (task, prompt) in runs.items():
            train(settings(tmp_path / name, task, prompt, max_steps=2), backbone=backbone, records=RECORDS)
            engine.load(tmp_path / name)
        names = [list(runs)[number % len(runs)] for number in range(14)]
        some = RECORDS[1][:14]
        together = engine.predict(names, some, batch_size=5)
        for name, record, answer in zip(names, some, together, strict=True):
            (alone,) = engine.predict(name, [record])
            key = engine.prompts[name].task.answer_key
            assert answer[key] == alone[key]
            assert answer.keys() == alone.keys()
        assert engine.classify("linear", ["soup great"])[0]["label"] in ("bad", "fair", "good")
        assert set(engine.classify("several", ["soup great"])[0]["labels"]) <= {"soup", "film"}
        with pytest.raises(SoftPromptError, match='the task of "linear" is linear_classification, and tag'):
            engine.tag("linear", ["soup"])


def test_labels_are_those_of_training_and_weights_count(tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    weighted = LINEAR | {"label_weights": {"good": 3.0}}
    parts = [assemble(settings(tmp_path, task), backbone, RECORDS) for task in (LINEAR, weighted)]
    with parts[0].prompted, parts[1].prompted:
        assert parts[0].config.task.labels == ("bad", "fair", "good")  # type: ignore[union-attr]
        losses = []
        for part in parts:
            by_label = {example.target: example for example in part.train}
            losses.append([float(part.task.loss(part.prompted, [by_label[n]], 0).detach()) for n in range(3)])
    assert losses[1] == pytest.approx([losses[0][0], losses[0][1], 3 * losses[0][2]], rel=1e-4)


def test_several_labels_are_a_list_or_a_text_with_separators() -> None:
    backbone = backbone_of("gpt2")
    config = LinearClassificationConfig(labels=("a", "b", "true"), multi_label=True, separator=";")
    task = task_for(backbone, config, Template.parse("{text}[P]{answer}"))
    targets = {}
    for value in (["a", "b"], "a; b;", [True], True, "", None, []):
        example = task.example({"text": "soup", "label": value})
        assert example is not None
        targets[str(value)] = example.target
    assert list(targets.values()) == [(0, 1), (0, 1), (2,), (2,), (), (), ()]


@pytest.mark.parametrize(
    ("value", "found"), [({"a": 1}, '{"a": 1}'), (["a", ["b"]], '["b"]'), ([{"a": 1}], '{"a": 1}'), ([None], "null")]
)
def test_something_else_among_several_labels_is_refused_with_its_place(value: Any, found: str) -> None:
    config = LinearClassificationConfig(multi_label=True, label_field="topics")
    said = f'a.jsonl, line 3: a label in the field "topics" is {found}, and should be a text'
    with pytest.raises(DataError, match=f"^{re.escape(said)}"):
        learnt_labels(config, [Record({"text": "x", "topics": value}, "a.jsonl, line 3")])


def test_micro_and_macro_f1_of_several_labels_are_scikit_learns() -> None:
    from sklearn.metrics import f1_score

    generator = torch.Generator().manual_seed(0)
    wanted, given = (torch.rand(40, 5, generator=generator) < 0.3 for _ in range(2))
    wanted[:, 4] = given[:, 4] = False
    micro, macro = average_f1s(wanted, given)
    assert micro == pytest.approx(f1_score(wanted.numpy(), given.numpy(), average="micro"))
    assert macro == pytest.approx(f1_score(wanted[:, :4].numpy(), given[:, :4].numpy(), average="macro"))
    assert average_f1s(wanted[:, 4:], given[:, 4:]) == (0.0, 0.0)


def test_the_head_on_disk_gives_the_trained_scores_to_the_last_bit() -> None:
    states = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)) * 5
    head = LinearHead.new(3, states, seed=0)
    assert float(head.scale) == 4.0
    saved = head_from(head_tensors(head))
    assert saved is not None
    assert torch.equal(saved(states), head(states))
    again = saved.rescaled(states)
    assert torch.equal(again.weight, head.weight)
    assert all(not parameter.requires_grad for parameter in saved.parameters())


def test_the_files_say_what_the_head_is_and_damage_is_found(tmp_path: Path) -> None:
    prompt = train(settings(tmp_path, LINEAR, max_steps=1), backbone=backbone_of("gpt2"), records=RECORDS)
    tensors = load_file(tmp_path / "soft_prompt.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"virtual_tokens": (4, 32), "head.weight": (3, 32), "head.bias": (3,)}
    description = read_description(tmp_path)
    assert description.head is not None
    assert description.head.model_dump() == {"outputs": 3, "width": 32}
    assert prompt.describe()["head"] == {"outputs": 3, "width": 32}
    assert "a linear head of 3 outputs" in (tmp_path / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SoftPromptError, match='"one" has a linear head, for which a merged model has no place'):
        merge_prompts({"one": prompt}, tmp_path / "merged", backbone="mini")
    values = {name: getattr(prompt, name) for name in prompt.__dataclass_fields__}
    with pytest.raises(SoftPromptError, match="has a linear head of 3 outputs, and the one given has none"):
        SoftPrompt(**values | {"head": None})
    broken = LinearHead(torch.full((3, 32), torch.nan), torch.zeros(3))
    with pytest.raises(SoftPromptError, match="the linear head holds a value that is infinite or not a number"):
        SoftPrompt(**values | {"head": broken})
    del tensors["head.bias"]
    save_file(tensors, tmp_path / "soft_prompt.safetensors")
    text = (tmp_path / "ptune.json").read_text(encoding="utf-8")
    from ptune.files import tensors_hash

    changed = tensors_hash(tmp_path / "soft_prompt.safetensors", SoftPromptError)
    text = text.replace(description.virtual_tokens.sha256, changed)
    (tmp_path / "ptune.json").write_text(text, encoding="utf-8")
    with pytest.raises(SoftPromptError, match=r"expected the tensors .*head.bias \[3\] and holds"):
        SoftPrompt.load(tmp_path)


def test_a_description_from_before_there_were_heads_still_loads(tmp_path: Path) -> None:
    train(settings(tmp_path, VERBALIZER, max_steps=1), backbone=backbone_of("gpt2"), records=RECORDS)
    path = tmp_path / "ptune.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values.pop("head") is None
    path.write_text(json.dumps(values), encoding="utf-8")
    assert SoftPrompt.load(tmp_path).head is None


def test_a_checkpoint_of_another_head_is_refused(tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    train(settings(tmp_path, LINEAR, max_steps=2), backbone=backbone, records=RECORDS)
    with assemble(settings(tmp_path, TAGGING), backbone, RECORDS).prompted as prompted:
        prompted.head = LinearHead.new(7, torch.randn(3, 32), 0)
        optimizer = torch.optim.AdamW(prompted.parameters())
        with pytest.raises(Exception, match="belongs to a run with other settings"):
            load_checkpoint(
                tmp_path / "run" / "checkpoint.safetensors", trained=prompted, optimizer=optimizer, origin={}
            )


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LINEAR | {"metric": "exact_match"}, {}, "metric exact_match does not go with multi_label false; choose accuracy"),
    (MULTI | {"metric": "accuracy"}, {}, "metric accuracy does not go with multi_label true; choose micro_f1"),
    (LINEAR | {"labels": ["a", "b", "a"]}, {}, "the label 'a' stands there twice; list each once"),
    (LINEAR | {"separator": ";"}, {}, "separator stands between several labels, and multi_label is off; turn it on"),
    (LINEAR | {"labels": ["a"]}, {}, "a classification needs at least two labels"),
    (LINEAR | {"label_weights": {"a": 0}}, {}, "the weight of 'a' is not above 0"),
    (LINEAR, {"template": "[P*4]{text}"}, "a template has one {answer}, and there is none in"),
    (TAGGING, {"template": "[P*4]{tokens}{answer}"}, "the template of a tagging has no {answer}; take it out"),
    (TAGGING, {"template": "[P*4]{text}"}, "put {tokens} into '[P*4]{text}', or name another field as"),
    (TAGGING, {"chat": True}, "turn prompt.chat off"),
    (TAGGING | {"tags": ["O", "X-PER"]}, {}, "the tag 'X-PER' is of no scheme that ptune reads; write O, or B-"),
    (TAGGING | {"tag_names": {0: "O", 1: "PER"}}, {}, "the tag 'PER' is of no scheme that ptune reads"),
]


@pytest.mark.parametrize(("task", "prompt", "sentence"), MISTAKES)
def test_mistakes_in_settings_are_named(task: dict[str, Any], prompt: dict[str, Any], sentence: str) -> None:
    template = "[P*4]{tokens}" if task["type"] == "tagging" else "[P*4]{text}{answer}"
    with pytest.raises(ConfigError) as caught:
        parse_config({"task": task, "prompt": {"template": template} | prompt})
    assert sentence in str(caught.value)


def test_mistakes_in_records_are_named(tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    train_records, dev = RECORDS
    for label, sentence in (
        ("worst", 'the label "worst" is not among bad, fair, good; add it to task.labels or mend the record'),
        (["bad"], "holds list, and should be one label; write it there, or set task.multi_label for several"),
        (None, "is empty, and should be one label"),
    ):
        wrong = [type(dev[0])(dict(dev[0]) | {"label": label}, "record 7")]
        with pytest.raises(DataError) as caught:
            assemble(settings(tmp_path, LINEAR), backbone, (train_records, wrong))
        assert sentence in str(caught.value)
        assert "record 7" in str(caught.value)
    with pytest.raises(ConfigError, match='task.label_weights: the label "gut" is not among bad, fair, good'):
        assemble(settings(tmp_path, LINEAR | {"label_weights": {"gut": 2.0}}), backbone, RECORDS)
    same = [type(one)(dict(one) | {"label": "bad"}, "a record") for one in dev]
    with pytest.raises(ConfigError, match="needs at least 2 labels, and has bad; list them as task.labels"):
        assemble(settings(tmp_path, LINEAR), backbone, (same, same))


def test_the_command_line_trains_scores_uses_and_looks_into_one(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "model")
    for name, rows in zip(("train", "dev"), RECORDS, strict=True):
        lines = "".join(json.dumps(dict(row)) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    values = settings(tmp_path / "prompt", MULTI).model_dump(mode="json")
    values |= {"model": str(tmp_path / "model")}
    values["data"] = {"train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ptune", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == code, done.stderr
        return done

    said = run("train", tmp_path / "run.yaml").stdout
    assert "for 4 virtual tokens and a linear head of 2 outputs" in said
    run("eval", tmp_path / "prompt", "--data", tmp_path / "dev.jsonl", "--json", tmp_path / "eval.json")
    metrics = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics.keys() == {"micro_f1", "macro_f1", "exact_match", "loss", "prediction_share"}
    assert metrics["loss"] == pytest.approx(SoftPrompt.load(tmp_path / "prompt").summary["after"]["loss"], rel=1e-4)
    answer = json.loads(run("predict", tmp_path / "prompt", "the soup was great").stdout)
    assert answer["probabilities"].keys() == {"soup", "film"}
    shown = run("inspect", tmp_path / "prompt").stdout
    assert "2 outputs, read from hidden states of width 32" in shown
    assert "no, for PEFT's adapter of a soft prompt has no place for its linear head" in shown
    listed = run("list", tmp_path).stdout
    assert "linear_classification" in listed
    data = run("inspect", "data", tmp_path / "run.yaml", "--count", 1).stdout
    assert "right: " in data
    assert "cannot be merged" in run("merge", tmp_path / "prompt", "--output", tmp_path / "merged", code=2).stderr
    refused = run("train", tmp_path / "run.yaml", "--task.labels", "[soup]", "--overwrite", code=2).stderr
    assert 'the label "film" is not among soup; add it to task.labels or mend the record' in refused
