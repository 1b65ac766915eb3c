"""inrun prepare: what it reads, what it writes, and what it refuses."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers

from inrun_megatron.data.corpora import tiny_corpus, write_corpus
from inrun_megatron.data.documents import read_summary
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.data.prepare import prepare
from inrun_megatron.data.tokenizers import ByteTokenizer, build_tokenizer, build_tokenizer_from
from inrun_megatron.errors import UserError
from tests.command_line import inrun
from tests.data_cases import write_tokenizer

TEXTS = ["Hello world.\n", "naïve café — 漢字 🙂", "a\n\nb\r\nc\ttab", "x" * 5000]


def rows(prefix: str | Path) -> list[dict]:
    return pq.read_table(f"{prefix}.documents.parquet").to_pylist()


def texts(prefix: str | Path) -> list[str]:
    """The documents as megatron-core reads them, decoded; each must end with the end-of-document token."""
    data = IndexedDataset(str(prefix))
    assert all(data[i][-1] == 256 for i in range(len(data)))
    return [ByteTokenizer().decode(data[i]) for i in range(len(data))]


def jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


class TestReading:
    def test_text_files_and_directories(self, tmp_path: Path) -> None:
        (tmp_path / "in/deep").mkdir(parents=True)
        (tmp_path / "in/b.txt").write_text(TEXTS[1], encoding="utf-8")
        (tmp_path / "in/a.md").write_bytes(TEXTS[2].encode())
        with gzip.open(tmp_path / "in/deep/c.txt.gz", "wt", encoding="utf-8") as file:
            file.write(TEXTS[0])
        (tmp_path / "in/.hidden.txt").write_text("no")
        (tmp_path / "in/program.py").write_text("no")
        (tmp_path / "in/empty.txt").write_text("")
        summary = prepare([tmp_path / "in"], tmp_path / "out/c")
        assert texts(tmp_path / "out/c") == [TEXTS[2], TEXTS[1], TEXTS[0]]
        assert (summary.documents, summary.empty, summary.files) == (3, 1, 4)
        assert summary.tokens == sum(len(t.encode()) + 1 for t in TEXTS[:3])
        assert [row["file"] for row in rows(tmp_path / "out/c")] == [
            str(tmp_path / "in" / name) for name in ("a.md", "b.txt", "deep/c.txt.gz")
        ]
        # a glob names anything; a file that two inputs name counts once
        prepare([str(tmp_path / "in/**/*.py"), tmp_path / "in/program.py"], tmp_path / "out/py")
        assert texts(tmp_path / "out/py") == ["no"]

    def test_jsonl_keeps_fields(self, tmp_path: Path) -> None:
        records = [
            {"body": "one", "source": "web", "score": 1, "tags": ["a"], "mixed": 1, "big": 2**70, "ok": True},
            {"body": ""},
            {"body": "two", "url": "http://x", "score": 2.5, "mixed": "m", "ok": None},
            {"body": None},
        ]
        path = jsonl(tmp_path / "a.jsonl", records)
        path.write_text(path.read_text() + "\n  \n")  # blank lines at the end
        summary = prepare(
            [path],
            tmp_path / "c",
            text_field="body",
            keep=["source", "url", "score", "tags", "mixed", "big", "ok"],
        )
        assert summary.empty == 2 and texts(tmp_path / "c") == ["one", "two"]
        first, second = rows(tmp_path / "c")
        assert first == {
            "document": 0,
            "source": "web",
            "file": str(path),
            "line": 1,
            "tokens": 4,
            "url": None,
            "score": 1.0,
            "tags": '["a"]',
            "mixed": "1",
            "big": str(2**70),
            "ok": True,
        }
        assert (second["source"], second["line"], second["score"], second["mixed"]) == (
            str(path),
            3,
            2.5,
            '"m"',
        )

    def test_parquet(self, tmp_path: Path) -> None:
        day = datetime.date(2024, 1, 2)
        table = pa.table({"text": ["one", None, "three"], "n": [1, 2, 3], "day": [day] * 3})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        prepare([tmp_path / "a.parquet"], tmp_path / "c", keep=["n", "day"])
        assert texts(tmp_path / "c") == ["one", "three"]
        assert [(r["line"], r["n"], r["day"]) for r in rows(tmp_path / "c")] == [
            (1, 1, "2024-01-02"),
            (3, 3, "2024-01-02"),
        ]

    def test_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo")
        prepare([tmp_path / "a.txt"], tmp_path / "c", format="lines")
        assert texts(tmp_path / "c") == ["one", "two"]
        assert [row["line"] for row in rows(tmp_path / "c")] == [1, 3]

    def test_workers_change_nothing(self, tmp_path: Path, tokenizer_json: Path) -> None:
        generator = random.Random(0)
        records = [{"text": "the cat " * generator.randint(1, 300), "i": i} for i in range(3000)]
        path = jsonl(tmp_path / "a.jsonl", records)  # several pieces of 1 MiB
        assert path.stat().st_size > 3 << 20
        (tmp_path / "b.txt").write_text("the dog")
        results = []
        for workers in (1, 3):
            out = tmp_path / f"c{workers}"
            prepare([path, tmp_path / "b.txt"], out, tokenizer=tokenizer_json, keep=["i"], workers=workers)
            results.append(
                [Path(f"{out}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".documents.parquet")]
            )
        assert results[0] == results[1]
        assert [row["i"] for row in rows(tmp_path / "c3")] == [*range(3000), None]

    def test_hugging_face_tokenizer(self, tmp_path: Path, tokenizer_json: Path) -> None:
        tokenizer = build_tokenizer(tokenizer_json.parent)  # the directory will do
        prefix = write_corpus(tmp_path / "c", TEXTS, tokenizer=tokenizer_json)
        data = IndexedDataset(prefix)
        assert [tokenizer.decode(data[i]) for i in range(len(data))] == TEXTS
        assert all(data[i][-1] == tokenizer.eod == 1 for i in range(len(data)))
        record = read_summary(prefix)["tokenizer"]
        assert build_tokenizer_from(record).unique_identifiers == tokenizer.unique_identifiers
        with pytest.raises(UserError, match="has changed since"):
            build_tokenizer_from({**record, "sha256": "0" * 64})
        assert build_tokenizer(tokenizer_json, "<pad>").eod == 0

    def test_large_vocabulary_uses_int32(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer(
            models.WordLevel({f"w{i}": i for i in range(70000)} | {"</s>": 70000}, unk_token="w0")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "big.json"))
        prefix = write_corpus(tmp_path / "c", ["w1 w69999 w5"], tokenizer=tmp_path / "big.json")
        assert IndexedFile(prefix).document(0).tolist() == [1, 69999, 5, 70000]
        assert IndexedFile(prefix).dtype == np.int32

    def test_reader_agrees_with_megatron(self, tmp_path: Path) -> None:
        prefix = tiny_corpus(tmp_path / "c", documents=12)
        ours, theirs = IndexedFile(prefix), IndexedDataset(prefix)
        assert ours.num_documents == len(theirs) == 12 and ours.one_sequence_per_document
        for i in range(12):
            np.testing.assert_array_equal(ours.document(i), theirs[i])
            np.testing.assert_array_equal(ours.sequence(i, 3, 7), theirs.get(i, 3, 4))


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            ('{"text": "a"}\n{"text": 1}\n', {}, r"a.jsonl:2: field 'text' holds a int"),
            ('{"text": "a"}\n\n{"txt": "b"}\n', {}, r"a.jsonl:3: no field 'text' \(the record has 'txt'\)"),
            ('{"text": "a"}\n{"text": \n', {}, r"a.jsonl:2: invalid JSON"),
            ("[1]\n", {}, r"a.jsonl:1: a JSON list"),
            ('{"text": "a"}\n', {"keep": ["langage"]}, r"no record has a value for the field 'langage'"),
            ('{"text": "a", "line": 3}\n', {"keep": ["line"]}, r"--metadata-fields line"),
            ('{"text": ""}\n', {}, r"holds no text"),
            ("", {}, r"holds no text"),
            ('{"text": "a\\ud800"}\n', {}, r"a.jsonl:1: the text has half of a surrogate pair"),
            (
                '{"text": "a", "url": ["b\\udc00"]}\n',
                {"keep": ["url"]},
                r"a.jsonl:1: field 'url' has half of a surrogate pair: repair it, or give --replace-invalid",
            ),
            (
                f'{{"text": "a", "n": {"1" * 5000}}}\n',
                {},
                r"a.jsonl:1: an integer has more than 4300 digits: write it as a string, or leave it out",
            ),
            ('{"text": "a"}\n', {"tokenizer": "nowhere.json"}, r"'nowhere.json' is neither"),
            ('{"text": "a"}\n', {"format": "csv"}, r"the format 'csv' is not known"),
            ('{"text": "a"}\n', {"eod_token": "</s>"}, r"--eod-token '</s>' has no effect"),
        ],
    )
    @pytest.mark.parametrize("workers", [1, 2])
    def test_jsonl(self, tmp_path: Path, content: str, options: dict, message: str, workers: int) -> None:
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            prepare([tmp_path / "a.jsonl"], tmp_path / "out", workers=workers, **options)
        assert os.listdir(tmp_path) == ["a.jsonl"], "nothing may be left behind"

    def test_paths(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        for bad in ("in", "in/missing.txt", "in/*.txt"):
            with pytest.raises(UserError, match=r"holds no file|does not exist|no file matches"):
                prepare([tmp_path / bad], tmp_path / "out")
        (tmp_path / "in/a.txt").write_bytes(b"ok\n\xff")
        with pytest.raises(UserError, match=r"a.txt:2: byte 0xff is not UTF-8"):
            prepare([tmp_path / "in"], tmp_path / "out")
        prepare([tmp_path / "in"], tmp_path / "out", replace_invalid=True)
        assert texts(tmp_path / "out") == ["ok\n\ufffd"]
        half = '{"text": "a\\ud800", "source": "b\\ud800", "tags": {"c\\ud800": 1}}\n'
        (tmp_path / "half.jsonl").write_text(half)
        keep = ["source", "tags"]
        prepare([tmp_path / "half.jsonl"], tmp_path / "out3", keep=keep, replace_invalid=True)
        assert texts(tmp_path / "out3") == ["a?"]
        assert [(row["source"], row["tags"]) for row in rows(tmp_path / "out3")] == [("b?", '{"c?": 1}')]
        with pytest.raises(UserError, match="text files have no fields"):
            prepare([tmp_path / "in"], tmp_path / "out2", keep=["url"])
        (tmp_path / "in/b.txt.gz").write_bytes(gzip.compress(b"x" * 9999)[:-20])
        with pytest.raises(UserError, match=r"b.txt.gz is a truncated or damaged gzip"):
            prepare([tmp_path / "in/b.txt.gz"], tmp_path / "out2")
        damaged = bytearray(gzip.compress(b'{"text": "x"}\n' * 999))
        damaged[12:40] = bytes(255 - byte for byte in damaged[12:40])
        for name in ("damaged.txt.gz", "damaged.jsonl.gz"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name} is a truncated or damaged gzip"):
                prepare([tmp_path / name], tmp_path / "out2")
        (tmp_path / "names").mkdir()
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/names/caf\xe9.txt")).write_text("hello")
        with pytest.raises(UserError, match="caf\ufffd\\.txt is not UTF-8: rename the file"):
            prepare([tmp_path / "names"], tmp_path / "out2")
        (tmp_path / "in/c.jsonl.gz").write_bytes(b"no gzip")
        with pytest.raises(UserError, match=r"c.jsonl.gz cannot be read"):
            prepare([tmp_path / "in/c.jsonl.gz"], tmp_path / "out2")
        (tmp_path / "in/d.parquet").write_bytes(b"no parquet")
        with pytest.raises(UserError, match=r"d.parquet is no Parquet file"):
            prepare([tmp_path / "in/d.parquet"], tmp_path / "out2")
        pq.write_table(pa.table({"n": [1]}), tmp_path / "in/e.parquet")
        with pytest.raises(UserError, match=r"has no column 'text' \(--text-field\); its columns are n"):
            prepare([tmp_path / "in/e.parquet"], tmp_path / "out2")
        with pytest.raises(UserError, match=r"column 'n' of .* holds int64, not text"):
            prepare([tmp_path / "in/e.parquet"], tmp_path / "out2", text_field="n")

    def test_existing_output(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("first")
        prepare([tmp_path / "a.txt"], tmp_path / "c")
        (tmp_path / "a.txt").write_text("second")
        with pytest.raises(UserError, match="--overwrite"):
            prepare([tmp_path / "a.txt"], tmp_path / "c")
        assert texts(tmp_path / "c") == ["first"]
        prepare([tmp_path / "a.txt"], tmp_path / "c.bin", overwrite=True)  # the suffix is taken off
        assert texts(tmp_path / "c") == ["second"]
        jsonl(tmp_path / "d.json", [{"text": "x"}])
        with pytest.raises(UserError, match="would overwrite the input"):
            prepare([tmp_path / "d.json"], tmp_path / "d", overwrite=True)

    def test_failed_overwrite_keeps_the_old_dataset(self, tmp_path: Path) -> None:
        prefix = write_corpus(tmp_path / "c", ["old"])
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        path = jsonl(tmp_path / "d.jsonl", [{"text": "new"}, {"txt": ""}])
        with pytest.raises(UserError):
            prepare([path], prefix, overwrite=True)
        path.unlink()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_bad_tokenizer_files(self, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_text('{"no": "tokenizer"}')
        with pytest.raises(UserError, match=r"is no Hugging Face tokenizer\.json"):
            build_tokenizer(tmp_path / "t.json")
        Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "u.json"))
        with pytest.raises(UserError, match="--eod-token"):
            build_tokenizer(tmp_path / "u.json")
        assert build_tokenizer(tmp_path / "u.json", "b").eod == 1

    def test_damaged_pairs(self, tmp_path: Path) -> None:
        prefix = Path(tiny_corpus(tmp_path / "c", documents=5))
        idx, binary = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        good_idx, good_bin = idx.read_bytes(), binary.read_bytes()
        cases = [
            (idx, good_idx[:-1], "is truncated or damaged"),
            (idx, b"x" * 50, "is no Megatron index"),
            (idx, b"", "is no Megatron index"),
            (binary, good_bin[:-2], "it is truncated"),
            (binary, good_bin + b"xx", "not of one pair"),
        ]
        for path, content, message in cases:
            original = path.read_bytes()
            path.write_bytes(content)
            with pytest.raises(UserError, match=message):
                IndexedFile(prefix)
            path.write_bytes(original)
        IndexedFile(prefix)  # whole again
        binary.unlink()
        with pytest.raises(UserError, match=r"c.bin does not exist"):
            IndexedFile(prefix)


class TestCommand:
    def test_json_and_words(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "a.jsonl", [{"text": "one", "source": "s", "url": "u"}, {"text": "two"}])
        command = ["prepare", path, "-o", tmp_path / "c", "--keep", "source,url", "--workers", "2"]
        result = inrun(*command, "--json")
        assert result.code == 0
        figures = result.json
        assert (figures["documents"], figures["tokens"], figures["tokenizer"]["vocab_size"]) == (2, 8, 257)
        assert rows(tmp_path / "c")[0]["url"] == "u"
        result = inrun(*command, "--overwrite")
        assert result.code == 0
        assert "2 documents, 8 tokens" in result.out and "from 1 file, " in result.out

    def test_errors_are_one_line(self, tmp_path: Path) -> None:
        result = inrun("prepare", tmp_path / "no", "-o", tmp_path / "c")
        assert result.code == 1
        assert result.err == f"inrun prepare: the input {tmp_path / 'no'} does not exist\n"
        path = jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
        result = inrun("prepare", path, "-o", f"{tmp_path}/d/")
        assert result.code == 1
        assert f"is a directory and no PREFIX of files: give a path such as {tmp_path}/d/corpus" in result.err
        assert not (tmp_path / "d").exists()

    def test_help_has_an_example(self) -> None:
        result = inrun("prepare", "--help")
        assert result.code == 0
        assert "Example: inrun prepare" in result.out

    def test_interrupted_leaves_nothing(self, tmp_path: Path) -> None:
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
