"""PEFT reads what ptune writes and ptune what PEFT writes, and both give the same logits.

Logits are compared in float32 to 1e-5 of the greatest: PEFT concatenates embeddings and gives no position ids, ptune
runs ids and takes positions from the mask. So rows are not padded, or padded on the right.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.task import ClassificationConfig, GenerationConfig
from ptune.errors import SoftPromptError
from ptune.models.backbone import Backbone
from ptune.soft_prompts.peft_format import read_peft_adapter, write_peft_adapter
from ptune.soft_prompts.soft_prompt import SoftPrompt, import_peft

FAMILIES = ["gpt2", "bloom", "llama", "qwen2", "gemma"]
IDS = torch.tensor([[5, 17, 300, 42, 42, 7]])
COUNT = 4
TASK = GenerationConfig()
KINDS: dict[str, dict[str, Any]] = {
    "P_TUNING by MLP": {"config": PromptEncoderConfig, "encoder_hidden_size": 16},
    "P_TUNING by LSTM": {
        "config": PromptEncoderConfig,
        "encoder_hidden_size": 16,
        "encoder_reparameterization_type": "LSTM",
    },
    "PROMPT_TUNING": {"config": PromptTuningConfig},
}


def backbone_of(family: str) -> Backbone:
    return Backbone(tiny_model(family), tiny_tokenizer(), family)


def ptune_logits(backbone: Backbone, rows: torch.Tensor) -> torch.Tensor:
    tokens = backbone.attach()
    try:
        first = tokens.allocate(len(rows))
        tokens.set_rows(first, rows)
        ids = torch.cat([torch.arange(first, first + len(rows))[None], IDS], dim=1)
        with torch.no_grad():
            return backbone.logits(ids, torch.ones_like(ids))
    finally:
        tokens.release(first)
        tokens.detach()


def peft_logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def adapter_of_peft(folder: Path, family: str = "gpt2", kind: str = "P_TUNING by MLP", **changes: Any) -> PeftModel:
    arguments = {"task_type": "CAUSAL_LM", "num_virtual_tokens": COUNT} | KINDS[kind] | changes
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(family), arguments.pop("config")(**arguments))
    model.save_pretrained(folder)
    return model


# From ptune to PEFT


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_same_logits_for_what_ptune_saved(tmp_path: Path, family: str) -> None:
    backbone = backbone_of(family)
    rows = torch.randn(COUNT, backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    prompt = SoftPrompt(
        rows=rows,
        template="[P*4]{text}{answer}",
        task=TASK,
        overlong="cut",
        backbone_name=family,
        fingerprint=backbone.fingerprint(),
    )
    prompt.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing keys or of settings unknown to PEFT, for instance
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        model = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert model.peft_config["default"].inference_mode
    expected = ptune_logits(backbone, prompt.rows)
    assert_close(peft_logits(model), expected)
    without = tiny_model(family)(input_ids=IDS).logits
    assert (expected[:, COUNT:] - without).abs().max() > 1e-2 * without.abs().max()  # the rows do something


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_changes_nothing_in_peft(tmp_path: Path, family: str) -> None:
    backbone = backbone_of(family)
    rows = torch.randn(COUNT, backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    write_peft_adapter(tmp_path, rows, base_model=None, num_layers=2, num_attention_heads=4)
    model = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    ids = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(1, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        padded = model(input_ids=ids.expand(2, -1), attention_mask=mask.expand(2, -1)).logits[:, :-3]
    assert_close(padded, ptune_logits(backbone, rows).expand(2, -1, -1))


def test_the_config_has_every_field_that_peft_knows(tmp_path: Path) -> None:
    write_peft_adapter(tmp_path, torch.zeros(4, 32), base_model="some/model", num_layers=2, num_attention_heads=4)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = PromptEncoderConfig.from_pretrained(tmp_path).to_dict()
    assert set(loaded) - set(written) == {"peft_version"}
    assert {name: loaded[name] for name in written} == written
    assert written["peft_type"] == "P_TUNING"
    assert written["base_model_name_or_path"] == "some/model"


def test_the_tensor_is_the_one_that_peft_saves(tmp_path: Path) -> None:
    adapter_of_peft(tmp_path / "peft")
    rows, _ = read_peft_adapter(tmp_path / "peft")
    write_peft_adapter(tmp_path / "ptune", rows, base_model=None, num_layers=None, num_attention_heads=None)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ptune", "peft"))
    assert ours.keys() == theirs.keys() == {"prompt_embeddings"}
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])


def test_peft_asks_the_model_for_what_ptune_does_not_know(tmp_path: Path) -> None:
    write_peft_adapter(tmp_path, torch.zeros(4, 32), base_model=None, num_layers=None, num_attention_heads=None)
    config = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).peft_config["default"]
    assert (config.num_layers, config.num_attention_heads) == (2, 4)


def test_what_ptune_wrote_for_peft_it_reads_itself(tmp_path: Path) -> None:
    rows = torch.randn(4, 32)
    write_peft_adapter(tmp_path, rows.to(torch.bfloat16), base_model=None, num_layers=2, num_attention_heads=4)
    read, config = read_peft_adapter(tmp_path)
    assert torch.equal(read, rows.to(torch.bfloat16).float())
    assert config["num_virtual_tokens"] == 4


# From PEFT to ptune


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_adapter_gives_pefts_logits(tmp_path: Path, family: str, kind: str) -> None:
    model = adapter_of_peft(tmp_path / "adapter", family, kind)
    backbone = backbone_of(family)
    prompt = import_peft(tmp_path / "adapter", backbone=backbone, template="[P*4]{text}{answer}", task=TASK)
    assert_close(ptune_logits(backbone, prompt.rows), peft_logits(model))
    prompt.save(tmp_path / "prompt")
    loaded = SoftPrompt.load(tmp_path / "prompt")
    loaded.check(backbone)
    assert torch.equal(loaded.rows, prompt.rows)


def test_an_import_says_where_it_comes_from_and_has_no_encoder(tmp_path: Path) -> None:
    adapter_of_peft(tmp_path, kind="PROMPT_TUNING")
    backbone = backbone_of("gpt2")
    prompt = import_peft(tmp_path, backbone=backbone, template="{text}[P*4]{answer}", task=TASK, max_length=9)
    assert prompt.encoder is None
    assert prompt.max_length == 9
    assert prompt.overlong == "cut"
    assert prompt.summary["imported"]["peft_type"] == "PROMPT_TUNING"
    classes = ClassificationConfig(verbalizer={"a": " great", "b": " bad"})
    assert import_peft(tmp_path, backbone=backbone, template="[P*4]{answer}", task=classes).overlong == "error"


def test_a_checkpoint_of_training_holds_what_its_encoder_gives_at_that_moment(tmp_path: Path) -> None:
    model = adapter_of_peft(tmp_path / "start")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not model.peft_config["default"].inference_mode
    model.save_pretrained(tmp_path / "checkpoint-1")
    config = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    assert config["inference_mode"]  # PEFT writes so for every save; the tensor is folded either way
    (tmp_path / "checkpoint-1" / "adapter_config.json").write_text(json.dumps(config | {"inference_mode": False}))
    rows, _ = read_peft_adapter(tmp_path / "checkpoint-1")
    assert not torch.equal(rows, read_peft_adapter(tmp_path / "start")[0])
    assert_close(ptune_logits(backbone_of("gpt2"), rows), peft_logits(model))


# What cannot be imported


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True), "LORA"),
        (
            MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2),
            "MULTITASK_PROMPT_TUNING",
        ),
    ],
)
def test_an_adapter_of_another_type_is_refused_by_its_type(tmp_path: Path, config: Any, kind: str) -> None:
    get_peft_model(tiny_model("gpt2"), config).save_pretrained(tmp_path)
    with pytest.raises(SoftPromptError) as caught:
        read_peft_adapter(tmp_path)
    assert str(caught.value) == (
        f'"{tmp_path}" is an adapter of type {kind}, and only virtual tokens can be imported: '
        "P_TUNING, PROMPT_TUNING or PREFIX_TUNING"
    )


def test_an_adapter_stored_by_pickle_alone_is_refused_with_the_mend(tmp_path: Path) -> None:
    model = adapter_of_peft(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)
    read_peft_adapter(tmp_path)  # both stand there
    (tmp_path / "adapter_model.safetensors").unlink()
    assert (tmp_path / "adapter_model.bin").is_file()
    with pytest.raises(SoftPromptError) as caught:
        read_peft_adapter(tmp_path)
    assert str(caught.value) == (
        f'"{tmp_path}" holds its tensors as adapter_model.bin only, and ptune never unpickles; load it in PEFT and '
        "save it again, model.save_pretrained(folder), which writes adapter_model.safetensors"
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: torch.Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | changes, path)


DAMAGES: dict[str, tuple[Any, str]] = {
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        r'"\S+" is no PEFT adapter: it has no adapter_config\.json; name the folder that PEFT saved to$',
    ),
    "broken config": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        r"adapter_config\.json, line 1, column 2: broken JSON",
    ),
    "another JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        r'adapter_config\.json" expected a JSON object and holds list; copy it again$',
    ),
    "no type": (lambda folder: edit_config(folder, peft_type=None), "is an adapter of type None, and only"),
    "another task type": (
        lambda folder: edit_config(folder, task_type="SEQ_CLS"),
        "is an adapter for task_type SEQ_CLS, which trains a head .*import one of task_type CAUSAL_LM or SEQ_2_SEQ_LM$",
    ),
    "encoder and decoder": (
        lambda folder: edit_config(folder, num_transformer_submodules=2, task_type="SEQ_2_SEQ_LM"),
        "has virtual tokens in the decoder as well, .* train it with num_transformer_submodules=1$",
    ),
    "no tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"adapter_model\.safetensors does not exist",
    ),
    "cut tensors": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20),
        r"adapter_model\.safetensors is damaged or not a safetensors file",
    ),
    "the encoder itself": (
        lambda folder: save_file(
            {"prompt_encoder.default.embedding.weight": torch.zeros(4, 32)}, folder / "adapter_model.safetensors"
        ),
        r"expected the tensor prompt_embeddings and holds prompt_encoder\.default\.embedding\.weight; load the model "
        r"in PEFT and save it by model\.save_pretrained\(folder\), which folds",
    ),
    "other trained modules": (
        lambda folder: edit_tensors(folder, **{"base_model.lm_head.weight": torch.zeros(2)}),
        r"holds base_model\.lm_head\.weight beside prompt_embeddings: modules_to_save trained more than virtual tokens",
    ),
    "another shape": (
        lambda folder: edit_config(folder, num_virtual_tokens=5),
        r"expected prompt_embeddings of shape \[5, 32\] \(num_virtual_tokens, token_dim of \S+\) and holds \[4, 32\]",
    ),
    "rows that are not finite": (
        lambda folder: edit_tensors(folder, prompt_embeddings=torch.full((4, 32), torch.nan)),
        r"expected finite numbers and holds some that are not; its training diverged, so take an earlier checkpoint$",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_unfit_adapter_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    adapter_of_peft(tmp_path)
    damage(tmp_path)
    with pytest.raises(SoftPromptError, match=message) as caught:
        read_peft_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_or_holds_several_adapters_is_named(tmp_path: Path) -> None:
    adapter_of_peft(tmp_path / "checkpoint-10")
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-20")
    with pytest.raises(
        SoftPromptError, match=r"adapter_config\.json; name one of the adapters in it: checkpoint-10, check"
    ):
        read_peft_adapter(tmp_path)
    with pytest.raises(
        SoftPromptError, match=r'there is no adapter folder "\S+"; check the path\. Did you mean "check'
    ):
        read_peft_adapter(tmp_path / "checkpoint-30")


def test_a_template_with_another_number_of_virtual_tokens_is_refused(tmp_path: Path) -> None:
    adapter_of_peft(tmp_path)
    with pytest.raises(SoftPromptError) as caught:
        import_peft(tmp_path, backbone=backbone_of("gpt2"), template="[P*3]{text}{answer}", task=TASK)
    assert str(caught.value) == (
        f'the adapter "{tmp_path}" has 4 virtual tokens and the template 3; write [P*4] where PEFT set them, before '
        "everything else"
    )


def test_a_backbone_of_another_width_is_refused(tmp_path: Path) -> None:
    write_peft_adapter(tmp_path, torch.zeros(4, 8), base_model="some/model", num_layers=2, num_attention_heads=4)
    with pytest.raises(SoftPromptError) as caught:
        import_peft(tmp_path, backbone=backbone_of("gpt2"), template="[P*4]{answer}", task=TASK)
    assert str(caught.value) == (
        f'the adapter "{tmp_path}" is of width 8 and the backbone "gpt2" of width 32; load the model that it was '
        "trained on (some/model)"
    )
