"""Vocabulary, validation targets and training data of a run: the glue to inrun_megatron.data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from inrun_megatron.config import Config
from inrun_megatron.data.blend import parse_blend, parse_split
from inrun_megatron.data.documents import read_summary
from inrun_megatron.data.targets import Target, load_target, parse_targets
from inrun_megatron.data.tokenizers import (
    NullTokenizer,
    Tokenizer,
    build_tokenizer,
    prepared_tokenizer,
    tokenizer_for_data,
)
from inrun_megatron.data.train import build_datasets
from inrun_megatron.errors import UserError
from inrun_megatron.keeping.agreement import AgreedError
from inrun_megatron.training.deepspeed_config import Batch


@dataclass(frozen=True)
class Data:
    """Training and validation datasets and the table that says what their samples refer to."""

    train: Any
    validation: Any | None
    table: list[dict[str, Any]]

    @property
    def order(self) -> str:
        """Equal where sample numbers mean the same text: hex sha256 of the files, their weights and GPTDataset's indices."""
        decide = ("idx_sha256", "bin_digest", "weight", "index_sha256")
        rows = [[row[name] for name in decide] for row in self.table]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def check_arguments(config: Config) -> None:
    """UserError when --data-path, --split or --shapley-target cannot be read. Opens no file."""
    parse_blend(config.data.data_path)
    parse_split(config.data.split)
    if config.shapley.enabled:
        parse_targets(config.shapley.target)


def vocabulary(config: Config) -> Tokenizer:
    """The tokenizer of --tokenizer-type, with the data's end of document; with `auto` the one that all the data was
    prepared with.

    UserError: the data's tokenizers differ or are unknown, or --vocab-size is not the tokenizer's.
    """
    data = config.data
    prefixes = parse_blend(data.data_path).prefixes
    if data.tokenizer_type == "bytes":
        tokenizer = build_tokenizer("bytes")
    elif data.tokenizer_type == "HuggingFaceTokenizer":
        assert data.tokenizer_model is not None  # training/validation.py
        specs = parse_targets(config.shapley.target) if config.shapley.enabled else []
        tokenizer = tokenizer_for_data(data.tokenizer_model, [*prefixes, *(spec.path for spec in specs)])
    elif data.vocab_size is not None and any(read_summary(prefix) is None for prefix in prefixes):
        # Data that was tokenized elsewhere: the flag states the vocabulary.
        needing = {
            "--eod-mask-loss": data.eod_mask_loss,
            "--reset-position-ids": data.reset_position_ids,
            "--reset-attention-mask": data.reset_attention_mask,
            "--shapley-granularity document": config.shapley.enabled
            and config.shapley.granularity == "document",
        }
        for flag, given in needing.items():
            if given:
                raise UserError(f"{flag} needs to know the end-of-document token: give --tokenizer-type")
        return NullTokenizer(data.vocab_size)
    else:
        tokenizer = prepared_tokenizer(prefixes)
    if data.vocab_size is not None and data.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"--vocab-size is {data.vocab_size} but the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens: "
            f"leave --vocab-size out"
        )
    return tokenizer


def targets(config: Config, tokenizer: Tokenizer) -> list[Target]:
    """The validation targets of --shapley-target; none under --no-shapley."""
    if not config.shapley.enabled:
        return []
    return [
        load_target(
            spec,
            seq_length=config.data.seq_length,
            tokenizer=tokenizer,
            eod_mask_loss=config.data.eod_mask_loss,
            reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask,
        )
        for spec in parse_targets(config.shapley.target)
    ]


def build(
    config: Config, batch: Batch, tokenizer: Tokenizer, *, iteration: int = 0, consumed_samples: int = 0
) -> Data:
    """Training samples for the whole run and validation samples for one evaluation. Collective over the world.

    iteration, consumed_samples: of the checkpoint that the run goes on from, which may have had another global batch.
    """
    training = config.training
    coming = max(training.train_iters - iteration, 0) * batch.size
    evaluated = training.eval_iters * batch.size if training.eval_interval else 0
    try:
        train, validation = build_datasets(
            data_path=config.data.data_path,
            split=config.data.split,
            seq_length=config.data.seq_length,
            train_samples=consumed_samples + coming,
            valid_samples=evaluated,
            seed=training.seed,
            tokenizer=tokenizer,
            eod_mask_loss=config.data.eod_mask_loss,
            reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask,
            cache_dir=config.data.data_cache_path,
        )
    except UserError as error:  # `build_datasets` raises on all ranks what is wrong on one
        raise AgreedError(str(error)) from error
    table = [description.to_dict() for description in train.table]
    return Data(train=train, validation=validation, table=table)
