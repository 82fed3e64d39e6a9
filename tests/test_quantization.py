"""Frozen weights of eight and four bits: what the rounding costs, what still trains, and which backbone it still is."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import nn
from torch.nn import functional

from ptune.config.run import ModelConfig, RunConfig
from ptune.engine.engine import Engine
from ptune.errors import BackboneError, ConfigError, MissingExtraError
from ptune.models.backbone import Backbone
from ptune.pretrained.loading import quantization_settings
from ptune.pretrained.quantization import Int4Weight, quantize
from ptune.training.train import train

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FAMILIES = ("llama", "bloom", "bert", "t5")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    for family in FAMILIES:
        tiny_model(family, scale=0.1).save_pretrained(folder / family)
        tiny_tokenizer(family).save_pretrained(folder / family)
    rows = [{"text": f"soup {n}", "label": "good" if n % 3 else "bad"} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def config_of(place: Path, output: Path, family: str = "llama", **model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": str(place / family), "device": "cpu"} | model,
            "data": {"train": str(place / "train.jsonl"), "dev": str(place / "train.jsonl")},
            "task": {"type": "classification", "verbalizer": {"good": " good", "bad": " bad"}},
            "prompt": {"template": "{text}[P*4]{answer}"},
            "training": {"max_steps": 12, "batch_size": 8, "evaluations": 1, "samples": 0, "learning_rate": 0.02},
            "output": str(output),
        }
    )


def test_four_bits_are_packed_and_unpacked_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (6, 64), generator=generator).to(torch.int8)
    zero = torch.randint(-8, 8, (6, 2), generator=generator).to(torch.int8)
    scale = torch.rand(6, 2, generator=generator)
    weight = Int4Weight(numbers, scale, zero)
    assert weight.packed.numel() == numbers.numel() // 2
    expected = (numbers.view(6, 2, 32).float() - zero[..., None]) * scale[..., None]
    assert torch.equal(weight.dequantize(), expected.view(6, 64))


class TestWithTorchao:
    """What needs the extra."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("torchao")

    @pytest.mark.parametrize("bits", ["int8", "int4"])
    def test_a_product_and_its_gradient_are_those_of_the_rounded_weight(self, bits: Any) -> None:
        model = tiny_model("llama")
        layer: Any = model.model.layers[0].mlp.up_proj
        plain = layer.weight.detach().clone()
        quantize(model.requires_grad_(False), bits, "tiny")
        rounded = layer.forward.args[0].dequantize()
        assert 0 < float((rounded - plain).norm() / plain.norm()) < (0.01 if bits == "int8" else 0.1)
        states = torch.randn(5, 32, dtype=rounded.dtype, requires_grad=True)
        expected = functional.linear(states, rounded)
        (wanted,) = torch.autograd.grad(expected.square().sum(), states)
        (gradient,) = torch.autograd.grad(layer(states).square().sum(), states)
        torch.testing.assert_close(layer(states), expected)
        torch.testing.assert_close(gradient, wanted)

    @pytest.mark.parametrize("bits", ["int8", "int4"])
    def test_no_weight_in_full_is_kept_for_the_backward_pass(self, bits: Any) -> None:
        model = tiny_model("llama").requires_grad_(False)
        quantize(model, bits, "tiny")
        layer: Any = model.model.layers[0].self_attn.q_proj
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(2, 32, requires_grad=True))
        assert sizes == []

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_kind_of_model_learns_through_int8(self, family: str, place: Path, tmp_path: Path) -> None:
        losses = {}
        for bits in (None, "int8"):
            config = config_of(place, tmp_path / str(bits), family, quantization=bits)
            prompt = train(config)
            log = (config.output / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
            losses[bits] = [entry["loss"] for line in log if "loss" in (entry := json.loads(line))]
            assert prompt.rows.dtype is torch.float32
        assert losses["int8"] == pytest.approx(losses[None], rel=0.05)
        assert losses["int8"][0] != losses[None][0]  # the weights are rounded
        assert losses["int8"][-1] < losses["int8"][0]

    def test_it_is_the_backbone_of_the_files_and_a_prompt_fits_both_with_a_note(
        self, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        prompt = train(config_of(place, tmp_path / "prompt", quantization="int8"))
        rounded = Backbone.load(config_of(place, tmp_path, quantization="int8").model)
        plain = Backbone.load(config_of(place, tmp_path).model)
        assert rounded.identity() == plain.identity()
        assert isinstance(rounded.model.get_output_embeddings(), nn.Linear)
        assert rounded.head.plain
        assert prompt.summary["model"]["quantization"] == "int8"
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ptune"):
            Engine(rounded).add("same", prompt)
            assert caplog.messages == []
            with Engine(plain) as engine:
                engine.add("other", prompt)
                assert engine.classify("other", ["soup 1"])[0]["label"] in ("good", "bad")
        assert caplog.messages == [
            "the soft prompt was trained on weights of int8 and is used on weights in full, where it may score "
            "otherwise; ptune eval says how"
        ]

    def test_a_model_without_linear_layers_is_refused(self) -> None:
        with pytest.raises(
            BackboneError, match=r'^"mine" has no linear layers that model.quantization int8 could round'
        ):
            quantize(tiny_model("gpt2"), "int8", "mine")

    def test_contexts_are_not_kept_on_disk(self, place: Path, tmp_path: Path) -> None:
        config = config_of(place, tmp_path / "prompt", quantization="int4")
        training = config.training.model_copy(update={"context_cache_disk": "1GB"})
        with pytest.raises(ConfigError, match="context_cache_disk does not go with a quantised model"):
            train(config.model_copy(update={"training": training}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without CUDA")
def test_bitsandbytes_without_cuda_is_refused(place: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(BackboneError) as error:
        Backbone.load(ModelConfig(name=str(place / "llama"), device="cpu", quantization=settings))
    assert str(error.value) == (
        'model.quantization: bitsandbytes runs on CUDA, and the device here is "cpu"; on a processor choose int8 or '
        "int4, which torchao rounds"
    )


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingExtraError, match=r"needs torchao: pip install ptune\[quantization\]"):
        quantize(tiny_model("llama"), "int8", "tiny")


def test_on_cuda_the_words_stand_for_bitsandbytes() -> None:
    eight, four = (quantization_settings(bits, CUDA) for bits in ("int8", "int4"))
    assert eight == {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert four is not None
    assert four["load_in_4bit"]
    assert quantization_settings(None, CPU) is None


def test_another_device_is_refused() -> None:
    with pytest.raises(
        BackboneError, match=r'^model.quantization int8 runs on a processor .* here is "mps"; set model'
    ):
        quantization_settings("int8", torch.device("mps"))
