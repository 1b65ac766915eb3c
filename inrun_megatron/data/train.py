"""Training data: Megatron's GPTDataset and blends of it, with the identity of every sample.

An item is what GPTDataset gives (tokens, labels, loss_mask, position_ids) and `dataset`, `sample`: the sample is item
`sample` of the component dataset `dataset`. That pair and the dataset's description lead back to documents
(data/identity.py).
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inrun_megatron.data.blend import (
    Blend,
    check_split,
    check_vocabulary,
    choose_surplus,
    dataset_names,
    parse_blend,
    parse_split,
    split_range,
)
from inrun_megatron.data.indexed import IndexedFile
from inrun_megatron.data.megatron import (
    BlendedDataset,
    BlendedMegatronDatasetBuilder,
    GPTDataset,
    GPTDatasetConfig,
)
from inrun_megatron.data.run_dataset import INDEX_NAMES, array_sha256
from inrun_megatron.data.samples import DatasetDescription, IdentifiedDataset, components
from inrun_megatron.data.tokenizers import Tokenizer
from inrun_megatron.errors import UserError
from inrun_megatron.ledger.files import digest_of, sha256_of

__all__ = ["DatasetDescription", "IdentifiedDataset", "build_datasets"]


def build_datasets(
    *,
    data_path: Sequence[str],
    split: str,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    eod_mask_loss: bool = False,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
) -> tuple[IdentifiedDataset, IdentifiedDataset | None]:
    """Training and validation data from `data_path` (see `parse_blend`) and `split` (see `parse_split`).

    With `reset_attention_mask` items have `documents` (see IdentifiedDataset).

    One dataset or a weighted blend is repeated until `train_samples` are there; several prefixes without weights are read
    once each, as Megatron does, and too few samples are an error. Validation is None when `valid_samples` is 0 or the
    split has no share for it.

    With torch.distributed initialised every rank must call this; rank 0 checks the input and builds the index cache while
    the others wait, and an error on rank 0 is raised on all. Without it, processes that share a cache take turns.
    `cache_dir` defaults to `cache/` beside the first dataset; in it the indices of each state of the data have a directory
    of their own, named by the hash of the .idx files, because megatron-core's key does not change with the data.
    """
    blend, (train_share, valid_share, _) = parse_blend(data_path), parse_split(split)
    spans = [(0.0, train_share), (train_share, train_share + valid_share)]
    sizes = [train_samples, valid_samples if valid_share > 0 else 0]
    if train_samples < 1:
        raise UserError(f"the run asks for {train_samples} training samples: at least 1 is needed")
    wanted = [span if size > 0 else None for span, size in zip(spans, sizes, strict=True)]
    facts = _on_first_rank(lambda: _check(blend, split, wanted, sizes, seq_length, tokenizer, cache_dir))
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(list(blend.prefixes), None if blend.weights is None else list(blend.weights)),
        split=split,
        path_to_cache=facts["cache"],
        tokenizer=tokenizer,
        mid_level_dataset_surplus=facts["surplus"],
        reset_position_ids=reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=eod_mask_loss,
        # The attention makes its own mask: causal, or from the `documents` of IdentifiedDataset.
        create_attention_mask=False,
    )
    assert config.split_matrix is not None
    # megatron-core would build what nobody reads: the test split, and validation of which no sample is asked
    config.split_matrix = [*(span if kept else None for span, kept in zip(config.split_matrix, wanted)), None]  # type: ignore[list-item]
    with _cache_turn(Path(facts["cache"])):
        built = _Builder(GPTDataset, [*sizes, 0], lambda: True, config).build()
    eod = tokenizer.eod if reset_attention_mask else None
    identified = [
        None if dataset is None else IdentifiedDataset(dataset, _table(dataset, blend, facts), eod)
        for dataset in built[:2]
    ]
    train, valid = identified
    assert train is not None
    remedies = ("train for fewer steps", "evaluate on fewer (--eval-iters)")
    for name, dataset, size, remedy in zip(
        ("training", "validation"), identified, sizes, remedies, strict=True
    ):
        if dataset is not None and len(dataset) < size:
            raise UserError(
                f"the {len(blend.prefixes)} datasets of --data-path hold {len(dataset)} {name} samples and the run asks "
                f"for {size}: give weights (0.7 a_document 0.3 b_document) to repeat them, or {remedy}"
            )
    return train, valid


class _Builder(BlendedMegatronDatasetBuilder):
    """BlendedMegatronDatasetBuilder that also works where torch.distributed is not initialised.

    BlendedDataset (megatron-core 0.16, blended_dataset.py, `_build_indices`) asks for the rank before it writes its cache.
    Without process groups it is built in memory; it is cheap, and samples are identified by the component datasets.
    """

    @staticmethod
    def build_generic_dataset(cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            *args, config = args  # type: ignore[assignment]
            config = copy.copy(config)
            config.path_to_cache = None
            args = (*args, config)
        return BlendedMegatronDatasetBuilder.build_generic_dataset(
            cls, is_built_on_rank, synchronize_ranks, *args
        )


def _on_first_rank(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work` on rank 0, given to all ranks; its error is raised on all of them."""
    if not torch.distributed.is_initialized():
        return work()
    message: list[Any] = [None, None]
    failure: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            message = [work(), None]
        except Exception as error:  # whatever it is, the other ranks must not wait for it
            failure, message = error, [None, (isinstance(error, UserError), str(error))]
    torch.distributed.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    result, problem = message
    if problem is not None:
        bad_input, text = problem
        raise UserError(text) if bad_input else RuntimeError(f"rank 0 failed: {text}")
    return result


def _check(
    blend: Blend,
    split: str,
    wanted: Sequence[tuple[float, float] | None],
    sizes: Sequence[int],
    seq_length: int,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None,
) -> dict[str, Any]:
    """Check every dataset; the cache directory, the surplus of the blend, and each dataset's size and hash."""
    files = [IndexedFile(prefix) for prefix in blend.prefixes]
    read_once = seq_length if blend.weights is None and len(files) > 1 else None
    for data in files:
        check_vocabulary(data, tokenizer)
        check_split(data, split, wanted, read_once)
    surplus = 0.0
    if blend.weights is not None:
        ranges = [
            [split_range(span, data.num_sequences) for data in files] for span in wanted if span is not None
        ]
        tokens = [
            [
                int(data.sequence_lengths[r.start : r.stop].sum(dtype=np.int64))
                for data, r in zip(files, row, strict=True)
            ]
            for row in ranges
        ]
        surplus = choose_surplus(blend.weights, [size for size in sizes if size > 0], tokens, seq_length)
    hashes = [sha256_of(data.idx_path) for data in files]
    base = Path(files[0].prefix).parent / "cache" if cache_dir is None else Path(cache_dir)
    cache = base / hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "lock").touch()
    except OSError as error:
        raise UserError(
            f"the index cache {cache} cannot be written ({error.strerror}): name another directory with --data-cache-path"
        ) from None
    return {
        "cache": str(cache),
        "surplus": surplus,
        "idx_sha256": hashes,
        "bin_bytes": [data.bin_bytes for data in files],
        "bin_digest": [digest_of(data.bin_path) for data in files],
        "documents": [data.num_documents for data in files],
    }


@contextlib.contextmanager
def _cache_turn(cache: Path) -> Iterator[None]:
    """Rank 0 (any process without torch.distributed) has the cache to itself, across runs too, and free of broken files.

    megatron-core takes every file that exists for whole; one that a killed run left half-written is removed here.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        yield
        return
    with open(cache / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # file systems without locks: as megatron-core, one run at a time
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for {lock.name}: another run builds this index", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.glob("*.npy"):
            try:
                np.load(path, mmap_mode="r")
            except (ValueError, EOFError, OSError):
                path.unlink(missing_ok=True)
        yield


def _table(
    dataset: GPTDataset | BlendedDataset, blend: Blend, facts: dict[str, Any]
) -> list[DatasetDescription]:
    """The table of a dataset. Collective: rank 0 hashes the index arrays."""
    parts = components(dataset)
    hashes = _on_first_rank(
        lambda: {
            "rows": [{name: array_sha256(getattr(part, name)) for name in INDEX_NAMES} for part in parts]
        }
    )["rows"]
    names = dataset_names(blend.prefixes)
    table = []
    for index, part in enumerate(parts):
        stem = f"{part.unique_description_hash}-{type(part).__name__}-{part.index_split.name}"
        table.append(
            DatasetDescription(
                name=names[index],
                index=index,
                path_prefix=str(Path(blend.prefixes[index]).absolute()),
                idx_sha256=facts["idx_sha256"][index],
                bin_bytes=facts["bin_bytes"][index],
                documents=facts["documents"][index],
                weight=None if blend.weights is None else blend.weights[index],
                samples=len(part),
                unique_description_hash=part.unique_description_hash,
                description=json.loads(part.unique_description),
                cache_files={
                    name: str(Path(facts["cache"], f"{stem}-{name}.npy").absolute()) for name in INDEX_NAMES
                },
                index_sha256=hashes[index],
                bin_digest=facts["bin_digest"][index],
            )
        )
    return table
