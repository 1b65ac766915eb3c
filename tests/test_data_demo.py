"""The demo's corpus: real text, domains apart, targets held out, the same each time."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from inrun_megatron.data.indexed import IndexedFile

SCRIPT = Path(__file__).parents[1] / "launch/demo_corpus.py"
NAMES = ("code", "prose", "shuffled", "target_code", "target_prose")
SIZES = ["--train-bytes", "60000", "--target-bytes", "12000"]


def run(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--output", str(output), *SIZES, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_here(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> None:
    """In this process: without the seconds of importing torch again."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(output), *SIZES, *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "demo"
    result = run(output)
    assert result.returncode == 0, result.stderr
    return output


def records(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_sizes_and_metadata(corpus: Path) -> None:
    for name in NAMES:
        data, wanted = IndexedFile(corpus / name), 12000 if name.startswith("target") else 60000
        assert wanted <= data.num_tokens < wanted + 25000
        assert (
            data.num_documents
            == len(records(corpus, name))
            == len({r["source"] for r in records(corpus, name)})
        )


def test_targets_and_domains_are_apart(corpus: Path) -> None:
    modules = {name: {record["module"] for record in records(corpus, name)} for name in NAMES}
    apart = [
        ("code", "target_code"),
        ("prose", "target_prose"),
        ("code", "prose"),
        ("target_code", "target_prose"),
    ]
    for one, other in [*apart, ("code", "target_prose"), ("target_code", "prose")]:
        assert modules[one] and not modules[one] & modules[other], (one, other)
    assert len(modules["target_code"]) > 3
    paragraphs = [
        p
        for name in ("prose", "target_prose")
        for r in records(corpus, name)
        for p in r["text"].split("\n\n")
    ]
    assert len(set(map(str.strip, paragraphs))) == len(paragraphs)
    code = " ".join(
        " ".join(r["text"].split()) for name in ("code", "target_code") for r in records(corpus, name)
    )
    assert not [paragraph for paragraph in paragraphs if paragraph.strip() in code]


def test_prose_reads_as_english_and_code_does_not(corpus: Path) -> None:
    def the(name: str) -> float:
        words = [word for record in records(corpus, name) for word in record["text"].lower().split()]
        return sum(word in ("the", "of", "is", "to", "a") for word in words) / len(words)

    # code has comments and docstrings, so it has some English too
    assert min(the("prose"), the("target_prose")) > 1.5 * max(the("code"), the("target_code"))
    assert the("shuffled") < 0.25 * the("prose")


def test_shuffled_keeps_characters_only(corpus: Path) -> None:
    originals = {r["source"]: r["text"] for name in ("code", "prose") for r in records(corpus, name)}
    kinds: Counter[str] = Counter()
    for record in records(corpus, "shuffled"):
        kind, source = record["source"].removeprefix("shuffled ").split(": ", 1)
        kinds[kind] += 1
        assert Counter(record["text"]) == Counter(originals[source]) and record["text"] != originals[source]
    assert kinds["code"] > 3 and kinds["prose"] > 3


def test_repeats_and_reuses(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [corpus / f"{name}{suffix}" for name in NAMES for suffix in (".bin", ".idx", ".jsonl")]
    content = [path.read_bytes() for path in files]
    stamps = [path.stat().st_mtime_ns for path in files]
    run_here(monkeypatch, corpus)
    assert [path.stat().st_mtime_ns for path in files] == stamps, "what is there is kept"
    (corpus / "prose.bin").write_bytes(b"")
    run_here(monkeypatch, corpus)
    assert [path.read_bytes() for path in files] == content, "a damaged corpus is made again, the same"
    run_here(monkeypatch, tmp_path / "other", "--seed", "5")
    assert (tmp_path / "other/code.bin").read_bytes() != (corpus / "code.bin").read_bytes()


def test_bad_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="demo_corpus: --train-bytes and --target-bytes must be positive"):
        run_here(monkeypatch, tmp_path, "--train-bytes", "0")
