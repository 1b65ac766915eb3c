"""The command `inrun prepare`: what it prints, its errors, and a run that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.command_line import inrun
from tests.data_cases import jsonl, metadata


def test_json_and_words(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one", "source": "s", "url": "u"}, {"text": "two"}])
    command = ["prepare", path, "-o", tmp_path / "c", "--keep", "source,url", "--workers", "2"]
    result = inrun(*command, "--json")
    assert result.code == 0
    figures = result.json
    assert (figures["documents"], figures["tokens"], figures["tokenizer"]["vocab_size"]) == (2, 8, 257)
    assert metadata(tmp_path / "c")[0]["url"] == "u"
    result = inrun(*command, "--overwrite")
    assert result.code == 0
    assert "2 documents, 8 tokens" in result.out and "from 1 file, " in result.out


def test_errors_are_one_line(tmp_path: Path) -> None:
    result = inrun("prepare", tmp_path / "no", "-o", tmp_path / "c")
    assert result.code == 1
    assert result.err == f"inrun prepare: the input {tmp_path / 'no'} does not exist\n"
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    result = inrun("prepare", path, "-o", f"{tmp_path}/d/")
    assert result.code == 1
    assert f"is a directory and no PREFIX of files: give a path such as {tmp_path}/d/corpus" in result.err
    assert not (tmp_path / "d").exists()


def test_help_has_an_example() -> None:
    result = inrun("prepare", "--help")
    assert result.code == 0
    assert "Example: inrun prepare" in result.out


def test_interrupted_leaves_nothing(tmp_path: Path) -> None:
    """A run that is stopped while it writes leaves neither a dataset nor its temporary files."""
    fifo = tmp_path / "in.jsonl"
    os.mkfifo(fifo)
    out = tmp_path / "out"
    code = (
        # A shell starts background jobs with the interrupt ignored, and children inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import inrun_megatron.data.prepare as p\n"
        "p.find_inputs = lambda inputs, format: list(inputs)\n"  # a FIFO is no regular file
        f"p.prepare([{str(fifo)!r}], {str(out / 'c')!r}, format='jsonl')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        with open(fifo, "w") as writer:  # blocks until the reader is there
            writer.write(json.dumps({"text": "x" * (2 << 20)}) + "\n")
            writer.flush()
            deadline = time.monotonic() + 60
            while not list(out.glob(".c.*.tmp/bin")) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert list(out.glob(".c.*.tmp/bin")), "the control: it was writing"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.wait()
    assert os.listdir(out) == []
