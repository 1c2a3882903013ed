"""The helper that writes run folders, under a name that tests can ask for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """tests/report/synthetic.py: `write_study`, `write_run`, `result`."""
    path = Path(__file__).with_name("synthetic.py")
    spec = importlib.util.spec_from_file_location("report_synthetic", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(synthetic: ModuleType, tmp_path: Path) -> Path:
    """A finished study of four shares with two seeds: recall jumps, the loss is flat."""
    return synthetic.write_study(tmp_path / "attn_ratio")
