"""In which dtype a backbone is loaded where nothing is asked: half precision where it is faster, and float32 elsewhere.

Knows devices and widths, and nothing of models' weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALLEST_WIDTH = 256
"""Narrower models stay in float32: their products are too small to gain by half precision (docs/performance.md)."""


@dataclass(frozen=True)
class Precision:
    """A dtype, and in a few words why it was taken."""

    dtype: torch.dtype
    why: str


def precision_for(asked: str, device: torch.device, width: int) -> Precision:
    """Return the dtype of a backbone's weights and hidden states.

    Args:
        asked: ``model.dtype``, a dtype's name or ``auto``.
        device: where the backbone will be.
        width: H, of its hidden states.
    """
    if asked != "auto":
        return Precision(getattr(torch, asked), "model.dtype says so")
    if width < SMALLEST_WIDTH:
        return Precision(torch.float32, f"hidden states are narrower than {SMALLEST_WIDTH}")
    where = "this processor" if device.type == "cpu" else f"this {device.type} device"
    if _has_bfloat16(device):
        return Precision(torch.bfloat16, f"{where} multiplies it fast")
    return Precision(torch.float32, f"{where} is not known to multiply bfloat16 fast")


def _has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are carried out fast: of processors, by those that have AMX.

    avx512_bf16 alone promises nothing: x2 to x3 on one processor was x0.6 on another (docs/performance.md). It is not
    measured here, for a run must end the same on a busy machine.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # torch has no public name for it
    return bool(has_amx())
