"""What scoring costs on one GPU: time over a plain step, and memory, against their limits.

    python -m benchmarks.gpu                            # 18 cases: GPT-2 124M, 350M, a 1B Llama shape
    python -m benchmarks.gpu --only "llama 1b" --json   # some of them
    python -m benchmarks.gpu --train 128 --validation 16 --pairs 2   # steps of 131,072 tokens at sequence 1024 and more
    python -m benchmarks.gpu --smoke                    # tiny shapes, on any device

bf16, ZeRO-2 on one rank, AdamW, no dropout, directions in bf16, sequence 1024 and 4096, microbatches of 1, 4 and 8; 16
training and 2 validation sequences a step, so that the limit is 1.125 (a short step, in which what is done once per step
weighs more than in pretraining). Two engines per model, a plain and a scored one,
step alternately. Wall time is between synchronisations; device time is that of all kernels of one step, from torch's
profiler: where it is the smaller one, the step waits for the host that starts them. Memory is what torch had
allocated at most in a step, without what the other engine holds; its limit is 2 bytes per parameter and target. A case
that does not fit says so, and the others go on.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case
from benchmarks.output import answer, table_of
from benchmarks.pairs import Pairs, alternate, outcome
from benchmarks.runs import (
    batches_of,
    build_engine,
    on_ranks,
    plain_step,
    scored_step,
    scoring_of,
    synchronise,
)

MODELS: dict[str, dict[str, Any]] = {
    "gpt2 124m": {"hidden": 768, "layers": 12},
    "gpt2 350m": {"hidden": 1024, "layers": 24},
    "llama 1b": {"hidden": 2048, "layers": 16, "shape": "llama"},
}
VOCABULARY = 50304
DIRECTION_BYTES = 2
MIB = 2**20


@dataclass(frozen=True)
class Found:
    """One case. Seconds per step (wall: medians; device: of one step); MiB: at the peak of a plain step, what scoring adds
    to it, and its limit.

    error: why there are no figures.
    """

    name: str
    error: str | None = None
    plain_s: float = 0.0
    scored_s: float = 0.0
    ratio: float = 0.0
    ratio_low: float = 0.0
    ratio_high: float = 0.0
    plain_device_s: float = 0.0
    scored_device_s: float = 0.0
    ideal: float = 0.0
    parameters: int = 0
    plain_mib: float = 0.0
    added_mib: float = 0.0
    limit_mib: float = 0.0

    @property
    def device_ratio(self) -> float | None:
        """Scored over plain device time."""
        return self.scored_device_s / self.plain_device_s if self.plain_device_s else None


def cases(*, smoke: bool, train: int = 16, validation: int = 2) -> dict[str, list[Case]]:
    """By model: every sequence length and microbatch size."""
    models = {"tiny": {"hidden": 64, "layers": 2}} if smoke else MODELS
    lengths, sizes = ((32,), (1, 4)) if smoke else ((1024, 4096), (1, 4, 8))
    return {
        name: [
            Case(
                f"{name}, sequence {length}, microbatch {size}",
                seq_length=length,
                train=train,
                validation=validation,
                micro_batch=size,
                zero_stage=2,
                precision="bf16",
                direction_dtype="bf16",
                dropout=0.0,
                **sizes_of,
            )
            for length in lengths
            for size in sizes
        ]
        for name, sizes_of in models.items()
    }


def measure(models: list[list[Case]], pairs: int, vocab: int) -> list[Found]:
    """Every case on this rank; a function for `on_ranks`."""
    answers = []
    for found in models:
        engines = _Engines(found, vocab)
        for case in found:
            try:
                answers.append(_measure(engines, case, pairs, vocab))
            except torch.cuda.OutOfMemoryError as error:
                answers.append(Found(case.name, error=f"does not fit: {str(error).splitlines()[0]}"))
            print(answers[-1], file=sys.stderr, flush=True)
            _let_go()
        del engines
        _let_go()
    return answers


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Engines:
    """A plain and a scored engine of one model, and how many bytes each holds between steps."""

    def __init__(self, found: list[Case], vocab: int) -> None:
        longest = replace(found[0], seq_length=max(case.seq_length for case in found))
        empty = _allocated()
        self.plain, self.plain_bytes = self._build(longest, vocab), _allocated() - empty
        self.scored = self._build(longest, vocab)
        self.scored_bytes = _allocated() - empty - self.plain_bytes

    def _build(self, case: Case, vocab: int) -> Any:
        engine = build_engine(case, vocab)
        step = plain_step(engine, case)
        step(1, batches_of(case, vocab, engine.device)(1))
        return engine  # the optimizer's state exists from here on

    def set_microbatch(self, case: Case) -> None:
        for engine in (self.plain, self.scored):
            engine.set_train_micro_batch_size(case.micro_batch)
            engine.set_train_batch_size(case.train)
            engine.micro_steps = 0  # a step of another accumulation would end in the middle of one


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _peak(step: Any, iteration: int, batch: Any) -> int:
    """Most bytes allocated in one step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step(iteration, batch)
    synchronise()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _device_seconds(step: Any, iteration: int, batch: Any) -> float:
    """Time of all kernels of one step."""
    if not torch.cuda.is_available():
        return 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as kernels:
        step(iteration, batch)
        synchronise()
    return sum(event.self_device_time_total for event in kernels.key_averages()) / 1e6


def _measure(engines: _Engines, case: Case, pairs: int, vocab: int) -> Found:
    engines.set_microbatch(case)
    batch = batches_of(case, vocab, engines.plain.device)
    plain = plain_step(engines.plain, case)
    plain_peak = _peak(plain, 1, batch(1)) - engines.scored_bytes
    shapley = scoring_of(engines.scored, case, vocab)
    scored = scored_step(shapley, case)
    try:
        scored(1, batch(1))
        scored_peak = _peak(scored, 2, batch(2)) - engines.plain_bytes
        timed: Pairs = alternate(plain, scored, batch=batch, pairs=pairs, synchronise=synchronise)
        plain_device, scored_device = (_device_seconds(step, 99, batch(99)) for step in (plain, scored))
    finally:
        shapley.close()
    line = outcome(case, [[timed]], 0.0)
    parameters = sum(p.numel() for p in engines.plain.module.parameters())
    return Found(
        case.name,
        plain_s=line.plain_s,
        scored_s=line.scored_s,
        ratio=line.ratio,
        ratio_low=line.ratio_low,
        ratio_high=line.ratio_high,
        plain_device_s=plain_device,
        scored_device_s=scored_device,
        ideal=line.ideal,
        parameters=parameters,
        plain_mib=plain_peak / MIB,
        added_mib=(scored_peak - plain_peak) / MIB,
        limit_mib=DIRECTION_BYTES * case.targets * parameters / MIB,
    )


def _table(answers: list[Found], device: str) -> Table:
    columns = (
        "case",
        "plain ms",
        "scored ms",
        "ratio (quartiles)",
        "ideal",
        "above",
        "device ms",
        "above",
        "peak MiB",
        "added",
        "limit",
    )
    table = table_of(f"Scored over plain training steps in bf16 on {device}", columns)
    for one in answers:
        if one.error is not None:
            table.add_row(one.name, one.error)
            continue
        table.add_row(
            one.name,
            f"{1e3 * one.plain_s:.1f}",
            f"{1e3 * one.scored_s:.1f}",
            f"{one.ratio:.3f} ({one.ratio_low:.3f}-{one.ratio_high:.3f})",
            f"{one.ideal:.4f}",
            f"{100 * (one.ratio / one.ideal - 1):+.1f}%",
            f"{1e3 * one.plain_device_s:.1f}",
            f"{100 * (one.device_ratio / one.ideal - 1):+.1f}%" if one.device_ratio else "-",
            f"{one.plain_mib:.0f}",
            f"{one.added_mib:.0f}",
            f"{one.limit_mib:.0f}",
        )
    return table


def main(
    pairs: Annotated[int, typer.Option(help="pairs of steps counted per case")] = 5,
    only: Annotated[str, typer.Option(help="run the cases whose name contains this")] = "",
    train: Annotated[int, typer.Option(help="training sequences a step; a multiple of 8")] = 16,
    validation: Annotated[int, typer.Option(help="validation sequences a step")] = 2,
    smoke: Annotated[bool, typer.Option("--smoke", help="two cases of a tiny model, on any device")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Time and memory of scoring on one GPU. Example: python -m benchmarks.gpu --only "gpt2 124m" """
    if not smoke and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here; --smoke runs anywhere", param_hint="--smoke")
    largest = 4 if smoke else 8
    if train % largest:
        raise typer.BadParameter(
            f"{train} is no multiple of {largest}, the largest microbatch", param_hint="--train"
        )
    models = cases(smoke=smoke, train=train, validation=validation)
    found = [[case for case in own if only in case.name] for own in models.values()]
    found = [own for own in found if own]
    if not found:
        raise typer.BadParameter(f"no case's name contains {only!r}", param_hint="--only")
    [answers] = on_ranks(1, 1, 1, 1, measure, found, pairs, 128 if smoke else VOCABULARY)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (memory is not measured)"
    record = {"device": device, "cases": [asdict(one) for one in answers]}
    answer(record, lambda: _table(answers, device), as_json=as_json, width=150)


if __name__ == "__main__":
    typer.run(main)
