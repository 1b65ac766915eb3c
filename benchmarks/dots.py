"""The ways to compute a linear layer's dots, alone: where they cross, and what the rule of dots/cost.py picks.

    python -m benchmarks.dots                  # the table in docs/dots.md
    python -m benchmarks.dots --tokens 1024    # on a GPU also a microbatch of one row, beside the kernel
    python -m benchmarks.dots --json

Each cell is the time of gradient and dots over that of the weight gradient alone. On a CPU (one thread) processor time, the
smallest of several repetitions; on a GPU device time, their median, with buffers and directions in bf16 that are in no
cache, where the kernel joins.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from inrun_megatron.dots import cost
from inrun_megatron.dots.late import LateDots
from inrun_megatron.dots.linear import blocks_and_dots
from inrun_megatron.dots.products import weight_gradient
from inrun_megatron.dots.projection import token_dots

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 1024)
GPU_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
VALIDATION_TOKENS = 256  # of the Gram form


@dataclass(frozen=True)
class Row:
    """Times over that of the plain weight gradient."""

    features_in: int
    features_out: int
    tokens_per_segment: int
    targets: int
    plain_s: float
    times: dict[str, float]
    fastest: str  # of the forms that the rule may pick
    picked: str


def _seconds(work: Callable[[], object], repetitions: int, cuda: bool) -> float:
    """Of one repetition: the fastest on a CPU, the median on a GPU."""
    if cuda:
        return _device_seconds(work, repetitions)
    found = []
    for _ in range(repetitions + 1):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found[1:])  # the first one warms caches


def _device_seconds(work: Callable[[], object], repetitions: int) -> float:
    work()  # compiles
    other = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for start, stop in events:
        other.zero_()  # empties the caches, and lets the host run ahead
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def rates(rows: list[Row], tokens: int) -> dict[str, float]:
    """Operations and bytes per second that a CPU's forms reached beside the product: medians over the rows.

    Accumulator and directions of one layer stay in a cache between segments, so that the bytes are no memory's.
    """
    operations, moved = [], []
    for row in rows:
        weights, k = row.features_in * row.features_out, row.targets
        segments = tokens // row.tokens_per_segment
        operations.append(2 * tokens * k * weights / ((row.times["projection"] - 1.0) * row.plain_s))
        if row.tokens_per_segment <= 64:  # with few segments the difference to the plain product is noise
            moved.append(4 * (2 + 2 * k) * weights * segments / ((row.times["blocks"] - 1.0) * row.plain_s))
    return {"operations": statistics.median(operations), "bytes": statistics.median(moved)}


def measure(
    features_in: int,
    features_out: int,
    length: int,
    targets: int,
    *,
    tokens: int,
    repetitions: int,
    device: torch.device,
) -> Row:
    """One line: ``tokens`` tokens in segments of ``length``, each a row of its own."""
    cuda, segments = device.type == "cuda", tokens // length
    dtype = torch.bfloat16 if cuda else torch.float32
    a = torch.randn(length, segments, features_in, device=device).to(dtype)
    b = torch.randn(length, segments, features_out, device=device).to(dtype)
    directions = list(torch.randn(targets, features_out, features_in, device=device).to(dtype))
    dots = torch.zeros(segments, targets, dtype=torch.float64, device=device)
    # The paper's form: the target's own activations and output gradients, one pair of matrices per target.
    pairs = [
        (
            torch.randn(VALIDATION_TOKENS, features_in, device=device).to(dtype),
            torch.randn(VALIDATION_TOKENS, features_out, device=device).to(dtype),
        )
        for _ in range(targets)
    ]

    def projection() -> Tensor:
        dots.add_(token_dots(a, b, directions).sum(0))
        return weight_gradient(a, b)

    def gram() -> Tensor:
        for k, (x, y) in enumerate(pairs):
            dots[:, k] += ((a @ x.t()) * (b @ y.t())).sum((0, 2))
        return weight_gradient(a, b)

    forms: dict[str, Callable[[], object]] = {"projection": projection, "gram": gram}
    if cuda:
        from inrun_megatron.dots import triton_blocks, triton_linear

        def scored(form: Callable[..., tuple[Tensor, Tensor]]) -> None:
            late = LateDots(dots)
            late.add_parts(form(a, b, directions, 1)[1])
            late.flush()

        def one_row() -> None:
            late = LateDots(dots)
            late.add_parts(triton_blocks.block_dots(weight_gradient(a, b).unsqueeze(0), directions))
            late.flush()

        forms["blocks"] = lambda: scored(triton_blocks.blocks_and_dots)
        if segments == 1:  # what a microbatch of one row takes: dots of the product that training uses
            forms["one row"] = one_row
        fused = triton_linear.weight_gradient_and_dots
        forms["fused"] = lambda: scored(fused)
        # The kernel's tiles, one of which it takes by itself.
        forms["large tiles"] = lambda: scored(partial(fused, by=triton_linear.LARGE))
        forms["small tiles"] = lambda: scored(partial(fused, by=triton_linear.SMALL))
    else:

        def blocks() -> None:
            late = LateDots(dots)
            blocks_and_dots(a, b, directions, 1, late)
            late.flush()

        forms["blocks"] = blocks
    plain = _seconds(lambda: weight_gradient(a, b), repetitions, cuda)
    times = {name: _seconds(work, repetitions, cuda) / plain for name, work in forms.items()}
    eligible = [name for name in times if name in ("blocks", "projection", "fused")]
    shape = cost.Shape(tokens, segments, features_in, features_out, targets)
    return Row(
        features_in,
        features_out,
        length,
        targets,
        plain,
        times,
        fastest=min(eligible, key=lambda name: times[name]),
        picked=cost.cheapest(shape, cost.gpu if cuda else cost.cpu, *eligible),
    )


def _table(rows: list[Row], title: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.times))
    table = Table(title=title)
    for column in (
        "in x out",
        "targets",
        "tokens per segment",
        *names,
        "fastest",
        "picked",
        "lost by the rule",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        lost = row.times[row.picked] / row.times[row.fastest] - 1.0
        table.add_row(
            f"{row.features_in} x {row.features_out}",
            str(row.targets),
            str(row.tokens_per_segment),
            *(f"{row.times[name]:.2f}" if name in row.times else "-" for name in names),
            row.fastest,
            row.picked,
            f"{100 * lost:.0f}%",
        )
    return table


def main(
    hidden: Annotated[list[int] | None, typer.Option(help="hidden sizes; weights are [4 h, h]")] = None,
    targets: Annotated[list[int] | None, typer.Option(help="numbers of targets")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens of the microbatch; 1024, 8192 on a GPU")] = None,
    repetitions: Annotated[
        int, typer.Option(help="repetitions; the fastest counts, on a GPU the median")
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure the forms of linear dots. Example: python -m benchmarks.dots --hidden 256 --targets 1"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    tokens = tokens or (8192 if cuda else 1024)
    rows = [
        measure(h, 4 * h, length, k, tokens=tokens, repetitions=repetitions, device=device)
        for h in hidden or ([1024, 2048] if cuda else [256, 512])
        for k in targets or [1, 4]
        for length in (GPU_LENGTHS if cuda else LENGTHS)
        if length <= tokens
    ]
    found = {} if cuda else rates(rows, tokens)
    if as_json:
        print(json.dumps({**found, "rows": [asdict(row) for row in rows]}))
        return
    name = torch.cuda.get_device_name() if cuda else "CPU, 1 thread"
    console = Console(width=max(120, Console().width))
    console.print(", ".join([name, *(f"{rate:.2g} {unit}/s" for unit, rate in found.items())]))
    console.print(_table(rows, f"Gradient and dots over the plain weight gradient, {tokens} tokens"))


if __name__ == "__main__":
    typer.run(main)
