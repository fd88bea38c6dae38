"""Packages that only some installations have: tests that need them are skipped elsewhere."""

from __future__ import annotations

import importlib.util

import pytest

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed here (extra: torch)")
needs_transformers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
    reason="transformers or PyTorch, which it runs on, is not installed here (extras: hf, torch)")
