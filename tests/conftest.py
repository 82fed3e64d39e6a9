"""Fixtures shared by all tests: real data where it is at hand, and float64 that is float64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.bloom import modeling_bloom
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the public data sets, named by PTUNE_DATA; the test skips without it."""
    folder = os.environ.get("PTUNE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PTUNE_DATA names no folder of real data sets")
    return Path(folder)


class _Functional:
    """torch.nn.functional whose softmax keeps float64."""

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    def softmax(self, scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return functional.softmax(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype)


@pytest.fixture
def true_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm and BLOOM's softmax round to float32 whatever their input, and other shapes round otherwise."""

    def normed(self: Any, states: Tensor) -> Tensor:
        epsilon = getattr(self, "variance_epsilon", getattr(self, "eps", None))
        scaled = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
        return scaled * (1.0 + self.weight if type(self).__name__.startswith("Gemma") else self.weight)

    norms = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, GemmaRMSNorm)
    for norm in norms:
        monkeypatch.setattr(norm, "forward", normed)
    monkeypatch.setattr(modeling_bloom, "F", _Functional())
