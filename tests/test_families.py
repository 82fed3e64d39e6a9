"""Masked and encoder-decoder models: the same mathematics as plain embeddings, PEFT where it has the shape, and use."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig, TaskType, get_peft_model
from tiny_models import ENCODER_DECODER_FAMILIES, MASKED_FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn import functional

from ptune.config.run import RunConfig
from ptune.config.task import ClassificationConfig, GenerationConfig
from ptune.engine.engine import Engine
from ptune.errors import BackboneError, ConfigError, SoftPromptError, TemplateError
from ptune.families import CAUSAL, ENCODER_DECODER, MASKED, kind_of
from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.encoder import PromptEncoder
from ptune.prompts.virtual_tokens import input_embedding
from ptune.records.data import load_records
from ptune.rendering.batch import IGNORED
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.registry import task_for
from ptune.template import Template
from ptune.training.reporting import Reporter
from ptune.training.train import train

P = 4
LABELS = {"good": " great", "bad": " terrible", "fair": " good film"}


def backbone(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    return Backbone(tiny_model(family, dtype=dtype), tiny_tokenizer(family), family)


def encoder(width: int, dtype: torch.dtype = torch.float64) -> PromptEncoder:
    torch.manual_seed(3)
    return PromptEncoder.peft("mlp", P, width, 12).to(dtype)


def rows_of_ids(first: int, lengths: tuple[int, ...] = (9, 6, 4)) -> tuple[Tensor, Tensor]:
    """Rows that hold virtual tokens behind two words, padded on the right; ids and mask."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(lengths), max(lengths) + P).long()
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        words = torch.randint(4, 330, (length,), generator=generator)
        whole = torch.cat([words[:2], torch.arange(first, first + P), words[2:]])
        ids[row, : length + P], mask[row, : length + P] = whole, 1
    return ids, mask


def embeddings_of(model: Any, ids: Tensor, first: int, rows: Tensor) -> Tensor:
    """What should stand for ids, put together by hand, one row and one token at a time."""
    embed = input_embedding(model)
    tokens = [rows[i - first] if i >= first else embed(torch.tensor([i]))[0] for i in ids.flatten().tolist()]
    return torch.stack(tokens).view(*ids.shape, -1)


def assert_close(one: Tensor, other: Tensor, tolerance: float) -> None:
    assert one.shape == other.shape
    assert float((one - other).detach().abs().max()) <= tolerance * float(other.detach().abs().max())


@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_a_masked_model_s_loss_and_gradients_are_those_of_concatenated_embeddings(family: str) -> None:
    body = backbone(family, torch.float64)
    with PromptedModel(body, encoder(body.hidden_size)) as prompted:
        ids, mask = rows_of_ids(prompted.first_virtual_id)
        places = torch.zeros_like(ids, dtype=torch.bool)
        places[:, 7] = True
        labels = ids.where(places, IGNORED)
        ids[:, 7] = body.tokenizer.mask_token_id
        loss = prompted(ids, mask, labels=labels)
        ours = torch.autograd.grad(loss, list(prompted.encoder.parameters()))

        embeddings = embeddings_of(body.model, ids, prompted.first_virtual_id, prompted.encoder())
        expected = torch.zeros((), dtype=torch.float64)
        for row in range(len(ids)):  # alone, without any padding
            length = int(mask[row].sum())
            logits = body.model(inputs_embeds=embeddings[row : row + 1, :length]).logits
            expected = expected + functional.cross_entropy(logits[0, 7:8], labels[row, 7:8], reduction="sum")
        theirs = torch.autograd.grad(expected, list(prompted.encoder.parameters()))
    assert_close(loss, expected, 1e-9)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 1e-9)


@pytest.mark.parametrize("family", ENCODER_DECODER_FAMILIES)
def test_an_encoder_decoder_s_loss_and_gradients_are_peft_s(family: str) -> None:
    config = PromptEncoderConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=P,
        num_transformer_submodules=1,
        encoder_reparameterization_type="MLP",
        encoder_hidden_size=12,
    )
    torch.manual_seed(5)
    theirs = get_peft_model(tiny_model(family), config).double()
    theirs.base_model.eval()
    ours = encoder(32)
    ours.load_state_dict(theirs.prompt_encoder["default"].state_dict())
    body = backbone(family, torch.float64)
    generator = torch.Generator().manual_seed(1)
    contexts = [torch.randint(4, 330, (n,), generator=generator) for n in (7, 4)]
    answers = [torch.randint(4, 330, (n,), generator=generator) for n in (3, 5)]

    with PromptedModel(body, ours) as prompted:
        virtual = torch.arange(prompted.first_virtual_id, prompted.first_virtual_id + P)
        whole = [torch.cat([virtual, c, a]) for c, a in zip(contexts, answers, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(w) for w in whole], batch_first=True)
        labels = torch.full_like(ids, IGNORED)
        for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
            labels[row, P + len(context) : P + len(context) + len(answer)] = answer
        loss = prompted(ids, mask, labels=labels)
        loss.backward()

    pad = torch.nn.utils.rnn.pad_sequence
    logits = theirs(
        input_ids=pad(contexts, batch_first=True),
        attention_mask=pad([torch.ones_like(c) for c in contexts], batch_first=True),
        labels=(target := pad(answers, batch_first=True, padding_value=IGNORED)),
    ).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    expected.backward()
    assert_close(loss, expected, 1e-9)
    reference = dict(theirs.prompt_encoder["default"].named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, reference[name].grad, 1e-9)


@pytest.mark.parametrize("family", [*MASKED_FAMILIES, *ENCODER_DECODER_FAMILIES])
def test_a_batch_gives_what_each_record_alone_gives(family: str) -> None:
    body = backbone(family)
    template = "{text} It was{answer}." if body.kind is MASKED else "{text} It was{answer}"
    task = task_for(body, ClassificationConfig(verbalizer=LABELS), Template.parse(template))
    records = [{"text": "soup " * n} for n in (1, 9, 3, 14)]
    together = task.predict(body, records, batch_size=4)
    alone = [task.predict(body, [record], batch_size=1)[0] for record in records]
    for one, other in zip(together, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert len({round(answer["probability"], 4) for answer in alone}) > 1


@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_each_label_is_scored_at_its_own_number_of_masks(family: str) -> None:
    body = backbone(family, torch.float64)
    tokenizer = body.tokenizer
    task = task_for(body, ClassificationConfig(verbalizer=LABELS), Template.parse("{text} It was{answer}. Yes"))
    scores = []
    for words in LABELS.values():
        answer = tokenizer(words, add_special_tokens=False)["input_ids"]
        before = [1, *tokenizer("A film It was", add_special_tokens=False)["input_ids"]]
        after = [*tokenizer(". Yes", add_special_tokens=False)["input_ids"], 2]
        ids = torch.tensor([[*before, *[tokenizer.mask_token_id] * len(answer), *after]])
        logits = body.model(input_ids=ids).logits[0, len(before) : len(before) + len(answer)].log_softmax(-1)
        scores.append(logits[torch.arange(len(answer)), torch.tensor(answer)].sum())
    expected = torch.stack(scores).softmax(-1)
    (answer,) = task.predict(body, [{"text": "A film"}], batch_size=1)
    assert list(answer["probabilities"].values()) == pytest.approx(expected.tolist(), rel=1e-5)
    assert len({len(tokenizer(words, add_special_tokens=False)["input_ids"]) for words in LABELS.values()}) > 1


@pytest.mark.parametrize("family", ENCODER_DECODER_FAMILIES)
def test_the_loss_is_that_of_transformers_own_labels(family: str) -> None:
    body = backbone(family)
    task = task_for(body, GenerationConfig(), Template.parse("Say: {text}{answer}"))
    example = task.example({"text": "quiet wonder", "output": "The film"})
    assert example is not None
    ours = task.loss(body, [example], 0) / example.weight
    labels = body.tokenizer("The film", return_tensors="pt")["input_ids"]  # with <s> for BART and </s> as it adds them
    inputs = body.tokenizer("Say: quiet wonder", return_tensors="pt")
    theirs = body.model(input_ids=inputs["input_ids"], labels=labels).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ENCODER_DECODER_FAMILIES)
def test_a_prompt_of_words_generates_what_the_words_generate(family: str, use_cache: bool) -> None:
    body = backbone(family)
    words = body.tokenizer("a quiet film", add_special_tokens=False)["input_ids"]
    contexts = [[*words, 40, 41], [*words, 50, 51, 52, 53]]
    options = GenerationOptions(max_new_tokens=8)
    plain = generate(body, contexts, options, use_cache=use_cache)
    tokens = body.attach()
    first = tokens.allocate(len(words))
    tokens.set_rows(first, body.embeddings(torch.tensor(words)))
    virtual = list(range(first, first + len(words)))
    soft = [[*virtual, *context[len(words) :]] for context in contexts]
    prompted = generate(body, soft, options, use_cache=use_cache)
    tokens.detach()
    assert [answer.ids for answer in prompted] == [answer.ids for answer in plain]
    theirs = body.model.generate(torch.tensor([contexts[1]]), max_new_tokens=8, do_sample=False, num_beams=1)
    assert list(plain[1].ids) == [i for i in theirs[0, 1:].tolist() if i != body.tokenizer.eos_token_id]


def test_what_a_kind_cannot_do_is_said() -> None:
    body = backbone("bert")
    template = Template.parse("{text}{answer}")
    with pytest.raises(ConfigError, match="a masked language model writes no text"):
        task_for(body, GenerationConfig(), template)
    with pytest.raises(BackboneError, match="writes no text"):
        generate(body, [[5, 6]])
    with pytest.raises(TemplateError, match="reads from left to right, and more follows"):
        task_for(backbone("gpt2"), ClassificationConfig(verbalizer=LABELS), Template.parse("{text}{answer}."))
    with PromptedModel(body, encoder(32, torch.float32)) as prompted, pytest.raises(BackboneError, match="no token"):
        prompted.token_log_probabilities(*rows_of_ids(prompted.first_virtual_id))
    no_mask = tiny_tokenizer("gpt2")
    with pytest.raises(BackboneError, match="no mask token"):
        Backbone(tiny_model("bert"), no_mask, "bert")


def test_a_family_that_comes_in_several_kinds_is_what_its_folder_says(tmp_path: Path) -> None:
    from transformers import BertLMHeadModel

    config = MASKED_FAMILIES["bert"]()
    assert kind_of(config) is MASKED
    assert kind_of(ENCODER_DECODER_FAMILIES["t5"]()) is ENCODER_DECODER
    config.is_decoder = True
    BertLMHeadModel(config).save_pretrained(tmp_path / "decoder")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "decoder")
    assert Backbone.load(str(tmp_path / "decoder")).kind is CAUSAL
    tiny_model("bert").save_pretrained(tmp_path / "masked")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "masked")
    assert Backbone.load(str(tmp_path / "masked")).kind is MASKED


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "bart"])
def test_a_run_learns_saves_and_answers(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model(family).save_pretrained(model)
    tiny_tokenizer(family).save_pretrained(model)
    chance = random.Random(0)
    rows = []
    for _ in range(60):
        good = chance.random() < 0.5
        words = chance.sample(["soup", "film", "room", "waiter", "door"], 3) + ["great" if good else "terrible"]
        rows.append({"text": " ".join(words), "label": "positive" if good else "negative"})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    masked = kind_of(MASKED_FAMILIES[family]()) is MASKED if family in MASKED_FAMILIES else False
    config = RunConfig.model_validate(
        {
            "model": str(model),
            "data": str(data),
            "task": {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}},
            "prompt": {"template": "[P*2]{text}[P*2] It was{answer}." if masked else "{text}[P*4]{answer}"},
            "training": {"max_steps": 80, "batch_size": 8, "evaluations": 2, "learning_rate": 0.2, "samples": 1},
            "output": str(tmp_path / "prompt"),
        }
    )
    losses: list[float] = []

    class Losses(Reporter):
        def stepped(self, step: int, loss: float, learning_rate: float) -> None:
            losses.append(loss)

    prompt = train(config, reporter=Losses())
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    with Engine(str(model)) as engine:
        engine.add("trained", prompt)
        expected = engine.evaluate("trained", load_records(data))
    with Engine.for_prompt(tmp_path / "prompt") as engine:
        assert engine.evaluate("prompt", load_records(data)) == expected
        assert {answer["label"] for answer in engine.classify("prompt", ["great soup"])} <= {"positive", "negative"}
    other = Backbone(tiny_model("gpt2"), tiny_tokenizer(), "gpt2")
    with pytest.raises(SoftPromptError, match="another backbone"):
        prompt.check(other)
    assert not prompt.fits_peft


def test_peft_runs_an_encoder_decoder_s_prompt(tmp_path: Path) -> None:
    from peft import PeftModel

    body = backbone("t5")
    rows = torch.randn(P, 32, generator=torch.Generator().manual_seed(0))
    prompt = SoftPrompt(
        rows=rows,
        template=f"[P*{P}]{{text}}{{answer}}",
        task=GenerationConfig(),
        overlong="cut",
        backbone_name="t5",
        fingerprint=body.fingerprint(),
    )
    prompt.save(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model("t5"), tmp_path).eval()
    ids, start = torch.tensor([[40, 41, 42, 2]]), torch.tensor([[0, 60]])
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=start).logits
    tokens = body.attach()
    first = tokens.allocate(P)
    tokens.set_rows(first, rows)
    whole = torch.cat([torch.arange(first, first + P)[None], ids, torch.tensor([[60]])], dim=1)
    positions = torch.zeros_like(whole, dtype=torch.bool)
    positions[:, P + 3 :] = True
    ours = body.logits(whole, torch.ones_like(whole), positions)
    tokens.detach()
    assert_close(ours, expected[0], 1e-5)


def test_a_decoder_without_a_first_id_is_refused() -> None:
    model = tiny_model("t5")
    model.config.decoder_start_token_id = None
    ids, mask = torch.full((1, 6), 9), torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(BackboneError, match="the model's config names no decoder_start_token_id; set it as the family"):
        Backbone(model, tiny_tokenizer("t5"), "t5")(ids, mask, positions=mask.bool())
