"""Fixtures shared by all tests: tiny models of every family, tokenizers, real data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the public data sets, named by PTUNE_DATA; the test skips without it."""
    folder = os.environ.get("PTUNE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PTUNE_DATA names no folder of real data sets")
    return Path(folder)
