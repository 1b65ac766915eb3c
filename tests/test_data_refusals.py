"""inrun prepare: input, tokenizers and datasets that it refuses, and that nothing is left behind."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from inrun_megatron.data.corpora import tiny_corpus, write_corpus
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.data.prepare import prepare
from inrun_megatron.data.tokenizers import build_tokenizer
from inrun_megatron.errors import UserError
from tests.data_cases import decoded, jsonl, metadata


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
def test_records_of_jsonl(tmp_path: Path, content: str, options: dict, message: str, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", workers=workers, **options)
    assert os.listdir(tmp_path) == ["a.jsonl"], "nothing may be left behind"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("in", "holds no file"),
        ("in/missing.txt", "does not exist"),
        ("in/*.txt", "no file matches"),
    ],
)
def test_paths_of_no_file(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / path], tmp_path / "out")


def test_text_that_is_not_utf8_and_what_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok\n\xff")
    with pytest.raises(UserError, match=r"a.txt:2: byte 0xff is not UTF-8"):
        prepare([tmp_path / "a.txt"], tmp_path / "out")
    prepare([tmp_path / "a.txt"], tmp_path / "out", replace_invalid=True)
    assert decoded(tmp_path / "out") == ["ok\n\ufffd"]
    half = '{"text": "a\\ud800", "source": "b\\ud800", "tags": {"c\\ud800": 1}}\n'
    (tmp_path / "half.jsonl").write_text(half)
    prepare([tmp_path / "half.jsonl"], tmp_path / "half", keep=["source", "tags"], replace_invalid=True)
    assert decoded(tmp_path / "half") == ["a?"]
    assert [(row["source"], row["tags"]) for row in metadata(tmp_path / "half")] == [("b?", '{"c?": 1}')]


def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "names").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/names/caf\xe9.txt")).write_text("hello")
    with pytest.raises(UserError, match="caf\ufffd\\.txt is not UTF-8: rename the file"):
        prepare([tmp_path / "names"], tmp_path / "out")


def test_damaged_gzip(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(b'{"text": "x"}\n' * 999))
    damaged[12:40] = bytes(255 - byte for byte in damaged[12:40])
    for name, content, message in (
        ("cut.txt.gz", gzip.compress(b"x" * 9999)[:-20], "is a truncated or damaged gzip"),
        ("damaged.txt.gz", damaged, "is a truncated or damaged gzip"),
        ("damaged.jsonl.gz", damaged, "is a truncated or damaged gzip"),
        ("none.jsonl.gz", b"no gzip", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} {message}"):
            prepare([tmp_path / name], tmp_path / "out")


def test_parquet_without_texts(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"d.parquet is no Parquet file"):
        prepare([tmp_path / "d.parquet"], tmp_path / "out")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"has no column 'text' \(--text-field\); its columns are n"):
        prepare([tmp_path / "e.parquet"], tmp_path / "out")
    with pytest.raises(UserError, match=r"column 'n' of .* holds int64, not text"):
        prepare([tmp_path / "e.parquet"], tmp_path / "out", text_field="n")


def test_fields_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="text files have no fields"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", keep=["url"])


def test_existing_output(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    prepare([tmp_path / "a.txt"], tmp_path / "c")
    (tmp_path / "a.txt").write_text("second")
    with pytest.raises(UserError, match="--overwrite"):
        prepare([tmp_path / "a.txt"], tmp_path / "c")
    assert decoded(tmp_path / "c") == ["first"]
    prepare([tmp_path / "a.txt"], tmp_path / "c.bin", overwrite=True)  # the suffix is taken off
    assert decoded(tmp_path / "c") == ["second"]
    jsonl(tmp_path / "d.json", [{"text": "x"}])
    with pytest.raises(UserError, match="would overwrite the input"):
        prepare([tmp_path / "d.json"], tmp_path / "d", overwrite=True)


def test_failed_overwrite_keeps_the_old_dataset(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", ["old"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    path = jsonl(tmp_path / "d.jsonl", [{"text": "new"}, {"txt": ""}])
    with pytest.raises(UserError):
        prepare([path], prefix, overwrite=True)
    path.unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_tokenizer_files(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"no": "tokenizer"}')
    with pytest.raises(UserError, match=r"is no Hugging Face tokenizer\.json"):
        build_tokenizer(tmp_path / "t.json")
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "u.json"))
    with pytest.raises(UserError, match="--eod-token"):
        build_tokenizer(tmp_path / "u.json")
    assert build_tokenizer(tmp_path / "u.json", "b").eod == 1


def test_damaged_pairs(tmp_path: Path) -> None:
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
