"""The prompt encoder: exact starts, every setting honoured, PEFT's weights as they are, gradients, determinism."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from ptune.config.run import EncoderConfig
from ptune.errors import ConfigError
from ptune.prompts.encoder import PromptEncoder, build_encoder, count_parameters

P, H = 5, 8

EMBEDDING = EncoderConfig(type="embedding")
MLP = EncoderConfig(type="mlp", residual=False)
LSTM = EncoderConfig(type="lstm", residual=False)
RESIDUAL_MLP = EncoderConfig(type="mlp")
RESIDUAL_LSTM = EncoderConfig(type="lstm")
EVERY_KIND = pytest.mark.parametrize(
    "config",
    [EMBEDDING, MLP, LSTM, RESIDUAL_MLP, RESIDUAL_LSTM],
    ids=["embedding", "mlp", "lstm", "residual mlp", "residual lstm"],
)
HEADS = pytest.mark.parametrize("kind", ["mlp", "lstm"])
RESIDUAL = pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])


def rows(scale: float = 0.02, seed: int = 7, shape: tuple[int, int] = (P, H)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def away_from_the_start(encoder: PromptEncoder) -> PromptEncoder:
    """Move every weight a little, so that a residual encoder's zero layer hides nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return encoder


def train(encoder: PromptEncoder, target: Tensor, steps: int = 20) -> Tensor:
    """Take Adam steps towards ``target``, its error measured in units of the target as a backbone's first norm does."""
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        ((encoder() - target) / target.square().mean().sqrt()).square().sum().backward()
        optimizer.step()
    return encoder().detach()


@EVERY_KIND
def test_output_is_one_float32_row_for_each_virtual_token(config: EncoderConfig) -> None:
    output = build_encoder(config, rows(), seed=0)()
    assert output.shape == (P, H)
    assert output.dtype == torch.float32
    assert output.requires_grad


@pytest.mark.parametrize("config", [EMBEDDING, RESIDUAL_MLP, RESIDUAL_LSTM], ids=["embedding", "mlp", "lstm"])
@settings(max_examples=25, deadline=None)
@given(exponent=st.floats(-30, 30), seed=st.integers(0, 1000))
def test_start_is_the_initial_rows_bit_for_bit(config: EncoderConfig, exponent: float, seed: int) -> None:
    initial = rows(2.0**exponent, seed)
    encoder = build_encoder(config, initial, seed)
    assert torch.equal(encoder.train()(), initial)
    assert torch.equal(encoder.eval()(), initial)


def test_initial_rows_of_zeros_and_of_half_precision_start_exactly_too() -> None:
    zeros = torch.zeros(P, H)
    assert torch.equal(build_encoder(RESIDUAL_MLP, zeros, 0)(), zeros)
    for dtype in (torch.float16, torch.bfloat16):
        initial = rows().to(dtype)
        assert torch.equal(build_encoder(RESIDUAL_MLP, initial, 0)(), initial.float())


def test_an_encoder_without_scale_copies_its_initial_rows_too() -> None:
    initial = rows()
    train(PromptEncoder(MLP, initial), rows(seed=8), steps=3)
    assert torch.equal(initial, rows())


def test_papers_form_does_not_start_from_the_initial_rows_but_depends_on_them() -> None:
    for config in (MLP, LSTM):
        initial = rows()
        output = build_encoder(config, initial, 0)()
        assert not torch.allclose(output, initial, atol=1e-3)
        assert not torch.equal(output, build_encoder(config, initial.flip(0), 0)())


@EVERY_KIND
def test_initial_rows_are_copied_and_trained(config: EncoderConfig) -> None:
    initial = rows()
    kept = initial.clone()
    encoder = build_encoder(config, initial, 0)
    before = encoder.embedding.weight.detach().clone()
    train(encoder, rows(seed=8), steps=3)
    assert torch.equal(initial, kept)
    assert not torch.equal(encoder.embedding.weight, before)


@settings(max_examples=25, deadline=None)
@given(exponent=st.floats(-20, 20))
def test_scale_is_a_power_of_two_that_brings_the_stored_rows_near_one(exponent: float) -> None:
    encoder = build_encoder(EMBEDDING, rows(2.0**exponent), 0)
    assert encoder.scale is not None
    assert math.frexp(encoder.scale.item())[0] == 0.5
    rms = encoder.embedding.weight.detach().square().mean().sqrt().item()
    assert 2**-0.51 <= rms <= 2**0.51


@EVERY_KIND
def test_training_goes_the_same_way_at_every_scale_of_the_embeddings(config: EncoderConfig) -> None:
    factor = 2.0**-6
    large = train(build_encoder(config, rows(1.0), 0), rows(1.0, seed=8))
    small = train(build_encoder(config, rows(1.0) * factor, 0), rows(1.0, seed=8) * factor)
    assert not torch.allclose(large, rows(1.0), atol=0.05)  # it did move
    assert torch.allclose(small, large * factor, rtol=1e-4, atol=1e-6 * factor)


@pytest.mark.parametrize("config", [RESIDUAL_MLP, RESIDUAL_LSTM], ids=["mlp", "lstm"])
def test_gradient_reaches_last_layer_and_rows_of_a_residual_encoder_at_the_first_step(config: EncoderConfig) -> None:
    encoder = build_encoder(config, rows(), 0)
    (encoder() * rows(seed=8)).sum().backward()
    assert encoder.mlp_head is not None
    last = encoder.mlp_head[-1]
    for parameter in (last.weight, last.bias, encoder.embedding.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@EVERY_KIND
def test_gradients_are_right_in_float64(config: EncoderConfig) -> None:
    small = config.model_copy(update={"hidden_size": 3} if config.type != "embedding" else {})
    encoder = away_from_the_start(build_encoder(small, rows(0.5, shape=(2, 4)), 0).double())
    names = [name for name, _ in encoder.named_parameters()]

    def output(*parameters: Tensor) -> Tensor:
        return functional_call(encoder, dict(zip(names, parameters, strict=True)), ())

    assert encoder().dtype == torch.float64
    assert torch.autograd.gradcheck(output, tuple(encoder.parameters()))


@EVERY_KIND
def test_double_takes_parameters_and_scale_along(config: EncoderConfig) -> None:
    encoder = build_encoder(config, rows(), 0).double()
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float64}
    assert encoder().dtype == torch.float64


@EVERY_KIND
def test_everything_is_float32_whatever_torchs_default(config: EncoderConfig) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        encoder = build_encoder(config, rows(), 0)
        assert PromptEncoder.peft("lstm", P, H, 4)().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
    assert encoder().dtype == torch.float32


@HEADS
@RESIDUAL
@pytest.mark.parametrize(("setting", "value"), [("hidden_size", 6), ("num_layers", 3), ("num_layers", 1)])
def test_shape_settings_change_module_and_output(kind: str, residual: bool, setting: str, value: int) -> None:
    plain = EncoderConfig(type=kind, residual=residual)
    changed = EncoderConfig(type=kind, residual=residual, **{setting: value})
    one, other = (away_from_the_start(build_encoder(config, rows(), 0)) for config in (plain, changed))
    assert count_parameters(one) != count_parameters(other)
    assert not torch.equal(one(), other())


@HEADS
@RESIDUAL
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_dropout_acts_in_training_and_never_in_evaluation(kind: str, residual: bool, num_layers: int) -> None:
    config = EncoderConfig(type=kind, residual=residual, num_layers=num_layers, dropout=0.5, hidden_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it ignores an LSTM's dropout
        encoder = away_from_the_start(build_encoder(config, rows(), 0))
    in_training = [encoder.train()().detach() for _ in range(2)]
    in_evaluation = [encoder.eval()().detach() for _ in range(2)]
    assert not torch.equal(*in_training)
    assert torch.equal(*in_evaluation)
    assert not torch.equal(in_training[0], in_evaluation[0])


@HEADS
def test_without_dropout_training_and_evaluation_agree_to_the_bit(kind: str) -> None:
    encoder = away_from_the_start(build_encoder(EncoderConfig(type=kind), rows(), 0))
    assert torch.equal(encoder.train()(), encoder.eval()())


@HEADS
def test_dropout_changes_no_weight_and_no_name(kind: str) -> None:
    plain, dropped = (build_encoder(EncoderConfig(type=kind, dropout=p), rows(), 0).state_dict() for p in (0.0, 0.3))
    assert list(plain) == list(dropped)
    assert all(torch.equal(plain[name], dropped[name]) for name in plain)


def test_residual_setting_changes_the_output_of_the_same_weights() -> None:
    for residual, plain in ((RESIDUAL_MLP, MLP), (RESIDUAL_LSTM, LSTM)):
        one, other = build_encoder(residual, rows(), 0), build_encoder(plain, rows(), 0)
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(), rows())
        assert torch.equal(other(), torch.zeros(P, H))


def test_five_layers_of_1024_are_five_hidden_layers_with_dropout_in_each() -> None:
    config = EncoderConfig(type="mlp", num_layers=5, dropout=0.1, hidden_size=1024)
    encoder = build_encoder(config, rows(), 0)
    linear = [module for module in encoder.modules() if isinstance(module, torch.nn.Linear)]
    dropout = [module for module in encoder.mlp_head.modules() if isinstance(module, torch.nn.Dropout)]
    assert [layer.out_features for layer in linear] == [1024] * 5 + [H]
    assert [layer.p for layer in dropout] == [0.1] * 5


def test_hidden_size_is_the_width_where_none_is_given() -> None:
    assert build_encoder(MLP, rows(), 0).mlp_head[0].out_features == H
    assert build_encoder(LSTM, rows(), 0).lstm_head.hidden_size == H


@EVERY_KIND
def test_same_seed_gives_the_same_weights_and_global_state_is_untouched(config: EncoderConfig) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one = build_encoder(config, rows(), seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    again = build_encoder(config, rows(), seed=5).state_dict()
    other = build_encoder(config, rows(), seed=6).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    if config.type != "embedding":
        assert not torch.equal(one["mlp_head.0.weight"], other["mlp_head.0.weight"])


@EVERY_KIND
def test_state_restores_the_output_whatever_rows_the_encoder_was_built_from(config: EncoderConfig) -> None:
    trained = away_from_the_start(build_encoder(config, rows(3.0), 0))
    restored = build_encoder(config, torch.zeros(P, H), seed=9)
    restored.load_state_dict(trained.state_dict())
    assert torch.equal(restored(), trained())


def test_count_parameters_counts_what_is_trained() -> None:
    encoder = build_encoder(EncoderConfig(type="mlp", hidden_size=6), rows(), 0)
    assert count_parameters(encoder) == P * H + (H * 6 + 6) + (6 * 6 + 6) + (6 * H + H)
    encoder.embedding.requires_grad_(False)
    assert count_parameters(encoder) == (H * 6 + 6) + (6 * 6 + 6) + (6 * H + H)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (5, 0), (1, 5, 8)])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_encoder(MLP, torch.zeros(shape), 0)
    assert str(caught.value) == (
        f"a prompt encoder starts from rows of shape [P, H], both at least 1, and found {list(shape)}; "
        "give one row of the backbone's width for each virtual token"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(value: float) -> None:
    initial = rows()
    initial[2, 3] = value
    with pytest.raises(ConfigError) as caught:
        build_encoder(MLP, initial, 0)
    assert str(caught.value) == (
        "a prompt encoder starts from finite rows, and found one with a value that is infinite or not a number; "
        "check the embeddings or the soft prompt that they come from"
    )


def peft_encoder(kind: str, **settings: Any) -> torch.nn.Module:
    pytest.importorskip("peft")
    from peft import PromptEncoderConfig
    from peft.tuners.p_tuning.model import PromptEncoder as PeftPromptEncoder

    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        token_dim=H,
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind.upper(),
        **settings,
    )
    return PeftPromptEncoder(config)


@pytest.mark.parametrize(("kind", "num_layers"), [("mlp", 2), ("lstm", 1), ("lstm", 2), ("lstm", 3)])
def test_pefts_weights_load_as_they_are_and_give_its_output_to_the_bit(kind: str, num_layers: int) -> None:
    theirs = peft_encoder(kind, encoder_hidden_size=6, encoder_num_layers=num_layers)
    ours = PromptEncoder.peft(kind, P, H, 6, num_layers)
    assert not torch.equal(ours(), theirs(torch.arange(P)))
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(), theirs(torch.arange(P)))


@HEADS
def test_pefts_gradients_are_ours_to_the_bit(kind: str) -> None:
    theirs = peft_encoder(kind, encoder_hidden_size=6)
    ours = PromptEncoder.peft(kind, P, H, 6)
    ours.load_state_dict(theirs.state_dict())
    direction = rows(seed=8)
    (ours() * direction).sum().backward()
    (theirs(torch.arange(P)) * direction).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in ours.named_parameters())


@HEADS
def test_same_global_seed_starts_as_peft_does(kind: str) -> None:
    torch.manual_seed(4)
    theirs = peft_encoder(kind, encoder_hidden_size=6)
    torch.manual_seed(4)
    ours = PromptEncoder.peft(kind, P, H, 6)
    assert torch.equal(ours(), theirs(torch.arange(P)))


def test_pefts_lstm_drops_between_layers_as_ours_does() -> None:
    theirs = peft_encoder("lstm", encoder_hidden_size=6, encoder_dropout=0.4)
    ours = PromptEncoder.peft("lstm", P, H, 6, dropout=0.4)
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(2)
    output = ours.train()()
    torch.manual_seed(2)
    assert torch.equal(output, theirs.train()(torch.arange(P)))
    assert not torch.equal(output, ours.eval()())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "embedding"},
            'PEFT\'s encoder is "mlp" or "lstm", and kind is "embedding"; choose one of the two',
        ),
        (
            {"kind": "mlp", "num_layers": 5, "dropout": 0.1},
            "PEFT's mlp has 2 hidden layers and no dropout, and num_layers is 5 and dropout 0.1; "
            "leave them out, or use build_encoder, which honours them",
        ),
        (
            {"kind": "lstm", "num_layers": 1, "dropout": 0.1},
            "PEFT's lstm has dropout between its layers only, and num_layers is 1 and dropout 0.1; "
            "leave dropout out, or use build_encoder, which honours it",
        ),
    ],
)
def test_what_peft_has_not_or_ignores_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PromptEncoder.peft(num_virtual_tokens=P, token_dim=H, hidden_size=6, **arguments)
    assert str(caught.value) == message
