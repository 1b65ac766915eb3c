"""The benchmark of docs/evidence.md: its statistics, its two training loops, and each experiment in miniature."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fidelity import (
    __main__ as program,
)
from benchmarks.fidelity import (
    baselines,
    corpus,
    curation,
    datamodel,
    harm,
    paraphrase,
    removal,
)
from benchmarks.fidelity.model import Shape, SmallGPT
from benchmarks.fidelity.statistics import auroc, mean, spearman, spearman_difference
from benchmarks.fidelity.training import DEFAULT, Recipe, epochs, retrained, scored_run, target_losses

TINY = Recipe(Shape(layers=1, hidden=16, heads=2, sequence=32), steps=6, batch=4, warmup=2)


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences `[12, s + 1]` and a target `[2, s + 1]` of English."""
    rows = corpus.rows(corpus.OTHER_LANGUAGES[0] + corpus.OTHER_LANGUAGES[1], 14, 32)
    return rows[:12], rows[12:]


def test_figures_of_known_cases() -> None:
    order = np.arange(40.0)
    assert spearman(order, order**3).value == pytest.approx(1.0)
    assert spearman(order, -order).value == pytest.approx(-1.0)
    both = np.stack([order, order], 1)
    assert spearman(both, np.stack([order, -order], 1)).value == pytest.approx(0.0)  # the mean of 1 and -1
    assert auroc([3.0, 4.0], [1.0, 2.0, 3.0]).value == pytest.approx(5.5 / 6)
    figure = mean([1.0, 2.0, 3.0])
    # Student's t with two degrees of freedom: 4.3027.
    assert (figure.low, figure.high) == pytest.approx(
        (2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4
    )
    groups = np.stack([order.reshape(20, 2)] * 2, -1)
    assert spearman(groups, groups**3).value == pytest.approx(1.0)
    constant = spearman(order, np.ones(40))
    assert (constant.value, constant.low, constant.high) == (0.0, 0.0, 0.0)
    ahead = spearman_difference(order, -order, order)
    assert ahead.value == ahead.low == pytest.approx(2.0)
    random = np.random.default_rng(0)
    figure = spearman(random.normal(size=60), random.normal(size=60))
    assert figure.low < 0 < figure.high


def test_the_plain_loop_trains_as_the_engine_does(text: tuple[torch.Tensor, torch.Tensor]) -> None:
    sequences, held_out = text
    order, targets = epochs(len(sequences), TINY, 0), {"held out": held_out}
    run = scored_run(TINY, sequences, order, targets, DEFAULT, 0)
    untrained = target_losses(SmallGPT(TINY.shape, 0), targets)
    plain = retrained(TINY, sequences, order, targets, 0)
    assert (plain - run.final_losses).abs().max() < 1e-6 < 0.01 < (untrained - plain).min()
    absent = torch.ones_like(order, dtype=torch.bool)
    absent[1, 2] = False
    assert (retrained(TINY, sequences, order, targets, 0, absent) - plain).abs().max() > 1e-6
    # Every value is somebody's, and the last steps' sums leave the first ones out.
    assert run.by_sample(len(sequences)).sum() == pytest.approx(float(run.values.sum()))
    assert run.by_sample(len(sequences), first_step=6).sum() == pytest.approx(float(run.values[5].sum()))
    # Normalised, every step weighs as much as its samples; rules are sums over the whole run or its last two thirds.
    sums = run.by_rule(len(sequences))
    assert set(sums) == {
        f"{kind}, {when}" for kind in ("raw", "normalised") for when in ("whole run", "last two thirds")
    }
    scaled = run.values / run.values.abs().mean(1, keepdim=True)
    assert sums["normalised, whole run"].sum() == pytest.approx(float(scaled.sum()))
    assert sums["raw, last two thirds"].sum() == pytest.approx(float(run.values[2:].sum()))
    assert run.credited("trajectory")[0].sum() > run.credited("step")[0].sum() > 0
    assert torch.equal(run.credited("trajectory")[-1], run.credited("step")[-1])  # nothing comes after it


def test_baselines(text: tuple[torch.Tensor, torch.Tensor]) -> None:
    sequences, _ = text
    targets = {"third": sequences[3:4], "fifth": sequences[5:6]}
    assert baselines.overlap(sequences, targets).argmax(0).tolist() == [3, 5]
    weights = SmallGPT(TINY.shape, 0).state_dict()
    dots = baselines.gradient_dot(TINY.shape, weights, sequences, targets)
    assert dots.shape == (12, 2)
    assert dots[5, 0] == pytest.approx(float(dots[3, 1]), rel=1e-4)  # symmetric
    losses = baselines.negative_loss(
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [1, 2]]), 3, 1
    )
    assert losses[:, 0].tolist() == [-1.0, -3.0, -4.0]  # the last time counts


def test_passages_fill_a_sequence() -> None:
    passages = tomllib.loads((Path(paraphrase.__file__).parent / "passages.toml").read_text())["passage"]
    assert len(passages) == 10
    for passage in passages:
        assert set(passage) == set(paraphrase.KINDS)
        assert min(len(text.encode()) for text in passage.values()) >= 129


MINIATURES = {
    "loo": (
        removal,
        removal.Setting(dataclasses.replace(TINY, steps=14), points=6, rows=2, target_rows=2, seeds=1),
    ),
    "lds": (datamodel, datamodel.Setting(TINY, sources=1, rows=6, target_rows=2, halves=4)),
    "harm": (harm, harm.Setting(TINY, rows=24, bad=2, target_rows=1, seeds=1)),
    "curation": (curation, curation.Setting(TINY, rows=24, target_rows=1, judge_rows=2, seeds=2)),
    "paraphrase": (
        paraphrase,
        paraphrase.Setting(dataclasses.replace(TINY, shape=dataclasses.replace(TINY.shape, sequence=128)), 6),
    ),
}


def _texts() -> dict[str, list[dict[str, str]]]:
    """What the demo's corpus gives, in small."""
    words = " ".join(corpus.OTHER_LANGUAGES)
    names = ("code", "prose", "shuffled", "target_code", "target_prose")
    return {name: [{"text": words[i:] + words[:i], "module": name}] for i, name in enumerate(names)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_every_item_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, setting = MINIATURES[name]
    monkeypatch.setattr(module, "SMALL", setting)
    monkeypatch.setattr(corpus, "records", _texts)
    with ThreadPoolExecutor(1) as pool:
        outcome = program.ITEMS[name].run(pool, False)
    program.write(program.ITEMS[name], outcome, "test", 0.0, tmp_path)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["tables"][0]["rows"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for table in outcome.tables:
        assert len({tuple(row) for row in table.rows}) == 1, "rows of one table have the same columns"


def test_an_unknown_item_is_named() -> None:
    with pytest.raises(
        program.typer.BadParameter,
        match="nothing is none of step, experts, loo, lds, harm, curation, paraphrase",
    ):
        program.main(only=["nothing"])
