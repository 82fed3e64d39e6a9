"""The nearest words of a virtual token are those that looking at every word finds."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

from ptune.models.backbone import Backbone
from ptune.soft_prompts.nearest_words import nearest_words


@pytest.fixture(scope="module", params=["gpt2", "gemma"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return Backbone(tiny_model(request.param), tiny_tokenizer(), request.param)


def test_a_row_of_the_vocabulary_is_nearest_to_itself(backbone: Backbone) -> None:
    tokenizer = backbone.tokenizer
    ids = tokenizer(" great 店", add_special_tokens=False).input_ids
    found = nearest_words(backbone.embeddings(torch.tensor(ids)), backbone, 1)
    assert [entry.virtual_token for entry in found] == list(range(len(ids)))
    for token, entry in zip(ids, found, strict=True):
        for (word,) in (entry.by_cosine, entry.by_distance):
            assert word.id == token
            assert word.cosine == pytest.approx(1, abs=1e-6)
            assert word.distance == 0
            assert "\N{REPLACEMENT CHARACTER}" not in word.text


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_the_nearest_by_both_measures_are_those_of_a_full_search(backbone: Backbone, chunk: int) -> None:
    scale = backbone.embeddings(torch.arange(VOCABULARY)).std()
    rows = torch.randn(5, backbone.hidden_size, generator=torch.Generator().manual_seed(0)) * scale
    ids = torch.tensor(sorted(backbone.tokenizer.get_vocab().values()))
    words = backbone.embeddings(ids).double()
    cosines = torch.nn.functional.cosine_similarity(rows[:, None].double(), words[None], dim=-1)
    distances = torch.cdist(rows.double(), words)
    for row, entry in enumerate(nearest_words(rows, backbone, 6, chunk_size=chunk)):
        assert [word.id for word in entry.by_cosine] == ids[cosines[row].argsort(descending=True)[:6]].tolist()
        assert [word.id for word in entry.by_distance] == ids[distances[row].argsort()[:6]].tolist()
        assert entry.norm == pytest.approx(float(rows[row].norm()))
        for word in (*entry.by_cosine, *entry.by_distance):
            column = ids.tolist().index(word.id)
            assert word.cosine == pytest.approx(float(cosines[row, column]), abs=1e-5)
            assert word.distance == pytest.approx(float(distances[row, column]), rel=1e-5)


def test_rows_that_are_no_tokens_words_are_never_found(backbone: Backbone) -> None:
    known = set(backbone.tokenizer.get_vocab().values())
    padding = [i for i in range(VOCABULARY) if i not in known]
    assert padding  # the matrix is longer than the tokenizer
    rows = backbone.embeddings(torch.tensor(padding))
    for entry in nearest_words(rows, backbone, 3):
        assert {word.id for word in (*entry.by_cosine, *entry.by_distance)} <= known


def test_more_words_than_there_are_are_all_of_them(backbone: Backbone) -> None:
    (entry,) = nearest_words(torch.zeros(1, backbone.hidden_size), backbone, 10_000)
    count = len(set(backbone.tokenizer.get_vocab().values()))
    assert len(entry.by_cosine) == len(entry.by_distance) == count
    assert all(word.cosine == 0 for word in entry.by_cosine)
