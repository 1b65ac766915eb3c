"""`inrun prepare`: text, JSONL or Parquet files to a Megatron indexed dataset."""

from __future__ import annotations

import json as json_module
import os
from typing import Annotated, cast

import typer

from inrun_megatron.data.inputs import Format
from inrun_megatron.data.prepare import PrepareSummary
from inrun_megatron.data.prepare import prepare as prepare_dataset
from inrun_megatron.wording import counted


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, directories, or quoted globs ('src/**/*.py'); text, JSONL and Parquet, .gz too."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="PREFIX", help="Writes PREFIX.bin, .idx, .json, .documents.parquet."
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="bytes|PATH", help="bytes, or the path of a Hugging Face tokenizer.json.")
    ] = "bytes",
    eod_token: Annotated[
        str | None,
        typer.Option(
            help="Token that ends a document. Default: <|endoftext|>, </s> or the like, if there is one."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="JSONL field or Parquet column of the text.")] = "text",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata-fields",
            "--keep",
            metavar="FIELD",
            help="Metadata fields to keep, repeated or with commas (source,url,language).",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="auto|text|lines|jsonl|parquet",
            help="auto goes by the suffix; text: a file is a document; lines: a line is a document.",
        ),
    ] = "auto",
    append_eod: Annotated[
        bool,
        typer.Option(
            "--append-eod/--no-append-eod", help="End each document with the end-of-document token."
        ),
    ] = True,
    replace_invalid: Annotated[
        bool, typer.Option("--replace-invalid", help="Replace bytes that are not UTF-8 instead of stopping.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes. Default: one per available core.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Turn text, JSONL or Parquet files into a Megatron indexed dataset.

    Example: inrun prepare 'corpus/*.jsonl.gz' --metadata-fields source,url --output data/corpus --workers 8

    Documents keep their order, and PREFIX.documents.parquet leads each back to its file, line and metadata. A directory
    is searched for .txt .text .md .rst .jsonl .ndjson .parquet .pq; name other files by a glob.
    """
    summary = prepare_dataset(
        inputs,
        output,
        tokenizer=tokenizer,
        eod_token=eod_token,
        text_field=text_field,
        keep=[name.strip() for item in keep or [] for name in item.split(",") if name.strip()],
        format=cast(Format, format),
        append_eod=append_eod,
        replace_invalid=replace_invalid,
        workers=_available_cores() if workers is None else workers,
        overwrite=overwrite,
        progress=not json,
    )
    typer.echo(json_module.dumps(summary.to_dict()) if json else _in_words(summary))


def _in_words(summary: PrepareSummary) -> str:
    left_out = f", {summary.empty:,} empty left out" if summary.empty else ""
    return (
        f"{summary.prefix}.bin/.idx: {counted(summary.documents, 'document')}, {counted(summary.tokens, 'token')} "
        f"({summary.tokenizer['name']}, vocabulary {summary.tokenizer['vocab_size']:,}) from {counted(summary.files, 'file')}"
        f"{left_out}, in {summary.seconds:.1f} s"
    )


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
