"""What tells one backbone from others, the same for every load dtype: JSON of a few hundred bytes.

Knows nothing of tasks or soft prompts. Shapes: H width, S sampled rows, V rows of the input matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# What is read of a config: the shape of the model and what its numbers mean, nothing that a load may change.
_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_ROWS = 16
_COLUMNS = 8


def sampled_ids(vocabulary_size: int) -> Tensor:
    """Return the ids whose rows the fingerprint shows, ``[S]`` int64."""
    return torch.linspace(0, vocabulary_size - 1, _ROWS).long()


def fingerprint(kind: str, config: PreTrainedConfig, rows: Tensor, embeddings: Tensor) -> dict[str, Any]:
    """Return a backbone's fingerprint.

    Named config fields, a fixed sample of the input matrix rounded to bfloat16, and by how many octaves the embedding
    module scales it: for Gemma that moved into the module between versions of transformers, and with it what virtual
    tokens mean.

    Args:
        kind: of the model, for the same weights mean another thing to BERT as a decoder.
        config: the model's.
        rows: of the input matrix at `sampled_ids`, ``[S, H]`` of any float dtype.
        embeddings: what the embedding module gives for the same ids, ``[S, H]`` float32.
    """
    rows = rows.detach().float()
    scaled = embeddings.norm() / rows.norm()
    return {
        "kind": kind,
        "config": {field: getattr(config, field, None) for field in _FIELDS},
        # families scale by the root of a width; the shift keeps such roots away from the rounding's edge
        "octaves": round(math.log2(float(scaled)) + 0.15),
        "rows": rows[:, :_COLUMNS].to(torch.bfloat16).float().flatten().tolist(),
    }


def same_backbone(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one backbone, to the rounding of half precision."""
    if any(one.get(part) != other.get(part) for part in ("kind", "config", "octaves")):
        return False
    rows, others = (torch.tensor(each.get("rows", ())) for each in (one, other))
    # float16 rounds before bfloat16 does, so a last bit may differ between load dtypes.
    return len(rows) == len(others) and torch.allclose(rows, others, rtol=2**-7, atol=1e-6)
