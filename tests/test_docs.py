"""The examples of the documentation run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inrun_megatron.ledger import Ledger

ROOT = Path(__file__).resolve().parents[1]


def _blocks(page: str, script: str = "") -> str:
    """The examples of a page as one script; those that begin with a script's name are one of their own."""
    found = re.findall(
        r"```python\n(?:# (\w+\.py).*?\n)?(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.S
    )
    return "\n\n".join(block for name, block in found if name == script)


def _run(code: str, tmp_path: Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """On one rank without a launcher, or on `ranks` with torchrun."""
    script = tmp_path / "example.py"
    script.write_text(code)
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    environment = {**os.environ, **world, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *(launcher if ranks else []), str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )


def test_library_page(tmp_path: Path) -> None:
    code = _blocks("library.md")
    done = _run(code + '\nprint("ALL OF IT RAN", len(norms))\n', tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ALL OF IT RAN 2" in done.stdout
    ledger = Ledger(tmp_path / "runs/own")
    assert ledger.values().count_rows() == 16 and all(check.ok for check in ledger.verify())
    assert re.search(r"^3 \[\d\.\d+\] tensor\(\[", done.stdout, flags=re.M), done.stdout
    # A dataset of which run.json says no more than the name has samples, and no documents.
    inrun = Path(sys.executable).parent / "inrun"
    show: list[str | Path] = [inrun, "show", "runs/own", "--sample", "web:49", "--json"]
    shown = json.loads(subprocess.run(show, cwd=tmp_path, capture_output=True, check=True).stdout)
    assert [row["step"] for row in shown["values"]] == [6] and shown["documents"] == []


def test_the_hugging_face_example(tmp_path: Path) -> None:
    done = _run(_blocks("library.md", "huggingface_run.py"), tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^3 scored \[\d\.\d+\] tensor\(\[", done.stdout, flags=re.M), done.stdout
    ledger = Ledger(tmp_path / "runs/huggingface")
    assert ledger.values().count_rows() == 3 * 2 * 2 * 4 and all(check.ok for check in ledger.verify())


def _megatron_example(experts: bool) -> str:
    code = _blocks("library.md", "megatron_run.py")
    if experts:
        dense = code[code.index("config = TransformerConfig(") : code.index("engine, *_ =")]
        code = code.replace(dense, _blocks("library.md", "experts_model.py"))
        after = "def token_losses("
        code = code.replace(after, _blocks("library.md", "experts_engine.py") + f"\n\n{after}", 1)
    return (
        code
        + "\n    if layout.tp_rank == 0:\n        print('ALL', iteration, *result.values[:, 0].tolist())\n"
    )


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_the_megatron_example_has_the_same_values_on_one_rank_and_on_two(
    tmp_path: Path, experts: bool
) -> None:
    values = []
    for ranks in (1, 2):
        done = _run(_megatron_example(experts), tmp_path, ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        values.append(
            [
                [float(value) for value in line.split()[2:]]
                for line in done.stdout.splitlines()
                if "ALL" in line
            ]
        )
    one, two = values
    assert len(one) == 3 and all(len(row) == 8 and max(map(abs, row)) > 0 for row in one)
    for alone, parallel in zip(one, two, strict=True):
        assert parallel == pytest.approx(alone, abs=1e-3 * max(map(abs, alone)))


def test_a_layer_without_a_tap_is_named(tmp_path: Path) -> None:
    code = """
import torch
from inrun_megatron import attach_taps
attach_taps(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv1d(4, 4, 1)))
"""
    done = _run(code, tmp_path)
    assert done.returncode != 0
    assert "2 of 4 trainable parameters have no tap: 1.weight (Conv1d), 1.bias (Conv1d)" in done.stderr


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ds_configs" / "README.md"])


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub spells them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        to = page.parent / name if name else page
        assert to.exists(), f"{page} links to {target}"
        assert not anchor or anchor in _anchors(to), f"{page} links to {target}"


def test_commands_of_the_docs_exist() -> None:
    """The files that they name, and the flags of the benchmarks."""
    sources = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    sources["fidelity"] = (ROOT / "benchmarks" / "fidelity" / "__main__.py").read_text()
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"\btests/test_\w+\.py|\binrun_megatron/\w+(?:/\w+)*\.py", text):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
        for name, rest in re.findall(r"python -m benchmarks\.(\w+)((?: [^`#\n]+)?)", text):
            for flag in re.findall(r"--([a-z][a-z-]*)", rest.split("    ")[0]):
                known = rf"--{flag}\b|\b{flag.replace('-', '_')}: Annotated"
                assert re.search(known, sources[name]), f"{page.name}: benchmarks.{name} has no --{flag}"


def test_every_template_has_its_row_and_marked_lines() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text()
    templates = [
        path
        for path in (ROOT / "launch").rglob("*.*")
        if path.is_file() and "EDIT" in path.read_text(errors="replace")
    ]
    named = re.findall(r"^\| `(launch/\S+)` \|", page, flags=re.M)
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in templates)
