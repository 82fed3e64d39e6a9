"""The model that comes with ptune: whole, small, found by its name, and good enough for its demo."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptune.demonstration import demo_records
from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.pretrained.loading import MINI
from ptune.soft_prompts.soft_prompt import SoftPrompt

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return Backbone.load("mini")


def test_mini_is_small_and_says_where_it_comes_from() -> None:
    files = {path.name: path.stat().st_size for path in MINI.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"} <= set(files)
    assert sum(files.values()) < 24 * MEGABYTE
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    card = (MINI / "README.md").read_text(encoding="utf-8")
    for source in ("imdb", "sst2", "shopping_zh", "alpaca_zh", "wikitext", "Standard Ebooks"):
        assert source in card
    assert "CC BY-NC 4.0" in card


def test_mini_is_a_llama_of_two_languages(mini: Backbone) -> None:
    parameters = sum(parameter.numel() for parameter in mini.model.parameters())
    assert 10e6 < parameters < 12e6
    assert mini.vocabulary_size == len(mini.tokenizer) == 8192
    assert mini.context_limit is not None
    assert mini.context_limit >= 256
    for text in ("A warm, funny film.", "这家店的苹果很新鲜。", "naïve café 🙂"):
        ids = mini.tokenizer(text)["input_ids"]
        assert ids[0] == mini.tokenizer.bos_token_id
        assert mini.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_mini_has_learnt_both_languages(mini: Backbone) -> None:
    for chinese, most in ((False, 90.0), (True, 90.0)):
        texts = [r["text"] for r in demo_records("test") if bool(re.search("[一-鿿]", r["text"])) is chinese]
        assert len(texts) > 50
        nats = tokens = 0.0
        for text in texts:
            ids = torch.tensor([mini.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                nats += float(mini(ids, torch.ones_like(ids), labels=ids))
            tokens += ids.shape[1] - 1
        assert math.exp(nats / tokens) < most  # of 8,192 tokens


def test_mini_continues_a_text(mini: Backbone) -> None:
    ids = mini.tokenizer("The film is")["input_ids"]
    (answer,) = generate(mini, [ids], GenerationOptions(max_new_tokens=12))
    assert len(answer.text.split()) >= 3


def test_the_demo_shows_a_clear_gain_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "TERM": "dumb"}
    command = [sys.executable, "-m", "ptune", "demo", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gain = re.search(r"held-out sentences: ([\d.]+)% -> ([\d.]+)%", done.stdout)
    assert gain is not None, done.stdout
    before, after = map(float, gain.groups())
    assert after - before > 5
    assert after > 85
    assert '"This movie was fantastic!" -> positive' in done.stdout
    prompt = SoftPrompt.load(tmp_path / "demo")
    assert prompt.rows.shape == (10, 320)
    assert prompt.backbone_name == "mini"
    predicted = subprocess.run(
        [sys.executable, "-m", "ptune", "predict", str(tmp_path / "demo"), "送货很快，苹果也新鲜。 下次还来。"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert json.loads(predicted.stdout)["label"] == "positive", predicted.stderr
