"""What scoring costs: plain and scored training steps, alternately, in any layout.

    python -m benchmarks.overhead                       # the table in docs/performance.md
    python -m benchmarks.overhead --json > overhead.json
    python -m benchmarks.overhead --pp 2                # through the pipeline; --tp, --dp likewise: one thread per rank
    python -m benchmarks.overhead --starts 6 --pairs 4  # processes differ: a median over several
    python -m benchmarks.overhead --matrix              # one setting changed at a time
    python -m benchmarks.overhead --smoke               # seconds; `make bench-smoke`

Two copies of one model train side by side on the same batches: one is megatron-core + DeepSpeed as it is, the
other has taps and scores every sample against its targets (benchmarks/runs.py, benchmarks/pairs.py). ``fastest`` compares
the fastest step of each kind in a process, which others on the machine disturb least. The ideal is the validation pass
itself, ``1 + K n_val / n_train`` when every step is scored; through a pipeline of P stages with M training and V validation
microbatches the stream that scoring makes longer, ``(V + M + P - 1) / (M + P - 1)``.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.output import answer, table_of
from benchmarks.pairs import Outcome, outcome
from benchmarks.runs import Measured, on_ranks, plain_and_scored

# One setting at a time changed from the base case. Two ranks at most: the machine that CI has.
MATRIX: dict[str, dict[str, Any]] = {
    "base": {},
    "llama": {"shape": "llama"},
    "experts": {"shape": "experts"},
    "bf16": {"precision": "bf16"},
    "K=4": {"targets": 4},
    "K=16": {"targets": 16},
    "bf16 directions, K=4": {"targets": 4, "direction_dtype": "bf16"},
    "microbatch 1": {"micro_batch": 1},
    "microbatch 8": {"micro_batch": 8},
    "documents": {"granularity": "document"},
    "tokens": {"granularity": "token"},
    "current": {"base": "current"},
    "midpoint": {"estimator": "midpoint"},
    "simpson": {"estimator": "simpson"},
    "ZeRO-0, DP 2": {"dp": 2, "zero_stage": 0},
    "ZeRO-2, DP 2": {"dp": 2},
    "ZeRO-3, DP 2": {"dp": 2, "zero_stage": 3},
    "TP 2": {"tp": 2},
    "PP 2": {"pp": 2, "zero_stage": 1, "micro_batch": 2, "validation": 2},
}
SMOKE = ("base", "K=4", "tokens", "ZeRO-2, DP 2", "PP 2")


def cases(base: Case) -> list[Case]:
    """Training : validation 16:1 and 8:1, sequence 256 and 512; as many validation sequences as fill a pipeline's
    microbatches."""
    least = base.micro_batch * base.dp if base.pp > 1 else base.dp
    return [
        replace(base, name=f"seq{s} {base.train}:{least * v}", seq_length=s, validation=least * v)
        for s in (256, 512)
        for v in (1, 2)
    ]


def measure(case: Case, *, pairs: int, vocab: int, threads: int, starts: int = 1) -> Outcome:
    """Plain and scored steps of one case, in processes of their own, so that peak memory is its own."""
    found: list[list[Measured]] = [
        on_ranks(case.tp, case.dp, case.pp, threads, plain_and_scored, case, pairs, vocab)
        for _ in range(starts)
    ]
    peak = max(rank.peak_rss_mb for ranks in found for rank in ranks)
    return outcome(case, [[rank.pairs for rank in ranks] for ranks in found], peak)


def measure_together(found: list[Case], *, pairs: int, vocab: int) -> list[Outcome]:
    """The same with one start of processes for all cases of a layout; peak memory is then of what ran so far."""
    outcomes: dict[str, Outcome] = {}
    for tp, dp, pp in dict.fromkeys((case.tp, case.dp, case.pp) for case in found):
        own = [case for case in found if (case.tp, case.dp, case.pp) == (tp, dp, pp)]
        ranks: list[list[Measured]] = on_ranks(tp, dp, pp, 1, _all, own, pairs, vocab)
        for case, measured in zip(own, zip(*ranks, strict=True), strict=True):
            peak = max(rank.peak_rss_mb for rank in measured)
            outcomes[case.name] = outcome(case, [[rank.pairs for rank in measured]], peak)
    return [outcomes[case.name] for case in found]


def _all(found: list[Case], pairs: int, vocab: int) -> list[Measured]:
    return [plain_and_scored(case, pairs, vocab) for case in found]


def _table(outcomes: list[Outcome], title: str) -> Table:
    table = table_of(
        title,
        (
            "case",
            "plain s",
            "scored s",
            "ratio (quartiles)",
            "ideal",
            "above",
            "fastest",
            "CPU",
            "CPU ideal",
            "above",
            "RSS MB",
        ),
    )
    for o in outcomes:
        table.add_row(
            o.name,
            f"{o.plain_s:.3f}",
            f"{o.scored_s:.3f}",
            f"{o.ratio:.3f} ({o.ratio_low:.3f}-{o.ratio_high:.3f})",
            f"{o.ideal:.4f}",
            f"{100 * o.above_ideal:+.1f}%",
            _fastest(o),
            f"{o.cpu_ratio:.3f}",
            f"{o.cpu_ideal:.4f}",
            f"{100 * (o.cpu_ratio / o.cpu_ideal - 1):+.1f}%",
            f"{o.peak_rss_mb:.0f}",
        )
    return table


def _fastest(o: Outcome) -> str:
    """Of the fastest steps, above the ideal: the median of the processes and what lies between them."""
    above = [100 * (ratio / o.ideal - 1) for ratio in o.fastest]
    between = f" ({min(above):+.1f} to {max(above):+.1f})" if len(above) > 1 else ""
    return f"{statistics.median(above):+.1f}%{between}"


def chosen_cases(base: Case, names: Mapping[str, dict[str, Any]]) -> list[Case]:
    """The base case with each of the changes."""
    return [replace(base, name=name, **changes) for name, changes in names.items()]


def main(
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="transformer layers")] = 4,
    train: Annotated[int, typer.Option(help="training sequences per step")] = 16,
    micro_batch: Annotated[int | None, typer.Option(help="sequences per microbatch; default 4, PP 2")] = None,
    zero_stage: Annotated[int | None, typer.Option(help="DeepSpeed ZeRO stage; default 2, PP 1")] = None,
    vocab: Annotated[int, typer.Option(help="vocabulary size")] = 4096,
    pairs: Annotated[int, typer.Option(help="pairs of steps counted per case")] = 9,
    starts: Annotated[
        int, typer.Option(min=1, help="how often each case's processes are started anew; pairs of each")
    ] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of a single rank")] = os.cpu_count() or 1,
    tp: Annotated[int, typer.Option(help="tensor-parallel ranks")] = 1,
    dp: Annotated[int, typer.Option(help="data-parallel ranks")] = 1,
    pp: Annotated[int, typer.Option(help="pipeline stages (ZeRO 0 or 1)")] = 1,
    shape: Annotated[Literal["gpt2", "llama", "experts"], typer.Option(help="model shape")] = "gpt2",
    bf16: Annotated[bool, typer.Option(help="train in bf16")] = False,
    targets: Annotated[int, typer.Option(help="validation targets")] = 1,
    granularity: Annotated[
        Literal["sample", "document", "token"], typer.Option(help="what gets a value; documents of 64 tokens")
    ] = "sample",
    estimator: Annotated[
        Literal["first_order", "midpoint", "simpson"], typer.Option(help="as --shapley-estimator")
    ] = "first_order",
    base: Annotated[Literal["current", "drift"] | None, typer.Option(help="as --shapley-base")] = None,
    direction_dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="as --shapley-direction-dtype")
    ] = "fp32",
    matrix: Annotated[bool, typer.Option("--matrix", help="one setting changed at a time")] = False,
    same: Annotated[
        bool, typer.Option("--same", help="plain steps against plain steps: what the comparison itself sees")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="a few cases of a tiny model, in seconds")] = False,
    only: Annotated[str, typer.Option(help="run the cases whose name contains this")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure the overhead of scoring. Example: python -m benchmarks.overhead --hidden 256 --pairs 5"""
    start = Case(
        name="",
        hidden=hidden,
        layers=layers,
        seq_length=256,
        train=train,
        validation=1,
        micro_batch=micro_batch or (2 if pp > 1 else 4),
        zero_stage=(1 if pp > 1 else 2) if zero_stage is None else zero_stage,
        tp=tp,
        dp=dp,
        pp=pp,
        shape=shape,
        precision="bf16" if bf16 else "fp32",
        targets=targets,
        granularity=granularity,
        estimator=estimator,
        base=base,
        direction_dtype=direction_dtype,
    )
    if smoke:
        start = replace(start, hidden=64, layers=2, seq_length=64, train=8)
        vocab, pairs, threads = 256, 3, 1
        found = chosen_cases(start, {name: MATRIX[name] for name in SMOKE})
    elif matrix:
        found = chosen_cases(replace(start, validation=2), MATRIX)
    else:
        found = cases(start)
    found = [case for case in found if only in case.name]
    if same:
        found = [
            replace(case, name=f"{case.name}, plain", validation=0, estimator="first_order") for case in found
        ]
    if not found:
        raise typer.BadParameter(f"no case's name contains {only!r}", param_hint="--only")
    if smoke:
        outcomes = measure_together(found, pairs=pairs, vocab=vocab)
    else:
        outcomes = [measure(case, pairs=pairs, vocab=vocab, threads=threads, starts=starts) for case in found]
    first = found[0]
    setting = (
        f"hidden {first.hidden}, {first.layers} layers, vocabulary {vocab}, microbatch {first.micro_batch}, "
        f"ZeRO-{first.zero_stage}, TP {tp}, DP {dp}, PP {pp}, {threads if tp * dp * pp == 1 else 1} threads a rank"
    )
    record = {"setting": setting, "cases": [asdict(o) for o in outcomes]}
    title = f"Scored over plain training steps: {setting}"
    answer(record, lambda: _table(outcomes, title), as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
