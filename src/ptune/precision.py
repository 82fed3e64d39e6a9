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
    """Whether products of bfloat16 are carried out by instructions of their own: AMX or avx512_bf16 of a processor."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # no version of torch has public names for them
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)
