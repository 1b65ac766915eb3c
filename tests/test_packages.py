"""The map in CONTRIBUTING.md is that of the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "inrun_megatron"


def _rows() -> list[tuple[set[str], set[str]]]:
    """(what a line of the map is about, what it imports): folders and files at the top."""
    found = []
    for first, last in re.findall(
        r"^\| (.+?) \| .+? \|(.*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M
    ):
        about, imports = (set(re.findall(r"`(\w+(?:/|\.py))`", cell)) for cell in (first, last))
        if about:
            found.append((about, imports))
    return found


def _imported(path: Path, package: Path = PACKAGE) -> set[str]:
    """Parts of `package` that a file imports anywhere, as folders and files at its top."""
    inside = ("inrun_megatron", *path.relative_to(PACKAGE).parts[:-1])
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules |= {f"{base}.{alias.name}" for alias in node.names}
    prefix = ".".join(("inrun_megatron", *package.relative_to(PACKAGE).parts, ""))
    names = {module.removeprefix(prefix).split(".")[0] for module in modules if module.startswith(prefix)}
    return {f"{name}/" if (package / name).is_dir() else f"{name}.py" for name in names}


def test_the_map_is_the_imports() -> None:
    rows = _rows()
    line = {part: number for number, (about, _) in enumerate(rows) for part in about}
    assert {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} <= line.keys()
    found: dict[int, set[int]] = {number: set() for number in range(len(rows))}
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"}:  # which names what users import
        own = path.relative_to(PACKAGE).parts[0]
        found[line[own if path.parent == PACKAGE else f"{own}/"]] |= {line[part] for part in _imported(path)}
    for number, (about, imports) in enumerate(rows):
        said = {line[part] for part in imports}
        assert found[number] - {0, number} == said, (
            f"{sorted(about)}: {sorted(found[number])} != {sorted(said)}"
        )


def test_reports_import_in_the_order_of_their_list() -> None:
    package = PACKAGE / "report"
    order = re.findall(r"^(\w+(?:/|\.py))  ", (package / "__init__.py").read_text(), flags=re.M)
    for path in set(package.rglob("*.py")) - {package / "__init__.py"}:
        own = path.relative_to(package).parts[0]
        own = own if path.parent == package else f"{own}/"
        above = set(order[: order.index(own)])
        assert _imported(path, package) - {own} <= above, f"{path.relative_to(package)}"


def test_the_commands_need_no_torch() -> None:
    code = "import sys, inrun_megatron.cli; print([name for name in ('torch', 'megatron', 'deepspeed') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_floors_are_the_versions_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {
        requirement.name: requirement.specifier
        for requirement in map(
            Requirement, project["dependencies"] + project["optional-dependencies"]["test"]
        )
    }
    for name in ("lowest", "newest"):
        lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
        pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert floors.keys() <= pinned.keys()
        assert all(specifier.contains(pinned[package]) for package, specifier in floors.items())
        if name == "lowest":
            wanted = {
                package: Version(str(specifier).removeprefix(">=")) for package, specifier in floors.items()
            }
            assert {package: Version(pinned[package]) for package in floors} == wanted
