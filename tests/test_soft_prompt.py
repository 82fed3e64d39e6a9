"""A soft prompt comes back from its folder as it was, and says what it is and where it belongs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soft_prompts import TASK, TEMPLATE, assert_same, make
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.run import EncoderConfig
from ptune.config.task import ClassificationConfig, GenerationConfig
from ptune.errors import SoftPromptError, TemplateError
from ptune.models.backbone import Backbone
from ptune.soft_prompts.files import size_in_bytes
from ptune.soft_prompts.soft_prompt import SoftPrompt

ENCODERS = [
    None,
    EncoderConfig(),
    EncoderConfig(type="embedding"),
    EncoderConfig(type="mlp", hidden_size=8, num_layers=1, dropout=0.25, residual=False),
    EncoderConfig(type="lstm", hidden_size=16),
]


@pytest.fixture(scope="module")
def gpt2() -> Backbone:
    return Backbone(tiny_model("gpt2"), tiny_tokenizer(), "tiny/gpt2")


# Round trip


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda e: e.type if e else "none")
@pytest.mark.parametrize("task", [TASK, GenerationConfig(max_new_tokens=7, metric="rouge_l")], ids=lambda t: t.type)
def test_a_soft_prompt_comes_back_as_it_was(tmp_path: Path, gpt2: Backbone, encoder: Any, task: Any) -> None:
    prompt = make(gpt2, encoder=encoder, task=task)
    prompt.save(tmp_path / "a" / "prompt")
    loaded = SoftPrompt.load(tmp_path / "a" / "prompt")
    assert_same(loaded, prompt)
    assert loaded.rows.dtype == torch.float32
    loaded.check(gpt2)


@given(
    rows=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=6, max_size=6),
    labels=st.dictionaries(st.text(min_size=1), st.text(min_size=1), min_size=2, max_size=4),
    text=st.text(st.characters(exclude_characters="[]{}\\", exclude_categories=["Cs"])),
    max_length=st.none() | st.integers(1, 10_000),
    overlong=st.sampled_from(["cut", "drop", "error"]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_rows_labels_and_text_come_back_as_they_were(
    tmp_path: Path, gpt2: Backbone, rows: Any, labels: Any, text: str, max_length: Any, overlong: Any
) -> None:
    prompt = make(
        gpt2,
        rows=torch.tensor(rows).view(3, 2),
        template="[P*2]" + text + "[P]{answer}",
        task=ClassificationConfig(verbalizer=labels),
        max_length=max_length,
        overlong=overlong,
    )
    prompt.save(tmp_path)
    assert_same(SoftPrompt.load(tmp_path), prompt)


def test_rows_of_another_dtype_are_kept_as_float32_and_not_shared(gpt2: Backbone) -> None:
    rows = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    prompt = make(gpt2, rows=rows)
    with torch.no_grad():
        before = rows.float().clone()
        rows.zero_()
    assert torch.equal(prompt.rows, before)
    assert prompt.rows.dtype == torch.float32
    assert not prompt.rows.requires_grad


def test_a_metric_that_is_not_a_number_is_saved_as_null(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2, summary={"after": {"loss": float("nan")}}).save(tmp_path)
    assert SoftPrompt.load(tmp_path).summary == {"after": {"loss": None}}


def test_the_folder_says_by_itself_what_it_is(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2).save(tmp_path)
    values = json.loads((tmp_path / "ptune.json").read_text())
    tensors = (tmp_path / "soft_prompt.safetensors").read_bytes()
    assert values["format_version"] == 1
    assert values["template"] == TEMPLATE
    assert values["task"]["verbalizer"] == {"good": " great", "bad": " terrible"}
    assert values["backbone"]["name"] == "tiny/gpt2"
    assert values["virtual_tokens"] == {"count": 4, "width": 32, "sha256": hashlib.sha256(tensors).hexdigest()}
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "ptune.json",
        "soft_prompt.safetensors",
    ]


def test_a_soft_prompt_of_ten_tokens_takes_tens_of_kilobytes(tmp_path: Path, gpt2: Backbone) -> None:
    prompt = make(gpt2, rows=torch.randn(10, 1024), template="[P*10]{text}{answer}")
    prompt.save(tmp_path)
    size = size_in_bytes(tmp_path)
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 2 * 40_960 < size < 100_000  # the rows stand there twice, once for PEFT
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(bytes(1000))
    assert size_in_bytes(tmp_path) == size


def test_the_size_of_what_is_no_soft_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match=r"is no soft prompt: it has no ptune\.json"):
        size_in_bytes(tmp_path)


def test_a_description_is_json_and_names_what_inspect_shows(gpt2: Backbone) -> None:
    rows = torch.diag(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    description = make(gpt2, rows=rows).describe()
    assert json.loads(json.dumps(description)) == description
    assert description["virtual_tokens"] == 4
    assert description["width"] == 4
    assert description["norms"] == {"least": 1.0, "mean": 3.0, "greatest": 6.0}
    assert description["backbone_config"]["model_type"] == "gpt2"
    assert description["loads_in_peft"]


# What cannot be a soft prompt


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            torch.zeros(3, 32),
            r"the template has 4 virtual tokens, .* of shape \[3, 32\]; write \[P\*3\] .* \[4, width\]",
        ),
        (torch.zeros(4), r"the template has 4 virtual tokens, .* of shape \[4\]"),
        (
            torch.full((4, 32), torch.inf),
            r"virtual tokens \[0, 1, 2, 3\] hold a value that is infinite or not a number",
        ),
        (torch.tensor([[0.0]] * 3 + [[torch.nan]]), r"virtual tokens \[3\] hold .*; the run diverged, so train again"),
    ],
)
def test_rows_that_do_not_fit_the_template_are_refused(gpt2: Backbone, rows: torch.Tensor, message: str) -> None:
    with pytest.raises(SoftPromptError, match=message):
        make(gpt2, rows=rows)


def test_a_template_without_virtual_tokens_is_refused(gpt2: Backbone) -> None:
    with pytest.raises(
        SoftPromptError, match=r"the template '\{text\}\{answer\}' has no virtual tokens.*; put \[P\*10\]"
    ):
        make(gpt2, rows=torch.zeros(0, 32), template="{text}{answer}")


def test_a_template_that_cannot_be_parsed_is_refused(gpt2: Backbone) -> None:
    with pytest.raises(TemplateError):
        make(gpt2, template="[P*4]{text}")


# Which backbone


def test_a_soft_prompt_belongs_to_its_backbone_in_every_dtype(gpt2: Backbone) -> None:
    prompt = make(gpt2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        prompt.check(Backbone(tiny_model("gpt2", dtype=dtype), tiny_tokenizer(), "a copy"))


def test_a_backbone_of_another_type_is_refused_with_what_differs(gpt2: Backbone) -> None:
    llama = Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny/llama")
    with pytest.raises(SoftPromptError) as caught:
        make(gpt2).check(llama)
    assert str(caught.value) == (
        'the soft prompt belongs to another backbone: it was trained on "tiny/gpt2" and the one loaded is "tiny/llama" '
        '(model_type gpt2 against llama); load "tiny/gpt2" for it, or train a soft prompt on "tiny/llama"'
    )


def test_a_backbone_of_another_width_is_refused_with_both_widths(gpt2: Backbone) -> None:
    with pytest.raises(SoftPromptError, match=r"\(width 8 against 32\); load"):
        make(gpt2, rows=torch.zeros(4, 8), backbone_name="narrow").check(gpt2)


def test_a_backbone_of_the_same_shape_and_name_but_other_weights_is_refused(gpt2: Backbone) -> None:
    other = Backbone(tiny_model("gpt2", seed=1), tiny_tokenizer(), "tiny/gpt2")
    with pytest.raises(SoftPromptError) as caught:
        make(gpt2).check(other)
    assert str(caught.value).endswith(
        "(their shapes are the same, the rows of their input matrices are not); "
        'load the version of "tiny/gpt2" that it was trained on, or train it again on this one'
    )


# PEFT's pair


@pytest.mark.parametrize(
    ("template", "fits"),
    [
        ("[P*4]{text}{answer}", True),
        ("[P*4][bos]{text}{answer}", True),
        ("[P*3][P]{text}{answer}", True),
        ("[P][P][P][P]{text}{answer}", True),
        ("{text}[P*4]{answer}", False),
        ("[bos][P*4]{text}{answer}", False),
        (" [P*4]{text}{answer}", False),
        ("[P*2]{text}[P*2]{answer}", False),
        ("[[P*4]]{text}[P*4]{answer}", False),
    ],
)
def test_pefts_pair_stands_there_only_where_peft_would_do_the_same(
    tmp_path: Path, gpt2: Backbone, template: str, fits: bool
) -> None:
    make(gpt2).save(tmp_path)
    prompt = make(gpt2, template=template)
    prompt.save(tmp_path)
    assert prompt.fits_peft is fits
    assert (tmp_path / "adapter_config.json").exists() is fits
    assert (tmp_path / "adapter_model.safetensors").exists() is fits
    assert ("PeftModel" in (tmp_path / "README.md").read_text()) is fits


# The model card


def test_the_model_card_tells_what_the_run_saw(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2).save(tmp_path / "sentiment")
    card = (tmp_path / "sentiment" / "README.md").read_text()
    for line in (
        "base_model: tiny/gpt2",
        "# sentiment",
        "    [P*4]Review: {text}",
        "    Verdict:{answer}",
        "On 64 held-out records:",
        "| accuracy | 0.5 | 0.9375 |",
        "- seed: 7",
        "- data hash: 0123456789abcdef",
        "- versions: ptune 0.1.0, torch 2.13.0",
    ):
        assert line in card.splitlines()
    assert "A soft prompt for `tiny/gpt2`: 4 virtual tokens of width 32" in card


def test_a_model_card_needs_no_summary(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2, summary={}, backbone_name="/models/gpt2").save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "## Results" not in card
    assert "## Run" not in card
    assert "base_model" not in card  # a path says nothing to others


def test_a_readme_of_the_users_own_is_left_alone(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2).save(tmp_path)
    make(gpt2, template="[P*4]new{answer}").save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "    [P*4]new{answer}" in card
    own = re.sub("<!--.*-->", "and my own remark", card)
    (tmp_path / "README.md").write_text(own)
    make(gpt2).save(tmp_path)
    assert (tmp_path / "README.md").read_text() == own


def test_the_programs_in_the_model_card_run(tmp_path: Path, gpt2: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2.model.save_pretrained(tmp_path / "gpt2")
    gpt2.tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    prompt = make(gpt2, backbone_name="./gpt2")
    prompt.save("sentiment")
    in_ptune, in_peft = re.findall(r"```python\n(.*?)```", Path("sentiment/README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"records": [{"text": "The soup was cold."}]}
    exec(in_ptune, names)
    assert names["answers"][0]["label"] in TASK.verbalizer
    exec(in_peft, names)
    assert torch.equal(names["model"].get_prompt(1)[0].cpu(), prompt.rows)
