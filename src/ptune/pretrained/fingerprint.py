"""What tells one backbone from others, the same for every load dtype: JSON of a few hundred bytes.

Knows nothing of tasks or soft prompts. Shapes: H width, s sampled rows, V rows of the input matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# What is read of a config: the shape of the model and what its numbers mean, nothing that a load may change.
_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_ROWS = 16
_COLUMNS = 8


def sampled_ids(vocabulary_size: int) -> Tensor:
    """Return the ids whose rows the fingerprint shows, ``[s]`` int64."""
    return torch.linspace(0, vocabulary_size - 1, _ROWS).long()


def fingerprint(kind: str, config: PreTrainedConfig, rows: Tensor, embeddings: Tensor) -> dict[str, Any]:
    """Return a backbone's fingerprint.

    Named config fields, a fixed sample of the input matrix rounded to bfloat16, and by how many octaves the embedding
    module scales it: for Gemma that moved into the module between versions of transformers, and with it what virtual
    tokens mean.

    Args:
        kind: of the model, for the same weights mean another thing to BERT as a decoder.
        config: the model's.
        rows: of the input matrix at `sampled_ids`, of shape ``[s, H]`` and any float dtype.
        embeddings: what the embedding module gives for the same ids, ``[s, H]`` float32.
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


def exact_key(family: str, config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> str:
    """Return a hexadecimal name of exactly this model: another weight, setting or library version gives another one.

    It reads every weight, some seconds a gigabyte.

    Args:
        family: the class of the model, with its module.
        config: the model's.
        tensors: name -> weight or buffer, of any shape.
    """
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    settings |= {"family": family, "attention": config._attn_implementation, "torch": torch.__version__}
    settings["transformers"] = version("transformers")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def same_backbone(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one backbone, to the rounding of half precision."""
    if any(one.get(part) != other.get(part) for part in ("kind", "config", "octaves")):
        return False
    rows, others = (torch.tensor(each.get("rows", ())) for each in (one, other))
    # float16 rounds before bfloat16 does, so a last bit may differ between load dtypes.
    return len(rows) == len(others) and torch.allclose(rows, others, rtol=2**-7, atol=1e-6)
