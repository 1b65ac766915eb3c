"""Settings of the whole test suite.

`python -m pytest tests` runs the default selection. Tests marked `slow` run in CI, too (`-m slow`), and where their file is
named; `--long` adds them and the tests marked `long`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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

from tests.distributed import Workers

# Its assertions show the figures that differ.
pytest.register_assert_rewrite("tests.document_figures")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="also run the tests marked slow and long (faults, miniatures, full products of layouts)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slow: half a minute and more; runs in CI, when its file is named, with --long or -m slow"
    )
    config.addinivalue_line("markers", "long: takes minutes; runs with --long or -m long")
    config.addinivalue_line("markers", "gpu: needs a GPU; left out where torch sees none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests unless their file is named, long ones unless they are; or asked for by --long or -m."""
    if not torch.cuda.is_available():
        _leave_out({"gpu"}, config, items)
    if config.getoption("--long") or config.getoption("-m") or any("::" in name for name in config.args):
        return
    left_out = {"long"} if any(name.endswith(".py") for name in config.args) else {"long", "slow"}
    _leave_out(left_out, config, items)


def _leave_out(markers: set[str], config: pytest.Config, items: list[pytest.Item]) -> None:
    without = [item for item in items if markers & {marker.name for marker in item.iter_markers()}]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every run of a test sees the same numbers, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Workers]:
    """Two processes for all tests of a file; what its tests leave in them goes with the file."""
    with Workers(2) as workers:
        yield workers


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Workers]:
    """Four, likewise."""
    with Workers(4) as workers:
        yield workers


@pytest.fixture(scope="session")
def cluster_reference(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The run that every launcher must repeat (tests/cluster_cases.py)."""
    from tests.cluster_cases import build_reference

    return build_reference(tmp_path_factory.mktemp("reference"))
