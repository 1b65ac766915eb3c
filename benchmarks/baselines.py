"""Four ways to the same values, on one model and one batch: time, memory, and whether they agree.

    python -m benchmarks.baselines             # the table in docs/performance.md
    python -m benchmarks.baselines --json

Every way ends with the batch's gradient in ``.grad`` and ``<grad L, g_i>`` of every sample (the paper's first-order value
over the learning rate):

    naive        a backward pass per sample, its gradient times a stored validation gradient
    gram         one pass over training and validation samples concatenated; per layer <A_i A_v^T, B_i B_v^T>
                 (arXiv 2406.11011, section 4.2), no validation gradient stored
    projection   a stored validation gradient D; per layer and token B_t . (D A_t)
    ours         a stored direction; per layer the blocks of the weight gradient (dots/linear.py)

Each runs in a process of its own. Seconds are processor time (the smallest repetition) on one thread, so that neighbours
count less; memory is what the process's peak rose by above that of plain passes. Without a GPU and without DeepSpeed's step, which would be the same for
all four; the whole step is timed by benchmarks/overhead.py.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.output import answer, table_of
from benchmarks.runs import random_microbatches, start

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """The model and the batch; the embedding is not tied to the output layer, whose Gram form would need cross terms."""

    hidden: int
    layers: int
    seq_length: int
    train: int
    validation: int
    vocab: int
    repetitions: int


@dataclass(frozen=True)
class Outcome:
    """Of one way; seconds of processor time, MiB."""

    way: str
    plain_s: float  # forward and backward of the training batch alone
    seconds: float
    memory_mb: float
    values: list[float]


class Scene:
    """Model, batch and the pieces that the ways share."""

    def __init__(self, setting: Setting) -> None:
        from inrun_megatron.model_config import ModelConfig
        from inrun_megatron.models import build_gpt

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        start(1, 1, 1)
        config = ModelConfig(
            num_layers=setting.layers,
            hidden_size=setting.hidden,
            num_attention_heads=max(1, setting.hidden // 64),
            untie_embeddings_and_output_weights=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
        self.model: nn.Module = build_gpt(
            config, vocab_size=setting.vocab, seq_length=setting.seq_length, seed=1
        )
        case = Case("", setting.hidden, setting.layers, setting.seq_length, setting.train, 0, 1, 0)
        rows = setting.train, setting.validation
        [self.train], [self.validation] = (
            random_microbatches(case, setting.vocab, n, seed, size=n) for seed, n in enumerate(rows)
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss per token; of one sample: its share of a batch in which all count the same."""
        from inrun_megatron.models import token_losses

        return token_losses(self.model, batch).mean()

    def tapped(self) -> tuple[Any, Any]:
        """Taps, and directions for one target in one flat buffer."""
        from inrun_megatron import Layout, attach_taps
        from inrun_megatron.directions import Directions
        from inrun_megatron.engines.shards import FlatGroup, Residence, Span

        taps = attach_taps(self.model)
        spans, start = [], 0
        for parameter in self.parameters:
            spans.append(Span(parameter, start, parameter.numel()))
            start += parameter.numel()
        group = FlatGroup(Residence.REPLICATED, start, 0, start, spans, torch.device("cpu"))
        return taps, Directions([group], taps.sharding, Layout.current(), 1)


def _rows(batch: Batch, which: slice) -> Batch:
    return {name: column[which] for name, column in batch.items()}


def naive(scene: Scene) -> Callable[[], Tensor]:
    parameters, count = scene.parameters, len(scene.train["tokens"])

    def run() -> Tensor:
        stored = torch.autograd.grad(scene.loss(scene.validation), parameters)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        values = []
        for i in range(count):
            gradients = torch.autograd.grad(
                scene.loss(_rows(scene.train, slice(i, i + 1))) / count, parameters
            )
            products = [(g * d).sum(dtype=torch.float64) for g, d in zip(gradients, stored, strict=True)]
            values.append(torch.stack(products).sum())
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad.add_(gradient)  # type: ignore[union-attr]
        return torch.stack(values)

    return run


def gram(scene: Scene) -> Callable[[], Tensor]:
    from inrun_megatron.dots.elementwise import row_gradients
    from inrun_megatron.models import token_losses
    from inrun_megatron.taps import Emission, Pass

    taps, _ = scene.tapped()
    n = len(scene.train["tokens"])
    both = {name: torch.cat([scene.train[name], scene.validation[name]]) for name in scene.train}
    share = torch.ones(len(both["tokens"]), 1) / n
    share[n:] = 1.0 / (len(share) - n)
    share = share / both["tokens"].shape[1]
    values = torch.zeros(n, dtype=torch.float64)

    def add(parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def consume(e: Emission) -> None:
        dim = e.site.batch_dim
        b = e.output_grad.movedim(dim, 0)
        if e.activation is None or e.site.kind == "norm":
            scaled = b if e.activation is None else b * e.activation.movedim(dim, 0)
            vectors = [(e.weight, scaled), *([(e.bias, b)] if e.bias is not None else [])]
            for parameter, tokens in vectors:
                rows = row_gradients(tokens, 0, torch.float32)
                values.add_(rows[:n] @ rows[n:].sum(0))
                add(parameter, rows[:n].sum(0))
            return
        a = e.activation.movedim(dim, 0)
        train_b, target_b = b[:n], b[n:].flatten(0, 1)
        if e.site.kind == "embedding":
            same = a[:n].unsqueeze(-1) == a[n:].flatten()
            values.add_(((train_b @ target_b.t()) * same).sum((1, 2)))
            add(e.weight, torch.zeros_like(e.weight).index_add_(0, a[:n].flatten(), train_b.flatten(0, 1)))
            return
        values.add_(((a[:n] @ a[n:].flatten(0, 1).t()) * (train_b @ target_b.t())).sum((1, 2)))
        add(e.weight, train_b.flatten(0, 1).t() @ a[:n].flatten(0, 1))

    def run() -> Tensor:
        values.zero_()
        for parameter in scene.parameters:
            parameter.grad = None
        with taps.during(Pass(consumers=(consume,), detached=True)):
            (token_losses(scene.model, both) * share).sum().backward()
        return values.clone()

    return run


def _scored(scene: Scene, scorer: Callable[[Any, Tensor], Any]) -> Callable[[], Tensor]:
    """A validation pass into directions, then the training pass with ``scorer(directions, dots)``."""
    from inrun_megatron.shapley.consumers import DirectionFiller
    from inrun_megatron.taps import Pass

    taps, directions = scene.tapped()
    dots = torch.zeros(len(scene.train["tokens"]), 1, dtype=torch.float64)

    def run() -> Tensor:
        dots.zero_()
        directions.zero()
        for parameter in scene.parameters:
            parameter.grad = None
        with taps.during(Pass(consumers=(DirectionFiller(directions, 0),), detached=True)):
            scene.loss(scene.validation).backward()
        consumer = scorer(directions, dots)
        with taps.during(Pass(consumers=(consumer,))):
            scene.loss(scene.train).backward()
        consumer.flush()
        return dots[:, 0].clone()

    return run


def ours(scene: Scene) -> Callable[[], Tensor]:
    from inrun_megatron.shapley.consumers import RowScorer

    return _scored(scene, RowScorer)


def projection(scene: Scene) -> Callable[[], Tensor]:
    from inrun_megatron.dots.projection import token_dots
    from inrun_megatron.shapley.consumers import RowScorer
    from inrun_megatron.taps import Emission

    class Projector(RowScorer):
        def __call__(self, e: Emission) -> None:
            if e.site.kind != "linear":
                super().__call__(e)
                return
            found = token_dots(e.input, e.output_grad, self.directions.of(e.weight))
            self.dots += found.sum(1 - e.site.batch_dim)

    return _scored(scene, Projector)


WAYS: dict[str, Callable[[Scene], Callable[[], Tensor]]] = {
    "naive": naive,
    "gram": gram,
    "projection": projection,
    "ours": ours,
}


def _seconds(work: Callable[[], Any], repetitions: int) -> float:
    found = []
    for _ in range(repetitions + 1):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found[1:])


def measure(way: str, setting: Setting) -> Outcome:
    """One way, in this process."""
    scene = Scene(setting)

    def plain() -> None:
        for parameter in scene.parameters:
            parameter.grad = None
        scene.loss(scene.train).backward()

    plain_s = _seconds(plain, setting.repetitions)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = WAYS[way](scene)
    values = run()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return Outcome(way, plain_s, _seconds(run, setting.repetitions), memory, values.tolist())


def disagreement(outcome: Outcome, reference: Outcome) -> float:
    """Largest difference of a value over the largest value."""
    largest = max(abs(v) for v in reference.values)
    return max(abs(a - b) for a, b in zip(outcome.values, reference.values, strict=True)) / largest


def _table(setting: Setting, outcomes: list[Outcome]) -> Table:
    plain = statistics.median(o.plain_s for o in outcomes)
    limit = 1.0 + setting.validation / setting.train
    table = table_of(
        f"{setting}; plain {plain:.3f} s, limit {limit:.3f}",
        (
            "way",
            "seconds",
            "over plain",
            "above the limit",
            "memory MiB",
            "disagreement with naive",
        ),
    )
    for o in outcomes:
        ratio = o.seconds / o.plain_s
        table.add_row(
            o.way,
            f"{o.seconds:.3f}",
            f"{ratio:.3f}",
            f"{100 * (ratio / limit - 1):+.1f}%",
            f"{o.memory_mb:.0f}",
            f"{disagreement(o, outcomes[0]):.1e}",
        )
    return table


def main(
    hidden: Annotated[int, typer.Option(help="hidden size")] = 256,
    layers: Annotated[int, typer.Option(help="transformer layers")] = 4,
    seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 256,
    train: Annotated[int, typer.Option(help="training sequences, one microbatch")] = 8,
    validation: Annotated[int, typer.Option(help="validation sequences")] = 2,
    vocab: Annotated[int, typer.Option(help="vocabulary size")] = 1024,
    repetitions: Annotated[int, typer.Option(help="repetitions; the fastest counts")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Compare ways to score a batch. Example: python -m benchmarks.baselines --hidden 128 --seq-length 64"""
    setting = Setting(hidden, layers, seq_length, train, validation, vocab, repetitions)
    outcomes = []
    for way in WAYS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            outcomes.append(pool.submit(measure, way, setting).result())
    record = {"setting": asdict(setting), "ways": [asdict(o) for o in outcomes]}
    answer(record, lambda: _table(setting, outcomes), as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
