"""The backbone: loading, what it refuses and how it says so, its fingerprint, logits at chosen positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, GPT2LMHeadModel, PreTrainedTokenizerFast

from ptune.config.run import ModelConfig
from ptune.errors import BackboneError
from ptune.models.backbone import Backbone
from ptune.pretrained.losses import next_token_labels
from ptune.rendering.batch import IGNORED

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def save(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    tiny_model(family, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tokenizer_without_pad() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_from_its_folder(family: str, tmp_path: Path) -> None:
    backbone = Backbone.load(str(save(tmp_path, family)))
    assert (backbone.vocabulary_size, backbone.hidden_size) == (VOCABULARY, 32)
    assert backbone.context_limit == (None if family == "bloom" else 256)
    assert backbone.name == str(tmp_path)
    assert len(backbone.tokenizer) <= VOCABULARY
    expected = tiny_model(family)(IDS[:1]).logits
    assert torch.allclose(backbone.logits(IDS[:1], MASK[:1]), expected, rtol=1e-5, atol=1e-5)


def test_parameters_are_frozen_and_dropout_stays_off_whatever_calls_train(tmp_path: Path) -> None:
    backbone = Backbone.load(str(save(tmp_path, "gpt2")))  # GPT-2 has dropout 0.1 everywhere
    assert not any(p.requires_grad for p in backbone.model.parameters())
    expected = backbone.logits(IDS, MASK)
    backbone.model.train()
    assert torch.equal(backbone.logits(IDS, MASK), expected)
    assert not any(module.training for module in backbone.model.modules())


@pytest.mark.parametrize(("asked", "found"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_narrow_model_is_float32_unless_asked(asked: str, found: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    backbone = Backbone.load(ModelConfig(name=str(tmp_path), dtype=asked, device="cpu"))  # type: ignore[arg-type]
    assert backbone.dtype == found


def test_quantization_settings_that_no_method_knows_are_refused(tmp_path: Path) -> None:
    config = ModelConfig(name=str(save(tmp_path)), device="cpu", quantization={"quant_method": "thin air"})
    with pytest.raises(BackboneError, match=f'cannot load "{tmp_path}" as a language model: .*thin air'):
        Backbone.load(config)


def a_file(folder: Path) -> Path:
    (folder / "model.bin").write_text("not a folder")
    return folder / "model.bin"


def a_folder_without_config(folder: Path) -> Path:
    (folder / "model.safetensors").write_text("")
    return folder


def a_misspelt_folder(folder: Path) -> Path:
    save(folder / "bloom-560m")
    return folder / "bloom-56om"


def a_missing_folder(folder: Path) -> Path:
    return folder / "nowhere" / "model"


FOLDERS: list[tuple[Callable[[Path], Path], str]] = [
    (a_file, '"{path}" is a file; the model is given as its folder'),
    (a_folder_without_config, '"{path}" is no model folder: it has no config.json'),
    (a_misspelt_folder, 'there is no model folder "{path}"; check the path. Did you mean "bloom-560m"?'),
    (a_missing_folder, 'there is no model folder "{path}", for there is no folder {path.parent}; check the path.'),
]


@pytest.mark.parametrize(("make", "text"), FOLDERS, ids=[make.__name__ for make, _ in FOLDERS])
def test_what_is_no_model_folder_is_said_at_once(make: Callable[[Path], Path], text: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(BackboneError) as error:
        Backbone.load(str(path))
    assert str(error.value) == text.format(path=path)


def test_a_bare_name_without_the_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BackboneError) as error:
        Backbone.load("bloom-of-nobody")
    assert str(error.value) == (
        '"bloom-of-nobody" is neither "mini" nor a model folder here, and the Hub is off (HF_HUB_OFFLINE=1)'
    )


def test_a_damaged_folder_is_named_with_the_reason(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "martian"}))
    with pytest.raises(BackboneError, match=f'^cannot load "{tmp_path}" as a language model: .*martian'):
        Backbone.load(str(tmp_path))


def test_truncated_weights_are_named_with_the_reason(tmp_path: Path) -> None:
    weights = save(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BackboneError, match=f'^cannot load "{tmp_path}" as a language model: '):
        Backbone.load(str(tmp_path))


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BackboneError) as error:
        Backbone(tiny_model("llama"), tokenizer, "tiny")
    assert str(error.value) == (
        'the tokenizer of "tiny" has no end token, so answers would never stop; '
        "set eos_token in its tokenizer_config.json"
    )


def test_a_tokenizer_longer_than_the_matrix_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(100)])
    with pytest.raises(BackboneError) as error:
        Backbone(tiny_model("llama"), tokenizer, "tiny")
    assert str(error.value) == (
        f'the tokenizer of "tiny" has {len(tokenizer)} tokens and the model\'s input matrix only 352 rows; '
        "resize the model's embeddings or take the tokenizer that belongs to it"
    )


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_token() -> None:
    tokenizer = tokenizer_without_pad()
    assert Backbone(tiny_model("llama"), tokenizer, "tiny").tokenizer.pad_token_id == tokenizer.eos_token_id


def test_what_needs_the_tokenizer_says_that_none_was_given() -> None:
    with pytest.raises(BackboneError) as error:
        _ = Backbone(tiny_model("llama"), None, "tiny").tokenizer
    assert str(error.value) == '"tiny" was given without its tokenizer, which is needed here; give both'


class ReadsIdsElsewhere(GPT2LMHeadModel):
    """A family with a second embedding of the ids, beside the input matrix."""

    def forward(self, input_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            output.logits = output.logits + (input_ids % 7).unsqueeze(-1)
        return output


class DetachesItsInput(GPT2LMHeadModel):
    """A family through whose input embedding no gradient goes."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):  # type: ignore[no-untyped-def]
        if inputs_embeds is None:
            inputs_embeds = self.transformer.wte(input_ids)
        embeddings = inputs_embeds.detach() + 0 * inputs_embeds
        return super().forward(inputs_embeds=embeddings, **kwargs)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (ReadsIdsElsewhere, "it reads ids elsewhere than in its input embedding"),
        (DetachesItsInput, "no gradient reaches its input embedding"),
    ],
)
def test_a_family_that_fails_the_self_test_is_refused_by_name(family: type[GPT2LMHeadModel], reason: str) -> None:
    plain = tiny_model("gpt2")
    model = family(plain.config)
    model.load_state_dict(plain.state_dict())
    with pytest.raises(BackboneError) as error:
        Backbone(model, tiny_tokenizer(), "tiny")
    assert str(error.value) == f"{family.__name__} cannot carry virtual tokens: {reason}"
    assert "forward" not in model.get_input_embeddings().__dict__


def test_a_family_with_embeddings_per_layer_is_refused_by_name() -> None:
    config = Gemma3nTextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=[48, 48],
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        laurel_rank=4,
        layer_types=["full_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BackboneError, match="^Gemma3nForCausalLM cannot carry virtual tokens: "):
        Backbone(model, tiny_tokenizer(), "tiny")
    assert "forward" not in model.get_input_embeddings().__dict__


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_is_the_same_for_every_load_dtype_and_other_for_other_weights(family: str, tmp_path: Path) -> None:
    save(tmp_path, family)
    float32, *others = (
        Backbone.load(ModelConfig(name=str(tmp_path), dtype=dtype, device="cpu"))  # type: ignore[arg-type]
        for dtype in ("float32", "bfloat16", "float16")
    )
    stored = json.loads(json.dumps(float32.fingerprint()))
    assert all(backbone.matches(stored) for backbone in (float32, *others))
    assert others[0].fingerprint() == float32.fingerprint()
    assert others[0].identity() == float32.identity()
    other = Backbone(tiny_model(family, seed=1), tiny_tokenizer(), "other")
    assert not other.matches(stored)
    assert other.identity() != float32.identity()
    assert len(json.dumps(stored)) < 4000


def test_fingerprint_of_another_family_or_of_nothing_does_not_match() -> None:
    backbone = Backbone(tiny_model("llama"), None, "tiny")
    assert not backbone.matches(Backbone(tiny_model("mistral"), None, "tiny").fingerprint())
    assert not backbone.matches({})


def test_embeddings_are_what_the_module_gives_after_its_own_scaling() -> None:
    for family in ("llama", "gemma"):
        model = tiny_model(family)
        found = Backbone(model, None, "tiny").embeddings(torch.tensor([4, 9]))
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert torch.equal(found, model.get_input_embeddings()(torch.tensor([4, 9])))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_positions_are_those_of_all_positions(family: str) -> None:
    backbone = Backbone(tiny_model(family), None, "tiny")
    every = backbone(IDS, MASK)
    positions = torch.tensor([[False, True, False, True], [True, False, False, False]])
    assert every.shape == (2, 4, VOCABULARY)
    assert torch.allclose(backbone(IDS, MASK, positions=positions), every[positions], rtol=1e-5, atol=1e-5)
    assert torch.equal(backbone(IDS, MASK), every)  # the head sees everything again


def test_loss_is_the_sum_over_supervised_tokens() -> None:
    backbone = Backbone(tiny_model("bloom"), None, "tiny")
    labels = IDS.where(torch.tensor([[False, False, True, True], [True, True, False, False]]), IGNORED)
    log_probabilities = torch.log_softmax(backbone(IDS, MASK), -1)
    expected = -(log_probabilities[0, 1, 7] + log_probabilities[0, 2, 8] + log_probabilities[1, 0, 10])
    assert torch.allclose(backbone(IDS, MASK, labels=labels), expected, rtol=1e-5)


def test_loss_of_a_batch_without_supervised_tokens_is_zero() -> None:
    backbone = Backbone(tiny_model("gpt2"), None, "tiny")
    assert float(backbone(IDS, MASK, labels=torch.full_like(IDS, IGNORED))) == 0.0


def test_next_token_labels_shift_by_one() -> None:
    assert next_token_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, IGNORED]]


def test_a_family_that_cannot_recompute_says_so() -> None:
    backbone = Backbone(tiny_model("gpt2"), None, "tiny")
    backbone.model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(BackboneError) as error:
        backbone.enable_gradient_checkpointing()
    assert str(error.value) == ("GPT2LMHeadModel has no layers that can be recomputed; turn gradient checkpointing off")
