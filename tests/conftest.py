"""Settings of the whole test suite.

`python -m pytest tests` runs the default selection; `--long` adds the tests marked `long`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch, triton or deepspeed are imported: they read these once.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")
)  # see launch/build_ops.py

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="also run the tests marked long (full products of layouts)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes; runs with --long or -m long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests out unless they are asked for by --long, -m or their node id."""
    named = any("::" in argument for argument in config.args)
    if config.getoption("--long") or config.getoption("-m") or named:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every run of a test sees the same numbers, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cluster_reference(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The run that every launcher must repeat (tests/cluster_cases.py)."""
    from tests.cluster_cases import build_reference

    return build_reference(tmp_path_factory.mktemp("reference"))
