"""Deep prompts: the words that they start from, PEFT's prefix tuning in every gradient, refused where they fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model
from test_peft_equivalence import assert_close, gradients, text_batch
from tiny_models import ALL_FAMILIES, FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn import functional

from ptune.config.run import EncoderConfig
from ptune.errors import BackboneError, SoftPromptError
from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.models.deep_start import check_shape, keys_and_values_of
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.deep_encoder import DeepEncoder, build_deep_encoder
from ptune.prompts.encoder import build_encoder
from ptune.prompts.keys_and_values import KeyValueShape, layers_of, new_cache, read_cache, rows_of
from ptune.prompts.virtual_tokens import input_embedding
from ptune.rendering.batch import IGNORED

pytestmark = pytest.mark.usefixtures("true_float64")

P = 5
MASKED = ["bert", "roberta", "xlm_roberta", "electra"]
REFUSED = sorted(set(ALL_FAMILIES) - set(FAMILIES) - set(MASKED))
ENCODERS = [
    EncoderConfig(type="embedding"),
    EncoderConfig(type="mlp", hidden_size=6),
    EncoderConfig(type="mlp", hidden_size=6, num_layers=1, dropout=0.5),
]
TEXTS = [[9, 40, 60, 70, 80, 99], [50, 41, 42], [100, 200], [3]]


def backbone_of(family: str, dtype: torch.dtype = torch.float64) -> Backbone:
    return Backbone(tiny_model(family, dtype=dtype), tiny_tokenizer(family), family)


def start(backbone: Backbone) -> Tensor:
    return backbone.embeddings(torch.arange(30, 30 + P))


def deep_model(backbone: Backbone, config: EncoderConfig | None = None) -> PromptedModel:
    values, shape = keys_and_values_of(backbone, start(backbone))
    encoder = build_deep_encoder(config or EncoderConfig(type="embedding"), shape, start(backbone), values, 0)
    return PromptedModel(backbone, encoder.to(backbone.dtype))


def behind(prompted: PromptedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of a batch behind the model's virtual tokens."""
    virtual = torch.arange(prompted.first_virtual_id, prompted.first_virtual_id + P).expand(len(batch["labels"]), -1)
    return (
        torch.cat([virtual, batch["input_ids"]], dim=-1),
        functional.pad(batch["attention_mask"], (P, 0), value=1),
        functional.pad(batch["labels"], (P, 0), value=IGNORED),
    )


def test_rows_and_layers_are_one_thing_in_two_shapes() -> None:
    shape = KeyValueShape(layers=3, heads=2, head_width=4)
    rows = torch.randn(P, shape.row_width)
    back, found = rows_of(layers_of(rows, shape))
    assert torch.equal(back, rows)
    assert found == shape
    keys, values = layers_of(rows, shape)[1]
    assert torch.equal(keys[0, 1, 3], rows[3, 20:24])  # behind the first layer's 16, its second head
    assert torch.equal(values[0, 0, 3], rows[3, 24:28])
    assert read_cache(new_cache(layers_of(rows, shape), 2))[2][0].shape == (2, 2, P, 4)


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda e: f"{e.type}-{e.dropout}")
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_it_gives_the_loss_of_the_words_that_it_starts_from(family: str, encoder: EncoderConfig) -> None:
    backbone = backbone_of(family)
    plain = PromptedModel(backbone, build_encoder(EncoderConfig(type="embedding"), start(backbone), 0).double())
    deep = deep_model(backbone, encoder)
    losses = []
    for prompted in (deep, plain):
        ids, mask, labels = behind(prompted, text_batch())
        losses.append(prompted(ids, mask, labels=labels))
    assert_close(losses[0], losses[1], 1e-6, "loss")  # the start is kept in float32
    losses[0].backward()
    changed = [name for name, gradient in gradients(deep.encoder).items() if gradient.abs().max() > 0]
    assert ("values" in changed) == (encoder.type == "mlp")
    assert any(name.startswith(("embedding", "transform")) for name in changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_it_generates_what_the_words_that_it_starts_from_generate(family: str) -> None:
    backbone = backbone_of(family, torch.float32)
    with deep_model(backbone).eval() as deep:
        first = deep.use()
        for settings in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}):
            options = GenerationOptions(max_new_tokens=8, **settings)
            # the bare model's rows stand among them, and pads between prompt and text
            answers = generate(backbone, [[*range(first, first + P), *ids] for ids in TEXTS] + TEXTS, options)
            assert answers[len(TEXTS) :] == generate(backbone, TEXTS, options)
            if not settings:
                words = [[*range(30, 30 + P), *ids] for ids in TEXTS]
                assert answers[: len(TEXTS)] == generate(backbone, words, options)
        assert answers[: len(TEXTS)] != answers[len(TEXTS) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_it_generates_alone_as_in_a_batch_and_as_its_own_logits_say(family: str) -> None:
    backbone = backbone_of(family, torch.float32)
    with deep_model(backbone).eval() as deep:
        with torch.no_grad():
            deep.encoder.embedding.weight += torch.randn(deep.encoder.embedding.weight.shape) / 2
        first = deep.use()
        contexts = [[*range(first, first + P), *ids] for ids in TEXTS]
        together = generate(backbone, contexts, GenerationOptions(max_new_tokens=6))
        assert together == [generate(backbone, [ids], GenerationOptions(max_new_tokens=6))[0] for ids in contexts]
        for context, answer in zip(contexts, together, strict=True):
            ids = torch.tensor([[*context, *answer.ids]])
            places = torch.arange(ids.shape[1])[None] >= len(context) - 1
            said = backbone.logits(ids, torch.ones_like(ids), places).argmax(-1)
            assert said.tolist()[: len(answer.ids)] == list(answer.ids)


@pytest.mark.parametrize("family", MASKED)
def test_a_masked_model_reads_it_from_all_places_as_words_that_read_only_each_other(family: str) -> None:
    backbone = backbone_of(family)
    deep = deep_model(backbone)
    ids, mask, labels = behind(deep, text_batch())
    logits = deep(ids, mask, positions=labels != IGNORED)
    embeddings = torch.cat([start(backbone).double().expand(3, -1, -1), input_embedding(backbone.model)(ids[:, P:])], 1)
    sees = mask[:, None, None].bool().repeat(1, 1, ids.shape[1], 1)
    sees[:, :, :P, P:] = False
    arguments = backbone.inputs(ids, mask)
    arguments |= {"attention_mask": torch.zeros(sees.shape).double().masked_fill(~sees, -1e300)}
    del arguments["input_ids"]
    with torch.no_grad():
        expected = backbone.model(inputs_embeds=embeddings, **arguments).logits[labels != IGNORED]
    assert_close(logits, expected, 1e-6)
    loss = deep(ids, mask, labels=labels)
    assert_close(loss, functional.cross_entropy(logits, labels[labels != IGNORED], reduction="sum"), 1e-9)
    loss.backward()
    assert bool((deep.encoder.embedding.weight.grad != 0).all())


def test_padding_moves_nothing() -> None:
    for family in ("gpt2", "bloom", "llama", "bert"):
        deep = deep_model(backbone_of(family))
        batch = text_batch()
        ids, mask, labels = behind(deep, batch)
        together = deep(ids, mask, labels=labels)
        alone = []
        for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
            cut = slice(None, P + length)
            alone.append(deep(ids[row : row + 1, cut], mask[row : row + 1, cut], labels=labels[row : row + 1, cut]))
        assert_close(together, torch.stack(alone).sum(), 1e-9, family)


def peft_and_ours(family: str, hidden: int | None, dtype: torch.dtype) -> tuple[Any, PromptedModel]:
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=P,
        encoder_hidden_size=hidden,
        prefix_projection=hidden is not None,
    )
    torch.manual_seed(5)
    theirs = get_peft_model(tiny_model(family, dtype=dtype), config).to(dtype)
    theirs.base_model.eval()
    backbone = backbone_of(family, dtype)
    _, shape = keys_and_values_of(backbone, start(backbone))
    encoder = DeepEncoder.peft(P, shape, token_dim=theirs.peft_config["default"].token_dim, hidden_size=hidden)
    state = theirs.prompt_encoder["default"].state_dict()
    assert encoder.load_state_dict(state, strict=False).missing_keys == ["scale"]
    return theirs, PromptedModel(backbone, encoder.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("hidden", [None, 12], ids=["plain", "projection"])
@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama", "qwen2", "qwen3", "gemma"])
def test_loss_and_every_gradient_are_those_of_pefts_prefix_tuning(
    family: str, hidden: int | None, dtype: torch.dtype
) -> None:
    theirs, ours = peft_and_ours(family, hidden, dtype)
    batch = text_batch()
    logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = batch["labels"][:, 1:].flatten()
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum")
    ids, mask, labels = behind(ours, batch)
    loss = ours(ids, mask, labels=labels)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    assert_close(loss, expected, tolerance, "loss")
    loss.backward()
    expected.backward()
    their_gradients, our_gradients = gradients(theirs.prompt_encoder["default"]), gradients(ours.encoder)
    assert set(our_gradients) == set(their_gradients)
    assert len(our_gradients) == (1 if hidden is None else 5)
    for name, gradient in their_gradients.items():
        assert gradient.abs().max() > 0, name
        assert_close(our_gradients[name], gradient, tolerance, name)


def test_an_encoder_starts_at_the_given_values_and_a_plain_mlp_does_not() -> None:
    shape = KeyValueShape(layers=2, heads=2, head_width=3)
    initial, values = torch.randn(P, 8), torch.randn(P, shape.row_width) * torch.tensor([1e-3] * 12 + [40.0] * 12)
    for config in ENCODERS:
        encoder = build_deep_encoder(config, shape, initial, values, 3)
        assert torch.equal(encoder(), values)
        assert encoder.scale[0] < 0.01 < 10 < encoder.scale[3]
    plain = EncoderConfig(type="mlp", residual=False)
    one, same, other = (build_deep_encoder(plain, shape, initial, values, seed)() for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, values)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_without_room_for_keys_and_values_is_refused_by_name(family: str) -> None:
    backbone = backbone_of(family, torch.float32)
    name = type(backbone.model).__name__
    with pytest.raises(BackboneError, match=f"{name}, whose attention takes no .* set prompt.deep to false"):
        keys_and_values_of(backbone, start(backbone))


def test_keys_and_values_of_another_shape_are_refused() -> None:
    with pytest.raises(SoftPromptError, match="of 2 layers with 2 heads 8 wide, and this one of 2 layers with 4 heads"):
        check_shape(KeyValueShape(2, 4, 8), backbone_of("llama"))


def test_rows_that_it_cannot_stand_before_are_refused() -> None:
    backbone = backbone_of("llama")
    deep = deep_model(backbone)
    ids, mask, labels = behind(deep, text_batch())
    elsewhere = torch.cat([ids[:, P : P + 1], ids], dim=-1)
    with pytest.raises(BackboneError, match="in front of everything, pads included"):
        deep(elsewhere, functional.pad(mask, (1, 0), value=1), labels=functional.pad(labels, (1, 0), value=IGNORED))
    mixed = ids.clone()
    mixed[1, :P] = 7
    with pytest.raises(BackboneError, match="rows of other prompts in batches of their own"):
        deep(mixed, mask, labels=labels)
    early = labels.clone()
    early[0, P] = ids[0, P]
    with pytest.raises(BackboneError, match="put words between its virtual tokens and the answer"):
        deep(ids, mask, labels=early)
    with pytest.raises(BackboneError, match="put words between"):
        deep(ids, mask)
    context = [*range(deep.first_virtual_id, deep.first_virtual_id + P)]
    with pytest.raises(BackboneError, match="give each context a token of text"):
        generate(backbone, [context])
    with pytest.raises(BackboneError, match="leave the cache on"):
        generate(backbone, [[*context, 9]], use_cache=False)
    backbone.enable_gradient_checkpointing()
    with pytest.raises(BackboneError, match="turn gradient checkpointing off"):
        deep(ids, mask, labels=labels)


def test_attention_that_would_lose_sight_of_it_is_refused() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 8
    deep = deep_model(Backbone(model, tiny_tokenizer(), "mistral"))
    ids, mask, labels = behind(deep, text_batch())
    with pytest.raises(BackboneError, match="reads back 8 tokens, and a row of 14"):
        deep(ids, mask, labels=labels)
    assert deep(ids[:, :8], mask[:, :8], labels=labels[:, :8]).isfinite()
    context = [*range(deep.first_virtual_id, deep.first_virtual_id + P), 9, 10]
    written = generate(deep.backbone, [context], GenerationOptions(max_new_tokens=20))[0]
    assert (len(written.ids), written.finish_reason) == (8 - P - 2, "length")


def test_every_token_of_text_but_the_first_has_a_log_probability() -> None:
    deep = deep_model(backbone_of("gpt2")).eval()
    ids, mask, _ = behind(deep, text_batch())
    found = deep.token_log_probabilities(ids, mask)
    assert torch.equal(found.isnan(), (torch.arange(ids.shape[1]) <= P) | (mask == 0))
