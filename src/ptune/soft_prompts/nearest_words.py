"""Which words of the vocabulary lie nearest to each virtual token: to look at, and not to read much into.

Knows soft prompts and their backbones, and nothing of files or of how the virtual tokens came about.
Shapes: P virtual tokens, H width, c ids of a chunk, k nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ptune.errors import BackboneError
from ptune.models.backbone import Backbone
from ptune.soft_prompts.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class Word:
    """An id of the tokenizer, its text, and how near it is: cosine similarity and euclidean distance."""

    id: int
    text: str
    cosine: float
    distance: float


@dataclass(frozen=True)
class NearestWords:
    """The words nearest to one virtual token, by each measure, nearest first.

    Attributes:
        virtual_token: which one, from 0.
        norm: its length; beside those of words it tells whether a cosine says anything.
        by_cosine: by direction alone.
        by_distance: by euclidean distance.
    """

    virtual_token: int
    norm: float
    by_cosine: tuple[Word, ...]
    by_distance: tuple[Word, ...]


def words_of_prompt(prompt: SoftPrompt, model: str | None, count: int) -> tuple[list[NearestWords] | None, str]:
    """Return the words nearest to a soft prompt's virtual tokens, or None and a sentence on why there are none.

    Args:
        prompt: whose backbone is loaded.
        model: another copy of the backbone; the one that the prompt names where absent.
        count: k, how many words.

    Raises:
        BackboneError: a model was given, and cannot be loaded; the one that the prompt names may be gone.
        SoftPromptError: it belongs to another backbone.
    """
    if prompt.deep is not None:
        return None, "A deep prompt is keys and values at every layer, to which no words are near."
    try:
        backbone = Backbone.load(prompt.model_config(model))
    except BackboneError as error:
        if model is not None:
            raise
        return None, f"Nearest words need the backbone: {error}"
    prompt.check(backbone)
    return nearest_words(prompt.rows, backbone, count), ""


@torch.no_grad()
def nearest_words(rows: Tensor, backbone: Backbone, count: int = 5, *, chunk_size: int = 8192) -> list[NearestWords]:
    """Return the nearest vocabulary rows of each virtual token.

    Compared is what the input embedding gives (scaled, in families that scale there), for ids that the tokenizer has:
    rows beyond them are padding that stands for no word. Of the matrix no more than a chunk is held in
    float32.

    Args:
        rows: ``[P, H]`` of any float dtype.
        backbone: whose vocabulary is searched.
        count: k, how many words; fewer where the tokenizer has fewer.
        chunk_size: c, rows of the input matrix compared at a time; 8192 of width 4096 are 128 MiB.
    """
    rows = rows.detach().to(backbone.device, torch.float32)
    ids = sorted({i for i in backbone.tokenizer.get_vocab().values() if i < backbone.vocabulary_size})
    by_cosine, by_distance = _Best(len(rows), count, rows.device), _Best(len(rows), count, rows.device)
    for chunk in torch.tensor(ids, device=backbone.device).split(chunk_size):
        words = backbone.embeddings(chunk)  # [c, H]
        products = rows @ words.T  # [P, c]
        lengths = words.norm(dim=-1)  # [c]
        cosines = products / (lengths * rows.norm(dim=-1, keepdim=True)).clamp(min=1e-12)
        # Of the squared distance only what differs between words: enough to rank, and less is cancelled.
        nearness = 2 * products - lengths.square()
        by_cosine.add(cosines, chunk)
        by_distance.add(nearness, chunk)
    cosine_words = _words(rows, backbone, by_cosine.ids)
    distance_words = _words(rows, backbone, by_distance.ids)
    return [
        NearestWords(
            virtual_token=index,
            norm=float(rows[index].norm()),
            by_cosine=tuple(sorted(cosine_words[index], key=lambda word: -word.cosine)),
            by_distance=tuple(sorted(distance_words[index], key=lambda word: word.distance)),
        )
        for index in range(len(rows))
    ]


class _Best:
    """The k best ids of each virtual token among the chunks seen so far."""

    def __init__(self, rows: int, count: int, device: torch.device) -> None:
        self._count = count
        self._scores = torch.empty(rows, 0, device=device)  # [P, <= k]
        self.ids = torch.empty(rows, 0, dtype=torch.long, device=device)  # [P, <= k]

    def add(self, scores: Tensor, ids: Tensor) -> None:
        """Take a chunk's scores ``[P, c]`` and ids ``[c]`` into account; greater is nearer."""
        all_scores = torch.cat([self._scores, scores], dim=-1)
        all_ids = torch.cat([self.ids, ids.expand(len(scores), -1)], dim=-1)
        self._scores, places = all_scores.topk(min(self._count, all_scores.shape[-1]), dim=-1)
        self.ids = all_ids.gather(-1, places)


def _words(rows: Tensor, backbone: Backbone, ids: Tensor) -> list[list[Word]]:
    """Return the chosen ids ``[P, k]`` as words, measured exactly."""
    count, chosen = ids.shape
    words = backbone.embeddings(ids.flatten()).view(count, chosen, -1)  # [P, k, H]
    cosines = functional.cosine_similarity(rows.unsqueeze(1), words, dim=-1).tolist()
    distances = (rows.unsqueeze(1) - words).norm(dim=-1).tolist()
    return [
        [Word(i, _text(backbone, i), cosine, distance) for i, cosine, distance in zip(*columns, strict=True)]
        for columns in zip(ids.tolist(), cosines, distances, strict=True)
    ]


def _text(backbone: Backbone, token: int) -> str:
    text = str(backbone.tokenizer.decode([token]))
    # A part of a character has no text of its own; the tokenizer's name for it says at least which part.
    return (
        str(backbone.tokenizer.convert_ids_to_tokens(token))
        if not text or "\N{REPLACEMENT CHARACTER}" in text
        else text
    )
