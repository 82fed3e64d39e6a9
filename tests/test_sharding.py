"""Two processes that each hold a part of the frozen layers train the prompt that one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from two_processes import break_off, config_of, finish, make_folder, start

from ptune.config.candidates import SearchConfig
from ptune.config.run import RunConfig
from ptune.errors import ConfigError
from ptune.pretrained.sharding import shard_layers
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.reporting import Reporter
from ptune.training.search import search
from ptune.training.train import train

FIRST, LAST = "[P*4]{text}{answer}", "{text}[P*4]{answer}"
GENERATION = {"type": "generation", "answer_field": "label", "metric": "rouge_l", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    make_folder(folder, "llama", "gpt2", "bloom", "t5", "bert")
    return folder


def sharded(folder: Path, output: Path, *settings: Any, **others: Any) -> RunConfig:
    return config_of(folder, output, *settings, shard_backbone=True, **others)


def alone(folder: Path, output: Path, *settings: Any, **others: Any) -> SoftPrompt:
    """Train as one process does, which takes two batches a step where two processes take one each."""
    forwards = 2 * others.pop("gradient_accumulation_steps", 1)
    return train(config_of(folder, output, *settings, gradient_accumulation_steps=forwards, **others))


@pytest.mark.parametrize(
    ("family", "template", "plan"),
    [
        ("llama", FIRST, "shared prefix"),
        ("llama", LAST, "reference"),
        ("llama", LAST, "frozen context"),
        pytest.param("llama", FIRST, "reference", marks=pytest.mark.slow),
        ("gpt2", FIRST, "shared prefix"),
        pytest.param("gpt2", FIRST, "reference", marks=pytest.mark.slow),
        pytest.param("gpt2", LAST, "frozen context", marks=pytest.mark.slow),
        pytest.param("bloom", FIRST, "shared prefix", marks=pytest.mark.slow),
        pytest.param("bert", FIRST, "reference", marks=pytest.mark.slow),
    ],
)
def test_processes_with_parts_of_the_layers_train_the_prompt_of_one(
    folder: Path, tmp_path: Path, family: str, template: str, plan: str
) -> None:
    # The reference plan calls the head's module; the others take hidden states times its matrix.
    settings = {"family": family, "plan": "reference" if plan == "reference" else "auto"}
    config = sharded(folder, tmp_path / "two", template, **settings)
    first, second = finish(folder, config)
    one, two = alone(folder, tmp_path / "one", template, **settings), SoftPrompt.load(config.output)
    assert two.summary["steps"] == one.summary["steps"]
    torch.testing.assert_close(two.rows, one.rows, rtol=1e-4, atol=1e-5)
    assert plan in first["plans"]
    assert plan in second["plans"]
    assert first["written"]
    assert not second["written"]


def test_each_process_holds_half_of_each_layer(folder: Path, tmp_path: Path) -> None:
    one, two = (each["held"] for each in finish(folder, sharded(folder, tmp_path / "two", FIRST, max_steps=1)))
    layers = [name for name in one if ".layers." in name]
    assert len(layers) == 2 * 9
    for name in layers:
        (own, whole), (rest, _) = one[name], two[name]
        assert own == rest == whole / 2
    others = one.keys() - layers
    assert others == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for name in others:
        own, whole = one[name]
        assert own == whole


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        # A budget of tokens cuts one process's batch in more parts than another's; an epoch's last step has one.
        (FIRST, {"max_tokens_per_batch": 60, "batch_size": 6}),
        (FIRST, {"task": GENERATION, "samples": 2}),
        pytest.param("[P*4]{tokens}", {"task": {"type": "tagging"}}, marks=pytest.mark.slow),
        pytest.param(LAST, {"context_cache": "5kB"}, marks=pytest.mark.slow),
        pytest.param(FIRST, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(FIRST, {"prompt": {"deep": True}}, marks=pytest.mark.slow),
        pytest.param(FIRST, {"family": "t5", "max_steps": 3}, marks=pytest.mark.slow),
    ],
)
def test_processes_with_more_and_with_less_to_do_run_together(
    folder: Path, tmp_path: Path, template: str, settings: dict[str, Any]
) -> None:
    config = sharded(folder, tmp_path / "two", template, **settings)
    finish(folder, config)
    one = alone(folder, tmp_path / "one", template, **settings)
    torch.testing.assert_close(SoftPrompt.load(config.output).rows, one.rows, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_backbone_of_half_precision_is_shared_out(folder: Path, tmp_path: Path) -> None:
    settings = {"dtype": "bfloat16", "plan": "reference"}  # other plans round otherwise, batch by batch
    config = sharded(folder, tmp_path / "two", FIRST, **settings)
    first, _ = finish(folder, config)
    assert first["held"]["lm_head.weight"][1] == 2 * 352 * 32
    one = alone(folder, tmp_path / "one", FIRST, **settings)
    torch.testing.assert_close(SoftPrompt.load(config.output).rows, one.rows, rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_as_it_began_or_without_parts(folder: Path, tmp_path: Path) -> None:
    whole = sharded(folder, tmp_path / "whole", LAST, max_steps=60)
    finish(folder, whole)
    rows = SoftPrompt.load(whole.output).rows
    broken = sharded(folder, tmp_path / "broken", LAST, max_steps=60)
    break_off(folder, broken)
    finish(folder, broken, "resume")
    assert torch.equal(SoftPrompt.load(broken.output).rows, rows)
    replicated = config_of(folder, tmp_path / "other", LAST, max_steps=60)
    break_off(folder, replicated)
    finish(folder, sharded(folder, tmp_path / "other", LAST, max_steps=60), "resume")
    torch.testing.assert_close(SoftPrompt.load(replicated.output).rows, rows, rtol=1e-4, atol=1e-5)


def test_accelerate_launch_starts_the_processes_as_well(folder: Path, tmp_path: Path) -> None:
    config = sharded(folder, tmp_path / "two", LAST, max_steps=2)
    launcher = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launcher += " --mixed_precision no --dynamo_backend no"
    first, second = finish(folder, config, "new", *launcher.split())
    layer = next(name for name in first["held"] if ".layers." in name)
    assert first["held"][layer][0] == second["held"][layer][0] == first["held"][layer][1] / 2


def test_one_process_has_nothing_to_share_out_and_says_so(folder: Path, tmp_path: Path) -> None:
    class Listener(Reporter):
        warnings: tuple[str, ...] = ()

        def warned(self, sentence: str) -> None:
            self.warnings += (sentence,)

    listener = Listener()
    one = train(sharded(folder, tmp_path / "asked", LAST), reporter=listener)
    (notice,) = (warning for warning in listener.warnings if "shard_backbone" in warning)
    assert notice == (
        "training.shard_backbone shares nothing out, for there is one process; start it by torchrun or accelerate "
        "launch"
    )
    assert torch.equal(one.rows, train(config_of(folder, tmp_path / "plain", LAST)).rows)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"name": "mini", "quantization": "int8"}}, "cannot cut quantised weights in parts"),
        ({"training": {"shard_backbone": True, "context_cache_disk": "1GB"}}, "does not go with"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    settings = sharded(folder, tmp_path / "prompt", LAST).model_dump()
    with pytest.raises(ValueError, match=f"training.shard_backbone {sentence}"):
        RunConfig.model_validate(settings | change)


def test_a_model_without_known_layers_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r'does not know the layers of AlbertForMaskedLM, which "some" is; leave it out'
    ):
        shard_layers(tiny_model("albert"), torch.device("cpu"), "some")


def test_a_model_that_is_stored_quantised_is_refused() -> None:
    model = tiny_model("llama")
    model.is_quantized = True  # type: ignore[assignment]  # as transformers marks those that it loads so
    with pytest.raises(ConfigError, match=r'cannot cut the quantised weights of "some" in parts; leave one of'):
        shard_layers(model, torch.device("cpu"), "some")


def test_a_search_has_nothing_to_share_out(folder: Path, tmp_path: Path) -> None:
    candidates = SearchConfig(vary={"training.seed": [0, 1]})
    with pytest.raises(ConfigError, match=r"one process, so training\.shard_backbone shares nothing out; leave it out"):
        search(sharded(folder, tmp_path / "prompt", LAST), candidates)


def test_accelerates_own_sharding_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"accelerate is set up for FSDP, .* set training\.shard_backbone"):
        train(config_of(folder, tmp_path / "prompt", LAST))


@pytest.mark.slow
def test_a_loaded_model_is_not_cut_in_parts(folder: Path, tmp_path: Path) -> None:
    process = start(folder, sharded(folder, tmp_path / "prompt", LAST), "given")
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "training.shard_backbone shares out a model that a run loads itself, and a loaded one was given" in errors
