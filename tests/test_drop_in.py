"""`ptune.prompted` in the scripts of others: stock Trainer, stock collator, ``generate``, checkpoints, PEFT's files."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    GenerationConfig,
    LogitsProcessor,
    TextStreamer,
    Trainer,
    TrainingArguments,
)

from ptune.config.run import EncoderConfig, RunConfig, StartConfig
from ptune.drop_in.prefixed_model import PrefixedModel
from ptune.drop_in.prompted import prompted
from ptune.errors import BackboneError, ConfigError, SoftPromptError
from ptune.models.backbone import Backbone
from ptune.training.train import train

P = 4

# The well-known tutorial's script. Its two lines on PEFT are the only ones that change.
SCRIPT = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from peft import PromptEncoderConfig, PromptEncoderReparameterizationType, TaskType, get_peft_model

tokenizer = AutoTokenizer.from_pretrained(MODEL)
ds = Dataset.from_list(RECORDS)

def process_func(example):
    MAX_LENGTH = 256
    question = "\\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\\n\\nAssistant: "
    instruction = tokenizer(question)
    response = tokenizer(example["output"] + tokenizer.eos_token)
    input_ids = instruction["input_ids"] + response["input_ids"]
    attention_mask = instruction["attention_mask"] + response["attention_mask"]
    labels = [-100] * len(instruction["input_ids"]) + response["input_ids"]
    return {
        "input_ids": input_ids[:MAX_LENGTH],
        "attention_mask": attention_mask[:MAX_LENGTH],
        "labels": labels[:MAX_LENGTH],
    }

tokenised_ds = ds.map(process_func, remove_columns=ds.column_names)
model = AutoModelForCausalLM.from_pretrained(MODEL)
model = get_peft_model(model, PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=10, \
encoder_reparameterization_type=PromptEncoderReparameterizationType.MLP, encoder_hidden_size=1024))
model.print_trainable_parameters()
args = TrainingArguments(
    output_dir=OUTPUT,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=8,
    logging_steps=10,
    num_train_epochs=1,
)
trainer = Trainer(
    model=model,
    args=args,
    processing_class=tokenizer,
    train_dataset=tokenised_ds,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
)
trainer.train()
ipt = tokenizer("Human: Give three tips.\\n\\nAssistant: ", return_tensors="pt").to(model.device)
answer = tokenizer.decode(model.generate(**ipt, max_new_tokens=12, do_sample=True)[0], skip_special_tokens=True)
"""
OUR_IMPORT = "from ptune import prompted"
OUR_CALL = "model = prompted(model, tokenizer=tokenizer, num_virtual_tokens=10)"

RECORDS = [
    {"instruction": "Give three tips for staying healthy.", "input": "", "output": "Sleep, walk, and eat greens."},
    {"instruction": "Is this good or bad?", "input": "The waiter brought the wrong soup twice.", "output": "bad"},
    {"instruction": "Is this good or bad?", "input": "The film was a quiet wonder.", "output": "good"},
    {"instruction": "这条评论是好评还是差评？", "input": "这家店的苹果很新鲜，送货也快。", "output": "好评"},
] * 4


def two_lines_changed(script: str) -> str:
    lines = script.splitlines()
    changed = [
        OUR_IMPORT if line.startswith("from peft") else OUR_CALL if line.startswith("model = get_peft") else line
        for line in lines
    ]
    assert sum(line.startswith("+ ") for line in difflib.ndiff(lines, changed)) == 2
    return "\n".join(changed)


@pytest.fixture(scope="module")
def bloom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bloom")
    tiny_model("bloom").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def run_script(script: str, model: Path, records: list[dict[str, str]], output: Path) -> dict[str, Any]:
    namespace: dict[str, Any] = {"MODEL": str(model), "RECORDS": records, "OUTPUT": str(output)}
    exec(script, namespace)
    return namespace


def steps_of_script(
    model: Path, records: list[dict[str, str]], output: Path, capsys: pytest.CaptureFixture[str]
) -> int:
    """Run the script with its two lines changed, look at all it did, and return how many steps it took."""
    result = run_script(two_lines_changed(SCRIPT), model, records, output)
    assert "parameters (" in capsys.readouterr().out
    assert math.isfinite(result["trainer"].state.log_history[-1]["train_loss"])
    assert result["answer"].startswith("Human: Give three tips.\n\nAssistant: ")
    original = AutoModelForCausalLM.from_pretrained(model).state_dict()
    trained = result["model"].prompted.backbone.model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in original.items())
    result["model"].close()
    return int(result["trainer"].state.global_step)


def test_the_tutorials_script_runs_with_two_lines_changed(
    bloom_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steps_of_script(bloom_folder, RECORDS, tmp_path / "ours", capsys) == math.ceil(len(RECORDS) / 8)


def test_the_tutorials_script_is_one_that_runs_on_peft(bloom_folder: Path, tmp_path: Path) -> None:
    assert run_script(SCRIPT, bloom_folder, RECORDS, tmp_path / "theirs")["trainer"].state.global_step == 2


def test_the_tutorials_script_runs_on_alpaca(
    bloom_folder: Path, tmp_path: Path, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (real_data / "alpaca_zh" / "train.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, 64)]
    records = [{name: record.get(name) or "" for name in ("instruction", "input", "output")} for record in records]
    assert steps_of_script(bloom_folder, records, tmp_path / "alpaca", capsys) == math.ceil(len(records) / 8)


def tokenised(records: list[dict[str, str]] = RECORDS) -> Dataset:
    tokenizer, rows = tiny_tokenizer(), []
    for record in records:
        context = tokenizer(f"Human: {record['instruction']}\n\nAssistant: ").input_ids
        answer = tokenizer(record["output"] + tokenizer.eos_token).input_ids
        rows.append({"input_ids": context + answer, "labels": [-100] * len(context) + answer})
    return Dataset.from_list(rows)


def trainer_of(model: PrefixedModel, folder: Path, **settings: Any) -> Trainer:
    extra = {name: settings.pop(name) for name in ("compute_metrics", "callbacks") if name in settings}
    arguments = {"per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1, "report_to": "none"}
    collator = DataCollatorForSeq2Seq(tokenizer=tiny_tokenizer(), padding=True)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), disable_tqdm=True, use_cpu=True, **arguments | settings),
        train_dataset=tokenised(),
        eval_dataset=tokenised(),
        data_collator=collator,
        **extra,
    )


def prompted_tiny(family: str = "bloom", **settings: Any) -> PrefixedModel:
    return prompted(tiny_model(family), **{"tokenizer": tiny_tokenizer(), "num_virtual_tokens": P} | settings)


def state(model: PrefixedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def collated() -> dict[str, Tensor]:
    rows = [tokenised()[index] for index in (0, 1, 3)]
    return dict(DataCollatorForSeq2Seq(tokenizer=tiny_tokenizer(), padding=True)(rows))


def test_stock_trainer_lowers_the_loss_by_the_encoder_alone(tmp_path: Path) -> None:
    model = prompted_tiny()
    backbone = model.prompted.backbone.model
    before, encoder = {name: value.clone() for name, value in backbone.state_dict().items()}, state(model)
    trainer = trainer_of(model, tmp_path, num_train_epochs=20, learning_rate=0.03)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    assert not same(state(model), encoder)
    assert backbone.config.use_cache  # Trainer writes into the copy of the config


def test_trainer_accumulates_one_by_eight_as_eight_by_one(tmp_path: Path) -> None:
    ends = []
    for batch, accumulation in ((8, 1), (1, 8)):
        model = prompted_tiny()
        trainer_of(
            model,
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            max_grad_norm=0.0,
            optim="sgd",
        ).train()
        ends.append(model.rows())
    assert torch.allclose(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_checkpoint_holds_the_encoder_only_and_resume_ends_as_the_unbroken_run(tmp_path: Path) -> None:
    dropout = EncoderConfig(type="mlp", dropout=0.2)
    unbroken = prompted_tiny(encoder=dropout)
    trainer_of(unbroken, tmp_path / "unbroken", max_steps=6).train()

    trainer_of(prompted_tiny(encoder=dropout), tmp_path / "broken", max_steps=6, save_steps=3).train()
    saved = load_file(tmp_path / "broken" / "checkpoint-3" / "model.safetensors")
    resumed = prompted_tiny(encoder=dropout, seed=9)
    assert saved.keys() == resumed.state_dict().keys()
    assert all(name.startswith("prompted.encoder.") for name in saved)
    assert not same(state(resumed), state(unbroken))
    trainer_of(resumed, tmp_path / "broken", max_steps=6, save_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3")
    )
    assert same(state(resumed), state(unbroken))


def test_the_best_checkpoint_is_what_generates_at_the_end(tmp_path: Path) -> None:
    model = prompted_tiny()
    trainer = trainer_of(
        model,
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best is an early one
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name != "checkpoint-4"
    assert not model.training  # its rows were asked for in the last evaluation, before the best ones were loaded
    other = prompted_tiny(seed=5)
    other.load_state_dict(load_file(best / "model.safetensors"))
    assert torch.equal(model.prompted.rows(), other.rows())


def test_evaluation_hands_logits_that_line_up_with_labels_to_metrics(tmp_path: Path) -> None:
    model, seen = prompted_tiny(), {}

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        seen["shapes"] = (logits.shape, labels.shape)
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"own_loss": functional.cross_entropy(logits[labels != -100], labels[labels != -100]).item()}

    result = trainer_of(model, tmp_path, per_device_eval_batch_size=16, compute_metrics=metrics).evaluate()
    assert seen["shapes"][0][:2] == seen["shapes"][1]
    assert seen["shapes"][0][2] == 352
    assert math.isclose(result["eval_own_loss"], result["eval_loss"], rel_tol=1e-4)


def test_label_smoothing_is_of_the_next_token(tmp_path: Path) -> None:
    trainer = trainer_of(prompted_tiny(), tmp_path, label_smoothing_factor=1e-9)
    batch = collated()
    smoothed = trainer.compute_loss(trainer.model, dict(batch))
    assert math.isclose(smoothed.item(), trainer.model(**batch).loss.item(), rel_tol=1e-4)


def reference_logits(model: PrefixedModel, ids: Tensor) -> Tensor:
    """Logits ``[1, T, V]`` of one row by concatenated embeddings, the virtual tokens' own cut off."""
    backbone = model.prompted.backbone.model
    embeddings = torch.cat([model.rows().to(backbone.dtype), backbone.get_input_embeddings()(ids)])
    return backbone(inputs_embeds=embeddings.unsqueeze(0)).logits[:, len(model.rows()) :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_loss_are_those_of_concatenated_embeddings(family: str, side: str) -> None:
    model, tokenizer = prompted_tiny(family).eval(), tiny_tokenizer()
    tokenizer.padding_side = side
    batch = tokenizer(["Human: Give three tips", "a wonder"], return_tensors="pt", padding=True)
    mask = batch.attention_mask
    labels = batch.input_ids.where(mask == 1, -100)
    output = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels)
    assert output.logits.shape == (*labels.shape, 352)
    total, count = 0.0, 0
    for row in range(2):
        ids = batch.input_ids[row][mask[row] == 1]
        expected = reference_logits(model, ids)[0]
        scale = float(expected.abs().max())
        assert torch.allclose(output.logits[row][mask[row] == 1], expected, rtol=1e-4, atol=1e-4 * scale)
        total += functional.cross_entropy(expected[:-1], ids[1:], reduction="sum").item()
        first = model(input_ids=ids[None, :1], labels=ids[None, :1])  # the virtual tokens predict the first one
        total, count = total + first.loss.item(), count + len(ids)
    assert math.isclose(output.loss.item(), total / count, rel_tol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_token_of_text_has_a_log_probability_behind_the_virtual_tokens(side: str) -> None:
    model = prompted_tiny().eval()
    ids, mask = torch.tensor([[40, 41, 42, 43], [50, 51, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if side == "left":
        ids[1], mask[1] = ids[1].roll(2), mask[1].roll(2)
    found = model.token_log_probabilities(ids, mask)
    assert torch.equal(found.isnan(), mask == 0)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(-found.nanmean(), loss)
    behind = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    torch.testing.assert_close(found[0, 1:], behind[:, 0])
    learnt = model.train().token_log_probabilities(ids, mask)
    (gradient, *_) = torch.autograd.grad(learnt.nansum(), list(model.parameters()))
    assert bool(gradient.abs().sum() > 0)


def test_loss_is_the_same_with_logits_and_without_and_divides_by_what_trainer_counted() -> None:
    model, batch = prompted_tiny(), collated()
    count = int((batch["labels"] != -100).sum())
    with_logits = model(**batch)
    assert with_logits.logits.requires_grad
    without = model(**batch, skip_logits=True)
    assert without.logits is None
    assert math.isclose(with_logits.loss.item(), without.loss.item(), rel_tol=1e-5)
    for skip in (True, False, None):
        summed = model(**batch, num_items_in_batch=torch.tensor(7), skip_logits=skip)
        assert math.isclose(summed.loss.item(), with_logits.loss.item() * count / 7, rel_tol=1e-5)
        assert (summed.logits is None) == (skip is not False)
    assert model.eval()(**batch, num_items_in_batch=7).logits is not None


def greedy(model: PrefixedModel, text: str, steps: int) -> list[int]:
    ids = torch.tensor(tiny_tokenizer()(text).input_ids)
    for _ in range(steps):
        following = reference_logits(model, ids)[0, -1].argmax()
        ids = torch.cat([ids, following[None]])
        if following == 2:
            break
    return ids.tolist()


TEXTS = ["Human: Give three tips for staying healthy.", "a wonder", "这家店的苹果"]


def left_padded(texts: list[str]) -> dict[str, Tensor]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cached", "uncached"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate_is_greedy_on_concatenated_embeddings_padded_or_not(family: str, options: dict[str, Any]) -> None:
    model = prompted_tiny(family)
    model.train()  # as Trainer leaves it
    expected = [greedy(model, text, 8) for text in TEXTS]
    batch = left_padded(TEXTS)
    found = model.generate(**batch, max_new_tokens=8, do_sample=False, **options)
    assert torch.equal(found[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    for row, text, alone in zip(found, TEXTS, expected, strict=True):
        kept = row[int(batch["input_ids"].shape[1] - len(tiny_tokenizer()(text).input_ids)) :].tolist()
        assert kept[: len(alone)] == alone
        ids = torch.tensor([tiny_tokenizer()(text).input_ids])
        assert model.generate(ids, max_new_tokens=8, do_sample=False, **options)[0].tolist() == alone
    assert model.training


def test_lengths_of_generate_count_the_users_tokens() -> None:
    model, batch = prompted_tiny("llama"), left_padded(["Human: Give"])
    length = batch["input_ids"].shape[1]
    model.generation_config.eos_token_id = None
    assert model.generate(**batch, max_length=length + 3).shape == (1, length + 3)
    assert model.generate(**batch, max_new_tokens=3).shape == (1, length + 3)
    assert model.generate(**batch).shape == (1, length + 20)
    config = GenerationConfig(max_length=length + 5, eos_token_id=None)
    assert model.generate(**batch, generation_config=config).shape == (1, length + 5)
    assert config.max_length == length + 5
    plain = tiny_model("llama")
    for either in (model, plain):
        either.generation_config.eos_token_id = [token for token in range(352) if token != 7]
        assert either.generate(**batch, max_length=length + 9, min_length=length + 4).shape == (1, length + 5)


def test_beams_samples_and_outputs_hold_words_alone() -> None:
    model, batch = prompted_tiny("qwen2"), left_padded(TEXTS)
    several = model.generate(**batch, max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert len(several) == 6
    assert int(several.max()) < 352
    output = model.generate(
        **batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(output.sequences, model.generate(**batch, max_new_tokens=4, do_sample=False))
    assert len(output.scores) == 4


PENALTIES = [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3, "num_beams": 2}]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_penalties_look_at_the_text_and_never_at_pads_or_virtual_tokens(penalty: dict[str, Any]) -> None:
    model, batch = prompted_tiny("llama"), left_padded(TEXTS)
    width = batch["input_ids"].shape[1]
    batched = model.generate(**batch, max_new_tokens=10, do_sample=False, **penalty)
    for row, text in zip(batched, TEXTS, strict=True):
        ids = torch.tensor([tiny_tokenizer()(text).input_ids])
        alone = model.generate(ids, max_new_tokens=10, do_sample=False, **penalty)[0].tolist()
        assert row[width - ids.shape[1] :].tolist()[: len(alone)] == alone
    config = GenerationConfig(max_new_tokens=10, do_sample=False, **penalty)
    assert torch.equal(model.generate(**batch, generation_config=config), batched)


def test_penalised_repetition_is_what_transformers_does_to_words() -> None:
    """Virtual tokens that are words: the penalty on the text alone is that of the text as ids."""
    model, plain = prompted_tiny("llama"), tiny_model("llama")
    batch = left_padded(["a wonder a wonder"])
    free = model.generate(**batch, max_new_tokens=8, do_sample=False)
    bound = model.generate(**batch, max_new_tokens=8, do_sample=False, repetition_penalty=5.0)
    new = bound[0, batch["input_ids"].shape[1] :].tolist()
    assert not set(new) & set(batch["input_ids"][0].tolist())
    assert len(new) == len(set(new))
    assert bound.tolist() != free.tolist()
    assert plain.generate(**batch, max_new_tokens=8, do_sample=False, repetition_penalty=5.0).shape == bound.shape


def test_a_callers_processor_criterion_function_and_streamer_see_text_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, batch = prompted_tiny("gpt2"), left_padded(["a wonder"])
    seen: list[Tensor] = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids)
            return scores

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        seen.append(input_ids)
        return torch.full((len(input_ids),), input_ids.shape[1] >= batch["input_ids"].shape[1] + 3)

    def allowed(_: int, ids: Tensor) -> list[int]:
        seen.append(ids[None])
        return list(range(10, 352))

    tokenizer = tiny_tokenizer()
    found = model.generate(
        **batch,
        max_new_tokens=9,
        do_sample=False,
        logits_processor=[Watch()],
        stopping_criteria=[stop],
        prefix_allowed_tokens_fn=allowed,
        streamer=TextStreamer(tokenizer),
    )
    assert found.shape[1] == batch["input_ids"].shape[1] + 3
    assert len(seen) == 9
    assert all(torch.equal(ids, found[:, : ids.shape[1]]) for ids in seen)
    assert capsys.readouterr().out.strip() == tokenizer.decode(found[0]).strip()


REFUSED: list[tuple[Callable[[PrefixedModel], Any], str]] = [
    (
        lambda model: model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[0]])),
        "a model with virtual tokens takes input_ids, attention_mask and labels, and found position_ids, which would "
        "be ignored; leave it out",
    ),
    (
        lambda model: model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5]])),
        "input_ids and labels have one shape [B, T], and found [1, 2] and [1, 1]; give both as the collator made them",
    ),
    (
        lambda model: model.generate(torch.tensor([[5]]), prompt_lookup_num_tokens=3),
        "generate cannot take prompt_lookup_num_tokens together with virtual tokens; leave it out",
    ),
    (
        lambda model: model.generate(torch.tensor([[5]]), token_healing=True),
        "generate cannot take token_healing together with virtual tokens; leave it out",
    ),
    (
        lambda model: model.generate(torch.tensor([[3, 5], [6, 7]])),
        "generate expected an attention_mask for a batch with pads; pass that of the tokenizer",
    ),
    (
        lambda model: model.gradient_checkpointing_enable(every_n_layers=2),
        "gradient checkpointing cannot take every_n_layers with virtual tokens; leave it out",
    ),
    (
        lambda model: model.activation_checkpointing_enable(layers=2),
        "gradient checkpointing has no setting layers; leave it out",
    ),
]


@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_would_be_ignored_is_refused(call: Callable[[PrefixedModel], Any], text: str) -> None:
    model = prompted_tiny()
    with pytest.raises(ConfigError) as error:
        call(model)
    assert str(error.value) == text


SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_virtual_tokens": 0}, ConfigError, "num_virtual_tokens is at least 1, and found 0; give a positive number"),
    ({"encoder": "lstn"}, ConfigError, 'encoder is embedding, mlp or lstm, and found "lstn". Did you mean "lstm"?'),
    (
        {"tokenizer": None, "start": StartConfig(method="text", text="good or bad")},
        BackboneError,
        '"BloomForCausalLM" was given without its tokenizer, which is needed here; give both',
    ),
]


@pytest.mark.parametrize(("settings", "kind", "text"), SETTINGS, ids=["count", "encoder", "tokenizer"])
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        prompted_tiny(**settings)
    assert str(error.value) == text


def test_a_model_that_is_prompted_already_is_refused() -> None:
    with pytest.raises(BackboneError, match="expected a causal language model of transformers and found PrefixedModel"):
        prompted(prompted_tiny().eval().requires_grad_())  # type: ignore[arg-type]


def test_one_process_on_several_gpus_is_refused() -> None:
    replica = prompted_tiny()._replicate_for_data_parallel()
    with pytest.raises(BackboneError, match="start the script by torchrun or accelerate launch"):
        replica(input_ids=torch.tensor([[5]]))


def test_a_checkpoint_of_another_encoder_is_refused(tmp_path: Path) -> None:
    for other, difference in (
        ({"encoder": "lstm"}, "its parts are those of another kind"),
        (
            {"num_virtual_tokens": 7},
            f"it has 7 virtual tokens and this one {P}; give prompted\\(\\) num_virtual_tokens",
        ),
        ({"encoder": EncoderConfig(hidden_size=7)}, "its layers have another width"),
    ):
        with pytest.raises(SoftPromptError, match=f"the checkpoint is of another prompt encoder: {difference}"):
            prompted_tiny().load_state_dict(prompted_tiny(**other).state_dict(), strict=False)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_other_kinds_of_models_are_refused(family: str) -> None:
    with pytest.raises(BackboneError, match="expected a causal language model and found"):
        prompted(tiny_model(family))


def test_a_closed_model_says_so() -> None:
    model = prompted_tiny()
    model.close()
    with pytest.raises(BackboneError, match="the model was closed"):
        model(torch.tensor([[5, 6]]))


def test_pads_on_the_right_are_refused_where_a_text_goes_on() -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ConfigError, match='tokenizer.padding_side = "left"'):
        prompted_tiny().generate(ids, mask, max_new_tokens=2)
    prompted_tiny().generate(ids.flip(1), mask.flip(1), max_new_tokens=2)


def test_virtual_tokens_count_among_the_models_positions() -> None:
    model = prompted_tiny("llama")
    limit = model.prompted.backbone.context_limit
    assert limit is not None
    model(torch.full((1, limit - P), 5))
    with pytest.raises(BackboneError, match=f"cut texts to {limit - P} tokens"):
        model(torch.full((1, limit - P + 1), 5))


def test_a_model_whose_matrix_lies_elsewhere_is_refused() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(BackboneError, match="ZeRO-3"):
        prompted(model)


def test_a_soft_prompt_to_start_from_must_fit(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    config = RunConfig.model_validate(
        {
            "task": {"type": "generation", "answer_field": "b"},
            "prompt": {"template": f"[P*{P}]{{a}}{{answer}}"},
            "training": {"max_steps": 1},
            "output": str(tmp_path / "prompt"),
        }
    )
    records = [{"a": "one", "b": "two"}] * 4
    train(config, backbone=Backbone(model, tokenizer, "tiny"), records=(records, records))
    start = StartConfig(method="prompt", prompt=str(tmp_path / "prompt"))
    prompted(model, tokenizer=tokenizer, num_virtual_tokens=P, start=start).close()
    with pytest.raises(ConfigError, match=f"has {P} virtual tokens, and num_virtual_tokens is {P + 1}"):
        prompted(model, tokenizer=tokenizer, num_virtual_tokens=P + 1, start=start)
    other = tiny_model("llama")
    other.get_input_embeddings().weight.data.mul_(-1)
    with pytest.raises(SoftPromptError, match="backbone"):
        prompted(other, tokenizer=tokenizer, num_virtual_tokens=P, start=start)


@pytest.mark.parametrize("encoder", ["embedding", "mlp", "lstm"])
def test_without_a_tokenizer_virtual_tokens_start_from_common_rows(encoder: str) -> None:
    model = prompted_tiny(tokenizer=None, encoder=encoder)
    assert torch.equal(model.rows(), prompted_tiny(tokenizer=None, encoder=encoder).rows())
    assert not torch.equal(model.rows(), prompted_tiny(tokenizer=None, encoder=encoder, seed=1).rows())
    matrix = model.prompted.backbone.model.get_input_embeddings().weight
    ids = [int((matrix == row).all(-1).nonzero()) for row in model.rows()]
    assert len(set(ids)) == P
    assert not {1, 2, 3} & set(ids)


def test_gradient_checkpointing_by_trainer_recomputes_and_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for recompute in (False, True):
        model = prompted_tiny("opt")  # whose layers have dropouts of their own
        trainer_of(model, tmp_path / str(recompute), max_steps=2, gradient_checkpointing=recompute).train()
        ends.append(model.rows())
        generated = model.generate(**left_padded(TEXTS), max_new_tokens=4, do_sample=False)
        assert generated.shape[0] == 3
    assert torch.allclose(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_the_model_goes_where_trainer_moves_the_encoder_and_keeps_its_dtype() -> None:
    model = prompted(tiny_model("llama", dtype=torch.bfloat16), num_virtual_tokens=P)
    model.to("meta")
    assert model.device.type == "meta"
    assert model.prompted.encoder.embedding.weight.device.type == "meta"
    assert model.prompted.backbone.model.dtype == torch.bfloat16
    assert model.prompted.encoder.embedding.weight.dtype == torch.float32


def test_half_precision_backbone_trains_float32_rows_on_a_float32_loss() -> None:
    model = prompted(tiny_model("llama", dtype=torch.bfloat16), num_virtual_tokens=P)
    loss = model(**collated()).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert model.prompted.encoder.embedding.weight.grad.abs().sum() > 0


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = prompted_tiny(encoder="embedding")
    model.print_trainable_parameters()
    total = P * 32 + sum(p.numel() for p in model.prompted.backbone.model.parameters())
    assert capsys.readouterr().out == f"trained: 128 of {total:,} parameters ({128 / total:.4%})\n"


@torch.no_grad()
def test_saved_pair_gives_the_same_logits_in_peft(tmp_path: Path) -> None:
    model = prompted_tiny("llama").eval()
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    ids = torch.tensor([tiny_tokenizer()(TEXTS[0]).input_ids])
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, P:]
    assert torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_closed_model_is_as_before() -> None:
    plain = tiny_model("bloom")
    own = plain.get_input_embeddings().forward
    model = prompted(plain, num_virtual_tokens=P)
    assert plain.get_input_embeddings().forward != own
    model.close()
    assert plain.get_input_embeddings().forward == own
    assert Backbone(plain, None, "tiny").vocabulary_size == 352
