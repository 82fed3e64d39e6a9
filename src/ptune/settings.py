"""What all settings have in common: immutable, unknown names refused. Knows no setting of its own."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all settings: immutable, unknown names refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def label_text(value: Any) -> str:
    """Return a label as its text: booleans as ``true`` and ``false``, whatever JSON or YAML made of them."""
    return str(value).lower() if isinstance(value, bool) else str(value)
