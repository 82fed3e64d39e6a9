"""Virtual tokens as rows of the matrix on disk, and what rounding them to its dtype costs.

Shapes: P virtual tokens of all prompts, H width, B contexts, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptune.engine.engine import Engine
from ptune.errors import BackboneError, SoftPromptError
from ptune.models.backbone import Backbone
from ptune.pretrained.fingerprint import sampled_ids
from ptune.prompts.virtual_tokens import input_matrix
from ptune.rendering.batch import IGNORED, Row, collate

_BATCH = 8


@dataclass(frozen=True)
class Rounding:
    """What storing virtual tokens in the model's dtype costs.

    Attributes:
        relative: norm of the difference by the norm of the rows.
        contexts: of the prompts that were read with the rows before and after.
        changed: in how many of them the likeliest next token became another.
        log_probability: by how much the log-probability of the likeliest next token changed at most.
    """

    relative: float
    contexts: int
    changed: int
    log_probability: float


def embedding_scale(backbone: Backbone) -> float:
    """Return by what the embedding module multiplies a row of its matrix (Gemma's root of the width); 1 for most.

    Raises:
        BackboneError: it does something else with it.
    """
    ids = sampled_ids(backbone.vocabulary_size)
    rows = input_matrix(backbone.model)[ids.to(backbone.device)].float()
    embeddings = backbone.embeddings(ids)
    scale = float((embeddings * rows).sum() / rows.square().sum())
    if not torch.allclose(embeddings, rows * scale, rtol=1e-2, atol=1e-6):
        raise BackboneError(
            f'the input embedding of "{backbone.name}" does more to a row than scale it, so a virtual token cannot be '
            "a row; serve it by ptune's own engine"
        )
    return 1.0 if abs(scale - 1) < 1e-5 else scale


def on_disk_rows(backbone: Backbone, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return virtual tokens ``[P, H]`` as rows of the matrix on disk, in its dtype.

    Raises:
        SoftPromptError: one is beyond the range of the dtype.
    """
    stored = (rows / embedding_scale(backbone)).to(dtype)
    if not torch.isfinite(stored).all():
        raise SoftPromptError(f"a virtual token is too great for the model's {dtype}; merge into the model in bfloat16")
    return stored


def rounding_cost(engine: Engine, rows: Tensor, stored: Tensor, contexts: Sequence[Sequence[int]]) -> Rounding:
    """Return what it costs that an engine's ``rows`` [P, H], in the order of its prompts, become ``stored`` [P, H]."""
    backbone = engine.backbone
    rounded = stored.float() * embedding_scale(backbone)
    relative = float((rounded - rows).norm() / rows.norm())
    before = _next_tokens(backbone, contexts)  # [B, V]
    tokens, start = backbone.attach(), 0
    try:
        for loaded in engine.prompts.values():
            count = len(loaded.prompt.rows)
            tokens.set_rows(loaded.first_virtual_id, rounded[start : start + count].to(backbone.device))
            start += count
        after = _next_tokens(backbone, contexts)
    finally:
        for loaded in engine.prompts.values():
            tokens.set_rows(loaded.first_virtual_id, loaded.prompt.rows.to(backbone.device))
        tokens.detach()
    likeliest = before.argmax(-1, keepdim=True)  # [B, 1]
    return Rounding(
        relative=relative,
        contexts=len(contexts),
        changed=int((likeliest != after.argmax(-1, keepdim=True)).sum()),
        log_probability=float((before.gather(-1, likeliest) - after.gather(-1, likeliest)).abs().max()),
    )


def _next_tokens(backbone: Backbone, contexts: Sequence[Sequence[int]]) -> Tensor:
    parts = []
    for start in range(0, len(contexts), _BATCH):
        rows = [Row(tuple(ids), (IGNORED,) * len(ids)) for ids in contexts[start : start + _BATCH]]
        batch = collate(rows, backbone.tokenizer.pad_token_id)
        last = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        last[torch.arange(len(rows)), torch.tensor([len(row.ids) - 1 for row in rows])] = True
        with torch.no_grad():
            logits = backbone.logits(batch.input_ids, batch.attention_mask, last)
        parts.append(torch.log_softmax(logits.double(), -1).cpu())
    return torch.cat(parts)
