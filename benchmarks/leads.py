"""Prompt encoders that papers propose and ptune does not offer, for `defaults.py` to hold against ptune's own.

Each takes what `ptune.prompts.encoder.build_encoder` takes, and gives the virtual tokens ``[P, H]``. Shapes: P virtual
tokens, H width, B width of a bottleneck, K rows that are mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol
from unittest import mock

import torch
from torch import Tensor, nn

from ptune.config.run import EncoderConfig, StartConfig
from ptune.models.backbone import Backbone
from ptune.prompts.encoder import build_encoder, power_of_two_near_rms
from ptune.prompts.initial_rows import initial_rows

_BOTTLENECK = 64
_MIXED = 128
_NOISE = 0.1


class Built(Protocol):
    """What `ptune.prompts.encoder.build_encoder` is: gives an encoder at its start."""

    def __call__(self, config: EncoderConfig, initial: Tensor, seed: int) -> nn.Module:
        """Return the encoder of these initial rows ``[P, H]``."""


class ResidualBottleneck(nn.Module):
    """``rows + LayerNorm(up(ReLU(down(rows))))``: Razdaibiedina et al. 2023, Residual Prompt Tuning, section 3."""

    def __init__(self, config: EncoderConfig, initial: Tensor, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = initial.shape[1]
        self.scale = power_of_two_near_rms(initial)
        self.rows = nn.Parameter(initial / self.scale)
        self.layers = nn.Sequential(
            nn.Linear(width, _BOTTLENECK), nn.ReLU(), nn.Linear(_BOTTLENECK, width), nn.LayerNorm(width)
        )

    def forward(self) -> Tensor:
        """Return the virtual tokens ``[P, H]``."""
        rows: Tensor = (self.rows + self.layers(self.rows)) * self.scale
        return rows


class MixedRows(nn.Module):
    """Each virtual token is a learned mix ``[P, K] @ [K, H]`` of frozen rows of the vocabulary: SuperPos-Prompt (2024).

    The initial rows are the first of those that are mixed, and each token starts as its own.
    """

    def __init__(self, words: Tensor, config: EncoderConfig, initial: Tensor, seed: int) -> None:
        super().__init__()
        self.register_buffer("mixed", torch.cat([initial, words]))
        self.weights = nn.Parameter(torch.eye(len(initial), len(initial) + len(words)))

    def forward(self) -> Tensor:
        """Return the virtual tokens ``[P, H]``."""
        return self.weights @ self.mixed


class Perturbed(nn.Module):
    """ptune's encoder with noise on its rows while it is trained: the simplest of the regularisers of PTP (2023)."""

    def __init__(self, config: EncoderConfig, initial: Tensor, seed: int) -> None:
        super().__init__()
        self.encoder = build_encoder(config, initial, seed)
        self.scale = power_of_two_near_rms(initial)

    def forward(self) -> Tensor:
        """Return the virtual tokens ``[P, H]``."""
        rows: Tensor = self.encoder()
        return rows + _NOISE * self.scale * torch.randn_like(rows) if self.training else rows


class FrozenFirst(nn.Module):
    """ptune's encoder, its first row frozen where it started: a place for attention to rest."""

    def __init__(self, config: EncoderConfig, initial: Tensor, seed: int) -> None:
        super().__init__()
        self.encoder = build_encoder(config, initial, seed)
        self.register_buffer("first", initial[:1].clone())

    def forward(self) -> Tensor:
        """Return the virtual tokens ``[P, H]``."""
        return torch.cat([self.first, self.encoder()[1:]])


class Normalised(nn.Module):
    """ptune's encoder, every row brought back to the length that it had at the start."""

    def __init__(self, config: EncoderConfig, initial: Tensor, seed: int) -> None:
        super().__init__()
        self.encoder = build_encoder(config, initial, seed)
        self.register_buffer("lengths", initial.norm(dim=1, keepdim=True))

    def forward(self) -> Tensor:
        """Return the virtual tokens ``[P, H]``."""
        return nn.functional.normalize(self.encoder(), dim=1) * self.lengths


NAMES = (
    "residual bottleneck, LayerNorm",
    f"mix of {_MIXED} rows",
    "noise on the rows",
    "first row frozen",
    "rows kept to their length",
)


def built_by(name: str, backbone: Backbone) -> Built:
    """Return what builds the encoder of a lead."""
    words = initial_rows(
        StartConfig(),
        _MIXED,
        embeddings=backbone.embeddings,
        tokenizer=backbone.tokenizer,
        vocabulary_size=backbone.vocabulary_size,
        seed=_MIXED,
    )
    return dict(
        zip(NAMES, (ResidualBottleneck, partial(MixedRows, words), Perturbed, FrozenFirst, Normalised), strict=True)
    )[name]


@contextmanager
def in_place_of_the_encoder(built: Built) -> Iterator[None]:
    """Have every run that begins in the block train this encoder."""
    with mock.patch("ptune.training.assembly.build_encoder", built):
        yield
