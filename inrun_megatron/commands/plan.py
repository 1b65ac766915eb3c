"""`inrun plan`: what scoring will cost, before the run."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import typer

from inrun_megatron.commands.options import JsonOption
from inrun_megatron.config import Config, ModelConfig
from inrun_megatron.defaults import padded_vocabulary
from inrun_megatron.errors import UserError
from inrun_megatron.plan.job import Job
from inrun_megatron.plan.presets import PRESETS
from inrun_megatron.plan.text import markdown, record, size, table_rows
from inrun_megatron.plan.times import Hardware
from inrun_megatron.report.tables import console, print_json, table
from inrun_megatron.wording import flag_of

Number = int | None
Precision = Literal["fp32", "bf16", "fp16"]


def plan(
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset", metavar="NAME", help=f"Start from {', '.join(PRESETS)}; repeatable: side by side."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="YAML", help="Start from a run's config.yaml; with --world-size."),
    ] = None,
    num_layers: Annotated[Number, typer.Option(help="Transformer layers.")] = None,
    hidden_size: Annotated[Number, typer.Option(help="Width of the residual stream.")] = None,
    num_attention_heads: Annotated[Number, typer.Option(help="Attention heads.")] = None,
    ffn_hidden_size: Annotated[Number, typer.Option(help="Width of the feed-forward layer.")] = None,
    num_query_groups: Annotated[Number, typer.Option(help="Query groups; default: one per head.")] = None,
    num_experts: Annotated[Number, typer.Option(help="Experts of a layer. Default: a dense model.")] = None,
    moe_layer_freq: Annotated[
        Number, typer.Option(help="Experts in the first and every n-th layer after it. Default: 1.")
    ] = None,
    moe_router_topk: Annotated[Number, typer.Option(help="Experts of a token. Default: 2.")] = None,
    moe_ffn_hidden_size: Annotated[Number, typer.Option(help="Width of an expert.")] = None,
    moe_shared_expert_intermediate_size: Annotated[
        Number, typer.Option(help="Width of an expert for every token.")
    ] = None,
    llama: Annotated[
        bool, typer.Option("--llama", help="RMSNorm, SwiGLU, rotary positions, no biases, untied output.")
    ] = False,
    vocab_size: Annotated[Number, typer.Option(help="Rows of the embedding, with padding.")] = None,
    seq_length: Annotated[Number, typer.Option(help="Tokens per sample.")] = None,
    world_size: Annotated[Number, typer.Option(help="GPUs.")] = None,
    micro_batch_size: Annotated[Number, typer.Option(help="Samples per forward pass. Default: 1.")] = None,
    global_batch_size: Annotated[Number, typer.Option(help="Samples per step.")] = None,
    tensor_model_parallel_size: Annotated[Number, typer.Option(help="Tensor parallel. Default: 1.")] = None,
    pipeline_model_parallel_size: Annotated[Number, typer.Option(help="Pipeline stages. Default: 1.")] = None,
    sequence_parallel: Annotated[
        bool | None,
        typer.Option("--sequence-parallel/--no-sequence-parallel", help="Shard the sequence over TP."),
    ] = None,
    zero_stage: Annotated[Number, typer.Option(help="DeepSpeed ZeRO stage 0-3. Default: 1.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the weights that layers use. Default: bf16.")
    ] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="Full activation recomputation.")
    ] = None,
    train_iters: Annotated[Number, typer.Option(help="Steps of the run. Default: 1000.")] = None,
    targets: Annotated[Number, typer.Option(help="Validation targets. Default: 1.")] = None,
    target_sequences: Annotated[
        Number,
        typer.Option(
            help="Sequences of each target. Default: the largest in --config if each target names one, else 16."
        ),
    ] = None,
    target_micro_batch_size: Annotated[
        Number, typer.Option(help="As --shapley-micro-batch-size. Default: --micro-batch-size.")
    ] = None,
    interval: Annotated[Number, typer.Option(help="Score every N-th step. Default: 1.")] = None,
    estimator: Annotated[
        Literal["first_order", "midpoint", "simpson"] | None, typer.Option(help="As --shapley-estimator.")
    ] = None,
    base: Annotated[Literal["current", "drift"] | None, typer.Option(help="As --shapley-base.")] = None,
    refresh: Annotated[
        Number, typer.Option(help="As --shapley-refresh: own direction every N-th time.")
    ] = None,
    direction_dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="As --shapley-direction-dtype. Default: fp32.")
    ] = None,
    segments: Annotated[
        float | None,
        typer.Option(
            help="Ledger rows per sample and target: its documents or tokens. Default: those of --config's data, else 1."
        ),
    ] = None,
    tflops: Annotated[
        float, typer.Option(help="What training reaches on one GPU, in 1e12 operations/s.")
    ] = 400.0,
    memory_gb_per_s: Annotated[
        float, typer.Option(help="Memory bandwidth of one GPU, in 1e9 bytes/s.")
    ] = 3350.0,
    network_gb_per_s: Annotated[
        float, typer.Option(help="Network bandwidth of one GPU, in 1e9 bytes/s.")
    ] = 50.0,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json: JsonOption = False,
) -> None:
    """Extra memory, communication, operations and time of scoring, and the size of the ledger.

    Example: inrun plan --preset 7b --targets 4 --estimator midpoint --interval 10

    All flags override the preset or the run's configuration, which override the defaults. docs/scaling.md derives the
    formulas.
    """
    if json and as_markdown:
        raise UserError("give one of --json and --markdown")
    for flag, value in (
        ("tflops", tflops),
        ("memory-gb-per-s", memory_gb_per_s),
        ("network-gb-per-s", network_gb_per_s),
    ):
        if not 0 < value < math.inf:
            raise UserError(f"--{flag} {value:g} must be a positive number")
    hardware = Hardware(tflops * 1e12, memory_gb_per_s * 1e9, network_gb_per_s * 1e9)
    model: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "ffn_hidden_size": ffn_hidden_size,
        "num_query_groups": num_query_groups,
        "group_query_attention": None if num_query_groups is None else True,
        "num_experts": num_experts,
        "moe_layer_freq": moe_layer_freq,
        "moe_router_topk": moe_router_topk,
        "moe_ffn_hidden_size": moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe_shared_expert_intermediate_size,
    }
    if llama:
        model |= {
            "normalization": "RMSNorm",
            "swiglu": True,
            "position_embedding_type": "rope",
            "disable_bias_linear": True,
            "untie_embeddings_and_output_weights": True,
        }
    job: dict[str, Any] = {
        "vocab_size": vocab_size,
        "seq_length": seq_length,
        "world_size": world_size,
        "micro_batch_size": micro_batch_size,
        "global_batch_size": global_batch_size,
        "tensor_parallel": tensor_model_parallel_size,
        "pipeline_parallel": pipeline_model_parallel_size,
        "sequence_parallel": sequence_parallel,
        "zero_stage": zero_stage,
        "parameter_bytes": None if precision is None else 4 if precision == "fp32" else 2,
        "recompute": recompute,
        "train_iters": train_iters,
        "targets": targets,
        "target_sequences": target_sequences,
        "target_micro_batch_size": target_micro_batch_size,
        "interval": interval,
        "estimator": estimator,
        "base": base,
        "refresh": refresh,
        "direction_dtype": direction_dtype,
        "segments": segments,
    }
    starts = _starts(preset or (), config, vocabulary=vocab_size is None, segments=segments is None)
    remedy = "" if preset or config else "; or start from --preset or --config"
    plans = {
        name: record(_job(own_model | _given(model), own_job | _given(job), remedy), hardware)
        for name, (own_model, own_job) in starts.items()
    }
    if json:
        print_json(plans if len(plans) > 1 else next(iter(plans.values())))
    elif as_markdown:
        typer.echo(markdown(plans))
    else:
        _print(plans, hardware)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _starts(
    presets: Any, config: str | None, **wanted: bool
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> (fields of ModelConfig, fields of Job) to start from; `wanted`: what a run's data is read for."""
    if presets and config is not None:
        raise UserError(
            f"--preset {presets[0]} and --config {config} both describe the job; give one of them"
        )
    unknown = [name for name in presets if name not in PRESETS]
    if unknown:
        raise UserError(f"--preset {unknown[0]!r} does not exist; use {', '.join(PRESETS)}")
    if presets:
        return {name: PRESETS[name] for name in presets}
    return {"plan": ({}, {}) if config is None else _of_run(config, **wanted)}


def _of_run(path: str, vocabulary: bool, segments: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    from inrun_megatron.training.arguments import parse

    found = parse(["--config", path])
    rows = None if not vocabulary else _embedding_rows(found, path)
    training, parallel, shapley = found.training, found.parallel, found.shapley
    job: dict[str, Any] = {
        "vocab_size": rows,
        "seq_length": found.data.seq_length,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "tensor_parallel": parallel.tensor_model_parallel_size,
        "pipeline_parallel": parallel.pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "zero_stage": parallel.zero_stage or 0,
        "parameter_bytes": 2 if training.bf16 or training.fp16 else 4,
        "recompute": training.recompute_granularity is not None,
        "adam": training.optimizer == "adam" and shapley.optimizer == "auto",
        "clips": training.clip_grad is None or training.clip_grad > 0,
        "train_iters": training.train_iters,
        "targets": max(1, len(shapley.target)),
        "target_micro_batch_size": shapley.micro_batch_size,
        "interval": shapley.interval,
        "estimator": shapley.estimator,
        "base": shapley.base,
        "refresh": shapley.refresh,
        "direction_dtype": shapley.direction_dtype,
        "segments": _segments(found, path) if segments else None,
    }
    counts = [text.rpartition(":")[2] for text in shapley.target]
    if counts and all(text.isdecimal() for text in counts):
        job["target_sequences"] = max(map(int, counts))
    return dataclasses.asdict(found.model), _given(job)


def _embedding_rows(found: Config, path: str) -> int:
    """The run's vocabulary, from --vocab-size or the tokenizer of its data, with padding."""
    from inrun_megatron.training.datasets import vocabulary

    try:
        size = found.data.vocab_size or vocabulary(found).vocab_size
    except UserError as error:
        raise UserError(
            f"{path} names no vocabulary size and its data none ({error}): give --vocab-size"
        ) from None
    return padded_vocabulary(
        size, found.model.make_vocab_size_divisible_by, found.parallel.tensor_model_parallel_size
    )


def _segments(found: Config, path: str) -> float:
    """Parts of a sample that get values of their own: a document in it ends with each end-of-document token."""
    if found.shapley.granularity != "document":
        return found.data.seq_length if found.shapley.granularity == "token" else 1
    from inrun_megatron.data.blend import parse_blend
    from inrun_megatron.data.indexed import IndexedFile

    blend = parse_blend(found.data.data_path)
    try:
        files = [IndexedFile(prefix) for prefix in blend.prefixes]
    except UserError as error:
        raise UserError(
            f"{path} scores documents and its data cannot be counted ({error}): give --segments"
        ) from None
    # Datasets without weights are mixed by their sizes.
    weights = blend.weights or [file.num_tokens for file in files]
    ends = sum(
        w * file.num_documents / file.num_tokens for w, file in zip(weights, files, strict=True)
    ) / sum(weights)
    return 1 + (found.data.seq_length - 1) * ends


def _job(model: dict[str, Any], job: dict[str, Any], remedy: str) -> Job:
    needed = {ModelConfig: model, Job: {"model": None} | job}
    missing = [
        field.name
        for kind, values in needed.items()
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        flags = ", ".join(map(flag_of, missing))
        raise UserError(f"the plan needs {flags}{remedy}")
    return Job(model=ModelConfig(**model), **job)


def _print(plans: dict[str, dict[str, Any]], hardware: Hardware) -> None:
    out = console()
    made = table([("", "left"), *plans])
    for name, *cells in table_rows(plans):
        made.add_row(name.replace("**", ""), *cells)
    out.print(made)
    if len(plans) == 1:
        calls = table(
            [("Collective of a scored step", "left"), ("over", "left"), ("for", "left"), "Calls", "Bytes"]
        )
        for own in next(iter(plans.values()))["collectives"]:
            calls.add_row(own["kind"], own["group"], own["purpose"], f"{own['count']:,}", size(own["bytes"]))
        out.print()
        out.print(calls)
    out.print(
        f"\nTime is a model of GPUs with {hardware.flops / 1e12:g} TFLOP/s (--tflops), {hardware.memory / 1e9:g} GB/s of memory "
        f"(--memory-gb-per-s) and {hardware.network / 1e9:g} GB/s of network (--network-gb-per-s), without what it takes to start "
        f"operations; nothing is hidden behind anything else unless a row says so."
    )
