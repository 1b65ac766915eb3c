"""Training data: what an item is, its order, its cache, and what is refused."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, _get_ltor_masks_and_position_ids

from inrun_megatron.config import Config, DataConfig, ModelConfig, ShapleyConfig, TrainingConfig
from inrun_megatron.data import train as train_module
from inrun_megatron.data.blend import Blend, dataset_names, parse_blend, parse_split
from inrun_megatron.data.corpora import tiny_corpus, write_corpus
from inrun_megatron.data.identity import SampleResolver
from inrun_megatron.data.sampler import microbatch_indices
from inrun_megatron.data.tokenizers import ByteTokenizer, NullTokenizer, build_tokenizer, prepared_tokenizer
from inrun_megatron.errors import UserError
from inrun_megatron.models.attention import document_mask
from inrun_megatron.training.datasets import vocabulary
from tests.data_cases import build, check_identity, write_pair, write_tokenizer
from tests.distributed import Workers

PLAIN = {"tokens", "labels", "loss_mask", "position_ids", "dataset", "sample"}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return write_pair(tmp_path)


class TestItems:
    def test_same_as_gptdataset(self, pair: tuple[str, str]) -> None:
        flags = {"eod_mask_loss": True, "reset_position_ids": True}
        train, _ = build(pair[1], **flags)
        inner = train._dataset
        assert isinstance(inner, GPTDataset)
        for k in range(10):
            item = train[k]
            for name, tensor in inner[k].items():
                torch.testing.assert_close(item.pop(name), tensor, rtol=0, atol=0)
            assert {name: int(value) for name, value in item.items()} == {"dataset": 0, "sample": k}
        plain = build(pair[1])[0][0]
        assert set(plain) == PLAIN
        assert plain["loss_mask"].all() and plain["position_ids"].tolist() == list(range(32))
        assert not build(pair[1], eod_mask_loss=True)[0][0]["loss_mask"].all()
        assert (build(pair[1], reset_position_ids=True)[0][0]["position_ids"] == 0).sum() > 1

    def test_documents_give_megatrons_attention_mask(self, pair: tuple[str, str]) -> None:
        """GPTDataset's own mask for --reset-attention-mask, from the numbers of the documents."""
        train, _ = build(pair[1], reset_attention_mask=True)
        items = [train[k] for k in range(30)]
        assert all(set(item) == {*PLAIN, "documents"} for item in items)
        masks = document_mask(torch.stack([item["documents"] for item in items]))
        for item, mask in zip(items, masks, strict=True):
            theirs = _get_ltor_masks_and_position_ids(item["tokens"], 256, False, True, False, True)[0]
            assert torch.equal(mask, theirs)
        assert any(item["documents"][-1] > 1 for item in items), "the control: rows of several documents"

    def test_microbatch_types(self, pair: tuple[str, str]) -> None:
        train, _ = build("1", pair[0], "1", pair[1])
        batch = train.microbatch(range(3, 7))
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
        assert shapes == {
            **{name: ((4, 32), torch.int64) for name in ("tokens", "labels", "position_ids")},
            "loss_mask": ((4, 32), torch.float32),
            "dataset": ((4,), torch.int64),
            "sample": ((4,), torch.int64),
        }
        with pytest.raises(IndexError):
            train[len(train)]

    def test_sampler_deals_consecutive_samples(self) -> None:
        # 2 ranks, microbatches of 3, 2 accumulation steps: global batches of 12 consecutive samples
        stream: list[int] = []
        for consumed in range(0, 24, 6):
            for rank in range(2):
                stream += microbatch_indices(consumed, 3, rank, 2)
        assert stream == list(range(24))


class TestCache:
    def test_order_depends_on_the_seed_only(self, pair: tuple[str, str], tmp_path: Path) -> None:
        first, again, other = (
            build(pair[0], seed=seed, cache_dir=tmp_path / name)[0]
            for seed, name in ((1, "x"), (1, "y"), (2, "x"))
        )
        tokens = [torch.stack([part[k]["tokens"] for k in range(20)]) for part in (first, again, other)]
        assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])

    def test_prepared_again_under_the_same_name(self, tmp_path: Path) -> None:
        """megatron-core's cache key knows nothing of the content: with it alone the old indices would be read."""
        prefix = tiny_corpus(tmp_path / "c", documents=30)
        old, _ = build(prefix)
        tiny_corpus(prefix, documents=30, seed=5)
        new, _ = build(prefix)
        assert new.table[0].unique_description_hash == old.table[0].unique_description_hash
        assert new.table[0].cache_files != old.table[0].cache_files
        check_identity(new, SampleResolver(new.table))

    def test_half_written_cache_is_built_again(self, pair: tuple[str, str]) -> None:
        train, _ = build(pair[0])
        path = Path(train.table[0].cache_files["sample_index"])
        content = path.read_bytes()
        for broken in (content[:-8], content[:10], b""):
            path.write_bytes(broken)
            assert build(pair[0])[0].table == train.table
            assert path.read_bytes() == content

    def test_who_waits_for_another_runs_index_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with open(tmp_path / "lock", "w") as theirs:
            fcntl.flock(theirs, fcntl.LOCK_EX)
            builder = threading.Timer(0.5, fcntl.flock, (theirs, fcntl.LOCK_UN))
            builder.start()
            with train_module._cache_turn(tmp_path):
                assert f"waiting for {tmp_path}/lock: another run builds" in capsys.readouterr().err
            builder.join()
        with train_module._cache_turn(tmp_path):
            assert capsys.readouterr().err == ""

    def test_unwritable_cache(self, pair: tuple[str, str], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot be written .*--data-cache-path"):
            build(pair[0], cache_dir=tmp_path / "file")


class TestRefusals:
    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ([], "is empty"),
            (["0.5", "a", "b"], "must come in turn"),
            (["0.5", "a", "b", "0.5"], "must come in turn"),
            (["0.5", "a", "x", "b"], "must come in turn"),
            (["1", "2"], "must come in turn"),
            (["0", "a", "1", "b"], "weight 0 of a must be a positive number"),
            (["1", "a", "-1", "b"], "weight -1 of b"),
            (["nan", "a", "1", "b"], "weight nan of a"),
        ],
    )
    def test_data_path(self, items: list[str], message: str) -> None:
        with pytest.raises(UserError, match=message):
            parse_blend(items)

    def test_data_path_meanings(self) -> None:
        assert parse_blend(["a"]) == Blend(("a",), None)
        assert parse_blend(["a.bin", " b "]) == Blend(("a", "b"), None)
        assert parse_blend(["3", "a.idx", "1e1", "b"]) == Blend(("a", "b"), (3.0, 10.0))
        assert parse_blend(["0.3", "a"]) == Blend(("a",), None)
        assert dataset_names(["x/a", "y/a", "y/b", "y/b"]) == ["x/a", "y/a", "b", "b#2"]

    @pytest.mark.parametrize("split", ["", "a", "0,1", "1,2,3,4", "1,-1", "1e3,1", "0,0,0", "nan"])
    def test_split(self, split: str) -> None:
        with pytest.raises(UserError, match="--split"):
            parse_split(split)

    def test_split_meanings(self) -> None:
        assert parse_split("969,30,1") == pytest.approx((0.969, 0.03, 0.001))
        assert parse_split("1") == (1, 0, 0) and parse_split(" 3, 1") == (0.75, 0.25, 0)

    def test_missing_and_truncated(self, pair: tuple[str, str], tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nowhere.idx does not exist"):
            build("1", pair[0], "1", str(tmp_path / "nowhere"))
        with open(f"{pair[1]}.bin", "ab") as file:
            file.truncate(100)
        with pytest.raises(UserError, match=r"b.bin has 100 bytes where .*b.idx says \d+: it is truncated"):
            build(pair[0], pair[1])

    def test_vocabulary(self, pair: tuple[str, str], tmp_path: Path) -> None:
        class Other(ByteTokenizer):
            name, vocab_size, eod, sha256 = "other", 500, 499, "5" * 64

        with pytest.raises(
            UserError, match=r"prepared with the tokenizer 'bytes' \(257 tokens\), the run uses 'other'"
        ):
            build(pair[0], tokenizer=Other())
        with pytest.raises(UserError, match="token 256, outside the vocabulary of 256"):
            build(pair[0], tokenizer=NullTokenizer(256))
        assert len(build(pair[0], tokenizer=NullTokenizer(300, 256))[0]) >= 50
        assert prepared_tokenizer(pair).name == "bytes"
        Path(f"{pair[1]}.json").unlink()
        with pytest.raises(UserError, match=r"b.json does not exist"):
            prepared_tokenizer(pair)
        with pytest.raises(UserError, match=r"nowhere.idx does not exist"):
            prepared_tokenizer([str(tmp_path / "nowhere")])
        build("1", pair[0], "1", pair[1])  # the tokens are the vocabulary's, so it is usable

    def test_end_of_document(self, tmp_path: Path) -> None:
        """The run's is the data's, not the first that the tokenizer.json may mean."""
        path = write_tokenizer(tmp_path / "tokenizer.json")
        pad, end = (
            tiny_corpus(tmp_path / name, tokenizer=path, eod_token=token)
            for name, token in (("pad", "<pad>"), ("end", None))
        )

        def of_run(*prefixes: str, target: str) -> int:
            config = Config(
                model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
                data=DataConfig(
                    data_path=prefixes,
                    seq_length=8,
                    tokenizer_type="HuggingFaceTokenizer",
                    tokenizer_model=str(path),
                ),
                training=TrainingConfig(micro_batch_size=1, train_iters=1, lr=1.0),
                shapley=ShapleyConfig(target=(f"t={target}",)),
            )
            return vocabulary(config).eod

        elsewhere = tiny_corpus(tmp_path / "bytes")
        assert of_run(pad, target=pad) == of_run(elsewhere, target=pad) == 0
        assert of_run(end, target=end) == of_run(elsewhere, target=elsewhere) == 1
        for prefixes, target in (((pad, end), pad), ((pad,), end)):
            with pytest.raises(
                UserError, match=r"pad was prepared with .* token 0 and .*end with 1: prepare both"
            ):
                of_run(*prefixes, target=target)
        with pytest.raises(
            UserError, match=r"pad was prepared with .* token 0, the run uses 1: prepare all data"
        ):
            build(pad, tokenizer=build_tokenizer(path))
        assert build(pad, tokenizer=build_tokenizer(path, "<pad>"))

    def test_a_split_without_documents(self, tmp_path: Path) -> None:
        """Upstream would count epochs of no tokens for ever."""
        prefix = tiny_corpus(tmp_path / "c", documents=3)
        with pytest.raises(UserError, match=r"leaves 0 tokens of .* for valid: .* \(--eval-iters 0\)"):
            build(prefix, split="969,30,1", valid_samples=10)
        assert build(prefix, split="969,30,1")[1] is None, "no validation is asked for"
        assert build(prefix, split="1", valid_samples=10)[1] is None
        short = write_corpus(tmp_path / "d", ["abc"])
        with pytest.raises(UserError, match="fewer than one sample of 32"):
            build(prefix, short)
        assert len(build("9", prefix, "1", short, train_samples=100)[0]) >= 100

    def test_uneven_weights_of_many_datasets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Upstream fails on some such blends ("the blend oversamples"), while other ranks wait for the one that failed."""
        prefixes = [
            write_corpus(tmp_path / f"c{i}", [f"{i}" * 31]) for i in range(10)
        ]  # exactly as many samples as asked
        weights = [0.025, 0.185, 0.094, 0.0001, 0.0347, 0.0018, 0.0104, 0.0001, 0.0073, 0.6423]
        blend = [item for pair in zip(map(str, weights), prefixes, strict=True) for item in pair]
        for samples in (325, 320, 999):
            train, _ = build(*blend, train_samples=samples, seq_length=32, cache_dir=tmp_path / "cache")
            assert len(train) >= samples
            for k in range(len(train)):
                dataset, sample = train.locate(k)
                assert sample < train.table[dataset].samples
        monkeypatch.setattr(train_module, "choose_surplus", lambda *_: 0.005)
        with pytest.raises(IndexError, match="oversamples"):  # the control, with upstream's default
            build(*blend, train_samples=325, seq_length=32, cache_dir=tmp_path / "other")


def build_on_a_rank(rank: int, world: int, prefixes: list[str], cache: str, bad: str | None) -> Any:
    data_path = [bad] if bad else ["0.7", prefixes[0], "0.3", prefixes[1]]
    try:
        train, valid = build(*data_path, split="90,10", train_samples=60, valid_samples=8, cache_dir=cache)
    except UserError as error:
        return str(error)
    assert valid is not None
    return (
        [row.to_dict() for row in train.table],
        [train.locate(k) for k in range(60)],
        int(sum(train[k]["tokens"].sum() for k in range(60))),
        len(valid),
    )


def test_ranks(pair: tuple[str, str], tmp_path: Path) -> None:
    """Two ranks build what one process builds, and an error on rank 0 reaches both, after which they can go on."""
    cache, bad = str(tmp_path / "cache"), str(tmp_path / "no")
    with Workers(2) as workers:
        errors = workers.run(build_on_a_rank, list(pair), cache, bad, timeout=60)
        distributed = workers.run(build_on_a_rank, list(pair), cache, None, timeout=60)
    assert errors[0] == errors[1] and "no.idx does not exist" in errors[0]
    assert distributed[0] == distributed[1] == build_on_a_rank(0, 1, list(pair), cache, None)
    assert list((tmp_path / "cache").rglob("*BlendedDataset*")), "with ranks the blend is cached"
