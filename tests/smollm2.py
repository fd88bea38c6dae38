"""SmolLM2's GGUF file for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.smollm2_file import NotAvailable, gguf_path


def smollm2_file() -> Path:
    """The path of the file; skips the test if it cannot be downloaded."""
    try:
        return gguf_path()
    except NotAvailable as error:
        pytest.skip(str(error))
