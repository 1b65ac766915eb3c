"""Validation targets: parsing, cutting, sharing over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inrun_megatron.data.corpora import tiny_corpus, write_corpus
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.data.megatron import document_ids
from inrun_megatron.data.targets import Target, TargetSpec, load_target, parse_target, parse_targets
from inrun_megatron.data.tokenizers import ByteTokenizer, NullTokenizer, build_tokenizer
from inrun_megatron.data.train import build_datasets
from inrun_megatron.errors import UserError
from tests.data_cases import write_tokenizer


def load(prefix: str | Path, count: int | None = None, **options) -> Target:
    settings = {"seq_length": 32, "tokenizer": ByteTokenizer(), "eod_mask_loss": False, **options}
    return load_target(TargetSpec("t", str(prefix), count), **settings)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("code=data/val", TargetSpec("code", "data/val")),
        ("code=data/val:16", TargetSpec("code", "data/val", 16)),
        ("c.o-d_e=/a:b/c.bin", TargetSpec("c.o-d_e", "/a:b/c")),
        ("code=a=b.idx:3", TargetSpec("code", "a=b", 3)),
    ],
)
def test_parse(text: str, spec: TargetSpec) -> None:
    assert parse_target(text) == spec


@pytest.mark.parametrize(
    "text", ["code", "=x", "code=", "a b=x", "code=x:0", "code=x:-1", "code=x:", "code=:3", "code=x:9z"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UserError, match="--shapley-target"):
        parse_target(text)


def test_names_are_unique() -> None:
    assert [spec.name for spec in parse_targets(["a=x", "b=x"])] == ["a", "b"]
    with pytest.raises(UserError, match="a is given twice"):
        parse_targets(["a=x", "b=x", "a=y"])


def test_every_token_is_a_label_once(tmp_path: Path) -> None:
    prefix = tiny_corpus(tmp_path / "c", documents=9)
    stream = np.concatenate([IndexedFile(prefix).document(i) for i in range(9)])
    target = load(prefix)
    n = (len(stream) - 1) // 32
    assert target.tokens.shape == (n, 33) and target.loss_mask.shape == target.position_ids.shape == (n, 32)
    np.testing.assert_array_equal(target.tokens[:, 1:].reshape(-1), stream[1 : 1 + 32 * n])
    np.testing.assert_array_equal(target.tokens[:, 0], stream[: 32 * n : 32])
    assert target.num_tokens == 32 * n == target.description["loss_tokens"]
    assert target.description["sequences"] == target.description["available"] == n


def test_other_text_of_the_same_lengths_is_another_target(tmp_path: Path) -> None:
    one, other = (
        load(write_corpus(tmp_path / name, [text * 40])).description
        for name, text in (("a", "ab "), ("b", "ba "))
    )
    assert one["idx_sha256"] == other["idx_sha256"] and one["tokens_sha256"] != other["tokens_sha256"]


def test_some_sequences_are_spread_over_the_file(tmp_path: Path) -> None:
    prefix = tiny_corpus(tmp_path / "c", documents=9)
    every, some = load(prefix), load(prefix, 5)
    chosen = [i * len(every.tokens) // 5 for i in range(5)]
    assert chosen[-1] > len(every.tokens) // 2
    torch.testing.assert_close(some.tokens, every.tokens[chosen], rtol=0, atol=0)


def test_masks_and_positions_are_those_of_training_data(tmp_path: Path) -> None:
    """The same text as a target and as training data: each sequence that both have carries the same mask and positions."""
    prefix = write_corpus(tmp_path / "c", ["ab", "cde", "f", "ghijklmnopq" * 4])
    flags: dict[str, Any] = {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    target = load(prefix, seq_length=8, **flags)
    train, _ = build_datasets(
        data_path=[prefix],
        split="1",
        seq_length=8,
        train_samples=200,
        valid_samples=0,
        seed=1,
        tokenizer=ByteTokenizer(),
        **flags,
    )
    known = {tuple(row[:-1].tolist()): i for i, row in enumerate(target.tokens)}
    items = (train[n] for n in range(len(train)))
    shared = [(item, known[key]) for item in items if (key := tuple(item["tokens"].tolist())) in known]
    assert target.documents is not None
    assert any((item["loss_mask"] == 0).any() for item, _ in shared), (
        "the control: an end of document is among them"
    )
    for item, i in shared:
        torch.testing.assert_close(item["loss_mask"], target.loss_mask[i], rtol=0, atol=0)
        torch.testing.assert_close(item["position_ids"], target.position_ids[i], rtol=0, atol=0)
        torch.testing.assert_close(item["documents"], target.documents[i], rtol=0, atol=0)
    first = target.tokens[0, :-1]
    assert ((first == 256) == (target.loss_mask[0] == 0)).all()
    assert target.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert target.documents[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    share = target.microbatches(2, rank=1, world=3)
    assert all(torch.equal(m["documents"], document_ids(m["tokens"], 256)) for m in share)
    assert "documents" not in load(prefix, seq_length=8).microbatches(2)[0]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("size", [1, 2, 4, 16])
@pytest.mark.parametrize("full_size", [False, True])
def test_ranks_share_all_sequences(tmp_path: Path, world: int, size: int, full_size: bool) -> None:
    prefix = write_corpus(tmp_path / "c", [bytes(range(32, 127)).decode() * 4])
    target = load(prefix, 11)
    shares = [target.microbatches(size, rank, world, full_size=full_size) for rank in range(world)]
    shapes = {tuple(batch["tokens"].shape) for share in shares for batch in share}
    assert len({len(share) for share in shares}) == 1 and len(shapes) == 1
    rows = shapes.pop()[0]
    assert rows == size if full_size else rows <= size
    if not full_size:  # fewer filling rows than one per microbatch on top of the unavoidable one per rank
        assert len(shares[0]) * rows - -(-11 // world) < len(shares[0])
    found = [
        (batch["tokens"][row], batch["labels"][row], batch["position_ids"][row])
        for share in shares
        for batch in share
        for row in range(rows)
        if batch["loss_mask"][row].any()
    ]
    sequences = sorted(torch.cat([tokens, labels[-1:]]).tolist() for tokens, labels, _ in found)
    assert sequences == sorted(target.tokens.tolist())
    assert all((tokens[1:] == labels[:-1]).all() for tokens, labels, _ in found), "labels are shifted once"
    assert sum(batch["loss_mask"].sum() for share in shares for batch in share) == target.num_tokens
    assert {str(tensor.dtype) for batch in shares[0] for tensor in batch.values()} == {
        "torch.int64",
        "torch.float32",
    }


def test_refusals(tmp_path: Path) -> None:
    prefix = write_corpus(
        tmp_path / "c", ["x" * 31]
    )  # 32 tokens, one short of a sequence of 32 and its last label
    with pytest.raises(UserError, match=r"has 32 tokens, fewer than one sequence of 32 \+ 1"):
        load(prefix)
    assert len(load(prefix, seq_length=31).tokens) == 1
    with pytest.raises(UserError, match="holds 3 sequences of 10 tokens, not 4"):
        load(prefix, 4, seq_length=10)
    with pytest.raises(UserError, match="token 256, outside the vocabulary of 256"):
        load(prefix, seq_length=31, tokenizer=NullTokenizer(256))
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing")
    with open(f"{prefix}.bin", "ab") as file:
        file.truncate(20)
    with pytest.raises(UserError, match="truncated"):
        load(prefix, seq_length=8)


def test_the_target_is_of_the_run_s_tokenizer(tmp_path: Path) -> None:
    """Bytes are ids of every vocabulary, so that only PREFIX.json tells them apart."""
    path = write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = build_tokenizer(path)
    ends: list[dict[str, Any]] = [
        {},
        {"tokenizer": path, "eod_token": "<pad>"},
        {"tokenizer": path, "eod_token": "<|endoftext|>"},
    ]
    bytes_, other_end, same = (
        write_corpus(tmp_path / f"c{n}", ["the cat sat on the mat " * 9], **options)
        for n, options in enumerate(ends)
    )
    with pytest.raises(
        UserError, match=r"target t \(.*c0\) was prepared with the tokenizer 'bytes' \(257 tokens\), the run"
    ):
        load(bytes_, seq_length=8, tokenizer=tokenizer)
    with pytest.raises(
        UserError,
        match=r"target t \(.*c1\) was prepared with the end-of-document token 0, the run uses 1: prepare",
    ):
        load(other_end, seq_length=8, tokenizer=tokenizer)
    assert len(load(same, seq_length=8, tokenizer=tokenizer).tokens)
