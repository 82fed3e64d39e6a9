"""What all settings have in common: immutable, unknown names refused. Knows no setting of its own."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all settings: immutable, unknown names refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def label_text(value: Any) -> str:
    """Return a label as its text: booleans as ``true`` and ``false``, whatever JSON or YAML made of them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def bytes_of(size: str) -> int:
    """Return a size written as in ``500MB`` or ``2GB`` in bytes.

    Raises:
        ValueError: it is written otherwise.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", size, flags=re.IGNORECASE)
    if found is None:
        raise ValueError(f'a size is written as in "500MB" or "2GB", and found "{size}"')
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " "))
