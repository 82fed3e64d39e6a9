"""A folder of soft prompts is shown by what their descriptions say; a damaged one does not hide the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from soft_prompts import make
from tiny_models import tiny_model, tiny_tokenizer

from ptune.errors import SoftPromptError
from ptune.models.backbone import Backbone
from ptune.soft_prompts.library import read_library

RUN = {"metric": "accuracy", "after": {"accuracy": 0.875, "loss": 0.3}, "date": "2026-11-01T10:00:00+00:00"}


@pytest.fixture(scope="module")
def gpt2() -> Backbone:
    return Backbone(tiny_model("gpt2"), tiny_tokenizer(), "gpt2")


def test_a_library_lists_what_its_folders_hold(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2, summary=RUN).save(tmp_path / "film")
    make(gpt2, summary={}).save(tmp_path / "shop" / "seed-0")
    (tmp_path / "notes").mkdir()
    film, shop = read_library(tmp_path)
    assert (film.name, film.metric, film.value) == ("film", "accuracy", 0.875)
    assert (film.task, film.backbone, film.virtual_tokens) == ("classification", "gpt2", 4)
    assert film.date is not None
    assert film.date.startswith("2026-11-01")
    files = [path for path in (tmp_path / "film").iterdir() if path.is_file()]
    assert film.bytes == sum(path.stat().st_size for path in files)
    assert (shop.name, shop.metric, shop.date) == ("shop/seed-0", None, None)


def test_a_damaged_soft_prompt_says_so_beside_the_others(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2).save(tmp_path / "whole")
    make(gpt2).save(tmp_path / "broken")
    (tmp_path / "broken" / "ptune.json").write_text("{")
    broken, whole = read_library(tmp_path)
    assert "ptune.json" in str(broken.mistake)
    assert whole.mistake is None


def test_a_folder_without_soft_prompts_is_named(tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match="holds no soft prompt; `ptune train` writes one"):
        read_library(tmp_path)
    with pytest.raises(SoftPromptError, match=r'there is no folder "\S+absent"'):
        read_library(tmp_path / "absent")


def test_the_command_says_nothing_beside_its_table(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2, summary=RUN).save(tmp_path / "film")
    done = subprocess.run([sys.executable, "-m", "ptune", "list", tmp_path], capture_output=True, text=True, check=True)
    assert "film" in done.stdout
    assert done.stderr == ""
