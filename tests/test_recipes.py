"""The recipe's masked model: mini's tokens, a mask that no text holds, and a backbone like any other."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ptune.config.run import RunConfig
from ptune.families import MASKED
from ptune.models.backbone import Backbone
from ptune.pretrained.loading import MINI
from ptune.records.record import Record
from ptune.tasks.registry import task_for
from ptune.template import Template
from ptune.training.train import train

TEXTS = ("A warm, funny film.", "这家店的苹果很新鲜。", "naïve café À 🙂")


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))
    import kinds

    return kinds


@pytest.fixture
def trained() -> Tokenizer:
    return Tokenizer.from_file(str(MINI / "tokenizer.json"))


def test_the_masked_model_reads_mini_s_tokens_between_its_own(kinds: ModuleType, trained: Tokenizer) -> None:
    tokenizer = kinds.Masked(trained).tokenizer(trained)
    mini = AutoTokenizer.from_pretrained(MINI)
    assert len(tokenizer) == len(mini) == 8192
    for text in TEXTS:
        ids = mini(text).input_ids
        assert tokenizer(text).input_ids == [*ids, tokenizer.sep_token_id]
        assert tokenizer.mask_token_id not in ids
    assert tokenizer("a <mask>", add_special_tokens=False).input_ids[-1] == tokenizer.mask_token_id
    assert tokenizer.cls_token_id == mini.bos_token_id


def test_three_of_ten_tokens_are_hidden_and_only_they_are_predicted(kinds: ModuleType, trained: Tokenizer) -> None:
    torch.manual_seed(0)
    learner = kinds.Masked(trained)
    ids = torch.randint(3, 8192, (2, 40))
    seen: list[torch.Tensor] = []

    def trunk(*, input_ids: torch.Tensor) -> object:
        seen.append(input_ids)
        return learner.trunk(input_ids=input_ids)

    loss = learner.loss(trunk, ids.clone(), np.random.default_rng(0))
    (shown,) = seen
    hidden = shown == kinds.mask_id(trained)
    assert hidden.sum(1).tolist() == [12, 12]
    assert not hidden[:, 0].any()
    assert (shown[:, 0] == kinds.BOS).all()
    kept = ~hidden[:, 1:]
    assert torch.equal(shown[:, 1:][kept], ids[:, 1:][kept])
    logits = learner.model(input_ids=shown).logits.log_softmax(-1)
    expected = -logits.gather(-1, ids[..., None]).squeeze(-1)[hidden].mean()
    assert loss.item() == pytest.approx(expected.item(), abs=0.02)  # the recipe computes in bfloat16
    assert loss.item() == pytest.approx(math.log(8192), abs=0.4)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_layers_that_join_change_nothing_at_first(kinds: ModuleType, trained: Tokenizer, kind: str) -> None:
    torch.manual_seed(0)
    learner = kinds.learner(kind, trained)
    ids = torch.randint(3, 8192, (2, 40))
    losses = []
    for count in (learner.first_layers, len(learner.layers)):
        learner.use_layers(count)
        with torch.no_grad():
            losses.append(learner.loss(learner.trunk, ids.clone(), np.random.default_rng(0)).item())
    assert learner.first_layers < len(learner.layers)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_ptune_loads_it_as_a_masked_backbone_and_tunes_it(
    kinds: ModuleType, trained: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    learner = kinds.Masked(trained)
    for name, parameter in learner.model.named_parameters():
        if name.endswith(".output.dense.weight"):  # zero in a new model, so that no word reads another
            torch.nn.init.normal_(parameter, std=0.05)
    learner.trim(320)
    learner.model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    learner.tokenizer(trained).save_pretrained(tmp_path / "model")
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 24 * 2**20
    backbone = Backbone.load(str(tmp_path / "model"))
    assert backbone.kind is MASKED
    assert backbone.context_limit == 320
    records = [
        Record({"text": text, "label": label}, f"line {number}")
        for number, (text, label) in enumerate([("warm and funny", "positive"), ("dull and long", "negative")] * 4)
    ]
    config = RunConfig.model_validate(
        {
            "model": str(tmp_path / "model"),
            "task": {"type": "classification", "verbalizer": {"positive": " great", "negative": " bad"}},
            "prompt": {"template": "It was{answer}[P*4]. {text}"},
            "training": {"max_steps": 4, "batch_size": 8, "evaluations": 1},
            "output": tmp_path / "prompt",
        }
    )
    prompt = train(config, backbone=backbone, records=(records, records))
    assert prompt.rows.shape == (4, 320)
    task = task_for(backbone, config.task, Template.parse(config.prompt.template))
    (row,) = task.rows(records[0])
    tokenizer = backbone.tokenizer
    assert list(row.ids[:-1]) == [
        *tokenizer("It was").input_ids[:-1],
        tokenizer.mask_token_id,
        *range(8192, 8196),
        *tokenizer(". warm and funny").input_ids[1:-1],
    ]
    assert row.ids[-1] == tokenizer.sep_token_id
    assert list(row.read_at) == [3]


def test_a_masked_model_is_measured_by_what_was_hidden_from_it(
    kinds: ModuleType, trained: Tokenizer, tmp_path: Path
) -> None:
    import probe

    torch.manual_seed(0)
    learner = kinds.Masked(trained)
    learner.model.save_pretrained(tmp_path)
    learner.tokenizer(trained).save_pretrained(tmp_path)
    measured = probe.Measured.load(str(tmp_path))
    (window,) = measured.windows("A warm, funny film about nothing much.")
    tokenizer = measured.tokenizer
    assert (window[0], window[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    found = measured.hidden_perplexity([tokenizer.decode(window[1:-1])])
    shown = torch.tensor([window])
    places = list(range(3, len(window) - 1, 7))
    shown[0, places] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = measured.model(input_ids=shown).logits[0, places]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(window)[places])
    assert found == {"perplexity": pytest.approx(math.exp(expected.item()), rel=1e-4), "tokens": len(places)}
    assert measured.features(["one", "two words"]).shape == (2, 640)
