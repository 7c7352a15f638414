"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text, tokenizers and golden files beside the repository; developers have it, users need not."""
    if not SHARED.is_dir():
        reason = f"needs the developers' material in {SHARED.name}/ beside the repository"
        if os.environ.get("ARGONNE_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED
