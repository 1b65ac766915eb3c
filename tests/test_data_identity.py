"""From a sample back to its documents: exactly the tokens that the training item held."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from inrun_megatron.data import run_dataset
from inrun_megatron.data.corpora import tiny_corpus, write_corpus
from inrun_megatron.data.identity import SampleResolver
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.data.origin import origin_of
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import PIECE_BYTES, PIECES, digest_of
from tests.data_cases import build, check_identity, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return write_pair(tmp_path)


class TestIdentity:
    def test_several_epochs(self, pair: tuple[str, str]) -> None:
        train, _ = build(pair[1], train_samples=120, seq_length=32)
        resolver = SampleResolver([row.to_dict() for row in train.table])
        read = check_identity(train, resolver)
        per_epoch = IndexedFile(pair[1]).num_tokens / 32
        assert 120 / per_epoch > 3, "the control: several epochs"
        assert len(read) == 40 and min(read.values()) >= 3
        crossing = [k for k in range(120) if len(resolver.resolve(0, k)) > 2]
        assert crossing, "the control: samples of several documents"

    def test_blend_and_splits(self, pair: tuple[str, str]) -> None:
        train, valid = build(
            "0.75", pair[0], "0.25", pair[1], split="80,20,0", train_samples=200, valid_samples=40
        )
        assert valid is not None
        read = [
            check_identity(
                part, SampleResolver(json.loads(json.dumps([row.to_dict() for row in part.table])))
            )
            for part in (train, valid)
        ]
        assert not set(read[0]) & set(read[1]), "training and validation share no document"
        assert {index for index, _ in read[0]} == {index for index, _ in read[1]} == {0, 1}
        counts = Counter(train.locate(k)[0] for k in range(200))
        assert counts == {0: 150, 1: 50}
        assert [row.name for row in train.table] == ["a", "b"]
        assert [row.weight for row in train.table] == [0.75, 0.25]
        assert train.table[0].unique_description_hash != valid.table[0].unique_description_hash

    def test_plain_list_is_read_once(self, pair: tuple[str, str]) -> None:
        train, _ = build(*pair, train_samples=60)
        resolver = SampleResolver(train.table)
        check_identity(train, resolver)
        places = [train.locate(k) for k in range(len(train))]
        assert len(set(places)) == len(places) == 60
        with pytest.raises(
            UserError, match=r"hold \d+ training samples and the run asks for 5000: give weights"
        ):
            build(*pair, train_samples=5000)

    def test_control_a_wrong_index_is_noticed(self, pair: tuple[str, str]) -> None:
        train, _ = build(pair[0])
        resolver = SampleResolver(train.table)
        arrays = list(resolver._open(0)._index)
        arrays[2] = np.roll(arrays[2], 1)
        resolver._open(0).__dict__["_index"] = tuple(arrays)
        with pytest.raises(AssertionError):
            check_identity(train, resolver)

    def test_many_at_once(self, pair: tuple[str, str]) -> None:
        train, _ = build(pair[1], train_samples=100)
        resolver = SampleResolver(train.table)
        samples = np.array([5, 99, 0, 5])
        row, document, n_tokens = resolver.resolve_many(0, samples)
        expected = [(i, span) for i, k in enumerate(samples) for span in resolver.resolve(0, int(k))]
        assert row.tolist() == [i for i, _ in expected]
        assert document.tolist() == [span.document for _, span in expected]
        assert n_tokens.tolist() == [span.end - span.start for _, span in expected]
        assert np.bincount(row, weights=n_tokens).tolist() == [33.0] * 4
        assert all(len(array) == 0 for array in resolver.resolve_many(0, np.array([], np.int64)))

    def test_documents_of_several_sequences(self, tmp_path: Path) -> None:
        """Data as Megatron's preprocessing writes it with --split-sentences: several sequences in a document, empty ones."""
        builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.uint16)
        generator = np.random.default_rng(0)
        for lengths in ([5, 3, 9], [4], [], [7, 0, 11, 2], [30]):
            builder.add_document(generator.integers(0, 256, sum(lengths)), lengths)
        builder.finalize(str(tmp_path / "s.idx"))
        train, _ = build(str(tmp_path / "s"), seq_length=6, train_samples=40)
        resolver = SampleResolver(train.table)
        read = check_identity(train, resolver)
        assert set(read) == {(0, 0), (0, 1), (0, 3), (0, 4)}
        assert train.table[0].documents == 5
        assert resolver.document_metadata(0, 3) == {
            "document": 3,
            "source": str(tmp_path / "s"),
            "tokens": 20,
        }
        assert resolver.document_text(0, 3) is None and resolver.documents(0) is None

    def test_metadata_and_text(self, pair: tuple[str, str]) -> None:
        train, _ = build(pair[0])
        resolver = SampleResolver(train.table)
        record = json.loads(Path(f"{pair[0]}.jsonl").read_text().splitlines()[4])
        metadata = resolver.document_metadata(0, 4)
        assert metadata == {
            "document": 4,
            "source": "a/4",
            "file": f"{pair[0]}.jsonl",
            "line": 5,
            "tokens": len(record["text"]) + 1,
            "domain": "a",
        }
        assert resolver.document_text(0, 4) == record["text"]
        assert resolver.document_text(0, 4, 2, 9) == record["text"][2:9]
        table = resolver.documents(0)
        assert table is not None and table.num_rows == 20
        with pytest.raises(UserError, match="documents 0 to 19, not 20"):
            resolver.document_metadata(0, 20)
        with pytest.raises(UserError, match=r"samples 0 to \d+, not 100000"):
            resolver.resolve(0, 100000)
        with pytest.raises(UserError, match=r"datasets \[0\], not 3"):
            resolver.resolve(3, 0)

    def test_cache_lost_or_damaged(self, pair: tuple[str, str]) -> None:
        train, valid = build("2", pair[0], "1", pair[1], split="70,30", train_samples=150, valid_samples=20)
        assert valid is not None
        expected = [
            [SampleResolver(part.table).resolve(d, s) for d, s in map(part.locate, range(20))]
            for part in (train, valid)
        ]
        shuffle = Path(train.table[1].cache_files["shuffle_index"])
        shuffle.write_bytes(shuffle.read_bytes()[:-5])
        Path(valid.table[0].cache_files["document_index"]).unlink()
        np.save(
            train.table[0].cache_files["shuffle_index"], np.arange(train.table[0].samples, dtype=np.uint32)
        )
        for part, spans in zip((train, valid), expected, strict=True):
            resolver = SampleResolver(part.table)
            assert [resolver.resolve(d, s) for d, s in map(part.locate, range(20))] == spans

    def test_damaged_documents_are_named(self, pair: tuple[str, str]) -> None:
        path = Path(f"{pair[0]}.documents.parquet")
        path.write_bytes(path.read_bytes()[:-20])
        train, _ = build(pair[0])
        with pytest.raises(UserError, match=f"{path} cannot be read: .*; restore it from a copy"):
            SampleResolver(train.table).document_metadata(0, 1)

    def test_a_row_that_is_not_whole_says_what_it_lacks(self, pair: tuple[str, str]) -> None:
        row = build(pair[0])[0].table[0].to_dict()
        for name, lost in (("cache_files", "sample_index"), ("description", "split_matrix")):
            cut = row | {name: {key: value for key, value in row[name].items() if key != lost}}
            for damaged, what in ((cut, f"{name}.{lost}"), (row | {name: None}, f"{name}.{lost}")):
                with pytest.raises(UserError, match=f"run.json says no .*{what}.* of dataset a"):
                    SampleResolver([damaged]).resolve(0, 1)

    def test_a_file_of_the_name_that_curation_uses_is_nobody_s_origin(self, pair: tuple[str, str]) -> None:
        (Path(pair[0]).parent / "curation.json").write_text('{"curator": "somebody else"}')
        assert origin_of(IndexedFile(pair[0]), "x").numbers is None

    def test_changed_data_is_refused(self, pair: tuple[str, str], tmp_path: Path) -> None:
        train, _ = build(pair[0])
        spans = SampleResolver(train.table).resolve(0, 3)
        for path in Path(pair[0]).parent.glob("a.*"):
            (tmp_path / "moved").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "moved" / path.name)
        tiny_corpus(pair[0], documents=20, seed=1, domain="a")
        with pytest.raises(UserError, match="is not the file that the run read"):
            SampleResolver(train.table).resolve(0, 3)
        assert SampleResolver(train.table, {0: tmp_path / "moved/a"}).resolve(0, 3) == spans

    def test_other_text_of_the_same_lengths_is_refused(self, tmp_path: Path) -> None:
        """The .idx holds lengths alone."""
        prefix = write_corpus(tmp_path / "a", ["abcd " * 30, "efgh " * 20])
        train, _ = build(prefix, train_samples=3)
        index = Path(f"{prefix}.idx").read_bytes()
        write_corpus(prefix, ["ABCD " * 30, "efgh " * 20])
        assert Path(f"{prefix}.idx").read_bytes() == index
        with pytest.raises(UserError, match=r"a.bin does not hold the text that the run read"):
            SampleResolver(train.table).resolve(0, 1)
        older = [{key: value for key, value in train.table[0].to_dict().items() if key != "bin_digest"}]
        SampleResolver(older).resolve(0, 1)


def test_a_digest_of_pieces_sees_all_of_a_small_file_and_both_ends_of_a_large_one(tmp_path: Path) -> None:
    file, content = tmp_path / "x.bin", bytearray(PIECES * PIECE_BYTES)
    seen = set()
    for extra in (0, 5):  # beyond 4 MiB only pieces are read
        content += bytes(extra)
        for place in (None, 0, len(content) - 1):
            changed = bytearray(content)
            if place is not None:
                changed[place] = 1
            file.write_bytes(changed)
            seen.add(digest_of(file))
    assert len(seen) == 6


def test_canary_upstream_names() -> None:
    """What `run_dataset` and `train` rely on in megatron-core: its index arrays and the files they are cached in."""
    assert run_dataset.INDEX_NAMES == ("document_index", "sample_index", "shuffle_index")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig

    assert isinstance(BlendedMegatronDatasetBuilder.__dict__["build_generic_dataset"], staticmethod)
    assert BlendedMegatronDatasetConfig.mid_level_dataset_surplus == 0.005


def test_canary_cache_files(pair: tuple[str, str]) -> None:
    train, valid = build("1", pair[0], "1", pair[1], split="80,20", valid_samples=5)
    assert valid is not None
    for row in (*train.table, *valid.table):
        assert all(Path(path).is_file() for path in row.cache_files.values())
