"""The oracle checked against autograd of the whole batch and finite differences."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import (
    GPTShape,
    OptimizerSpec,
    OracleGPT,
    OracleTarget,
    dot,
    random_parameters,
    random_rows,
    sample_gradients,
    split_batch,
    target_gradient,
    with_padded_vocab,
)
from tests.oracle_cases import EACH_OPTIMIZER, GPT2, OPTIMIZERS, SHAPES, batch_loss, make_batch, make_trainer
from tests.oracle_optimizer import global_norm


@SHAPES
def test_sample_gradients_sum_to_the_gradient_of_the_batch(shape: GPTShape) -> None:
    model, parameters, batch = OracleGPT(shape), random_parameters(shape), make_batch(shape)
    samples = sample_gradients(model, parameters, batch)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    loss = batch_loss(model, leaves, batch)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    total = samples.total()
    scale = global_norm(expected)
    assert samples.loss == pytest.approx(loss.item(), rel=1e-12)
    assert all((total[name] - expected[name]).abs().max() < 1e-12 * scale for name in expected)
    # The row-wise mean, where the loss is a token mean, is off by far more than the tolerance.
    rowwise = [
        [{**m, "loss_mask": m["loss_mask"] / m["loss_mask"].sum(1, keepdim=True)} for m in r] for r in batch
    ]
    wrong = sample_gradients(model, parameters, rowwise).total()
    assert max((wrong[name] - expected[name]).abs().max() for name in expected) > 1e-3 * scale


@SHAPES
def test_sample_gradient_is_the_slope_of_that_samples_share(shape: GPTShape) -> None:
    model, parameters, batch = OracleGPT(shape), random_parameters(shape), make_batch(shape)
    samples = sample_gradients(model, parameters, batch)
    generator = torch.Generator().manual_seed(3)
    probe = {name: torch.randn(v.shape, generator=generator, dtype=v.dtype) for name, v in parameters.items()}
    # Sample 3 is row 1 of replica 0's second microbatch.
    microbatch = batch[0][1]
    row = {key: value[1:2] for key, value in microbatch.items()}

    def share(distance: float) -> float:
        moved = {name: value + distance * probe[name] for name, value in parameters.items()}
        losses = model.token_losses(moved, row)
        return float((losses * row["loss_mask"]).sum() / microbatch["loss_mask"].sum() / 4)

    slope = (share(1e-5) - share(-1e-5)) / 2e-5
    gradient = {name: stack[3] for name, stack in samples.stacked.items()}
    assert float(dot(gradient, probe)) == pytest.approx(slope, rel=1e-7)
    assert float(dot({name: stack[2] for name, stack in samples.stacked.items()}, probe)) != pytest.approx(
        slope, rel=1e-2
    )


@SHAPES
def test_target_gradient_is_that_of_the_token_mean_over_all_sequences(shape: GPTShape) -> None:
    model, parameters = OracleGPT(shape), random_parameters(shape)
    rows = random_rows(shape, 4, 7)
    # Split as over two data-parallel ranks, one padded with a row without loss tokens.
    empty = {key: torch.zeros_like(value[:1]) for key, value in rows.items()}
    parts = [{k: v[:3] for k, v in rows.items()}, {k: torch.cat((v[3:], empty[k])) for k, v in rows.items()}]
    loss, gradient = target_gradient(model, parameters, OracleTarget.from_microbatches("t", parts))
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    mask = rows["loss_mask"].double()
    whole = (model.token_losses(leaves, rows) * mask).sum() / mask.sum()
    expected = dict(zip(leaves, torch.autograd.grad(whole, list(leaves.values())), strict=True))
    assert loss == pytest.approx(whole.item(), rel=1e-12)
    assert all(torch.allclose(gradient[name], expected[name], rtol=0, atol=1e-13) for name in expected)


@SHAPES
def test_padding_of_the_vocabulary_changes_nothing(shape: GPTShape) -> None:
    parameters, rows = random_parameters(shape), random_rows(shape, 2, 5)
    wider = GPTShape(**{**vars(shape), "padded_vocab_size": 32})
    padded = with_padded_vocab(parameters, shape.vocab_size, 32)
    losses = OracleGPT(shape).token_losses(parameters, rows)
    assert torch.equal(OracleGPT(wider).token_losses(padded, rows), losses)
    as_real = GPTShape(**{**vars(shape), "vocab_size": 32, "padded_vocab_size": 32})
    assert not torch.allclose(OracleGPT(as_real).token_losses(padded, rows), losses)


@SHAPES
def test_sgd_value_is_the_slope_of_the_utility(shape: GPTShape) -> None:
    """U_k({i}) with an ever smaller share of sample i's gradient; without momentum and decay Phi(0) is w."""
    trainer = make_trainer(shape, OptimizerSpec("sgd", clip=0.5))
    start, lr = dict(trainer.weights), trainer.lr
    batch = make_batch(shape)
    samples = sample_gradients(trainer.model, start, batch)
    step = trainer.step(batch)
    assert step.values is not None and step.clip_coefficient < 1
    for i, k in [(0, 0), (3, 1), (7, 0)]:

        def loss(share: float, i: int = i, k: int = k) -> float:
            moved = {
                n: w - lr * step.clip_coefficient * share * samples.stacked[n][i] for n, w in start.items()
            }
            return target_gradient(trainer.model, moved, trainer.targets[k])[0]

        slope = (loss(-1e-2) - loss(1e-2)) / 2e-2
        assert float(step.values[i, k]) == pytest.approx(slope, rel=1e-6)


@SHAPES
@EACH_OPTIMIZER
def test_values_add_up_to_the_direction_times_the_gradient(shape: GPTShape, spec: OptimizerSpec) -> None:
    trainer = make_trainer(shape, spec)
    steps = trainer.run([make_batch(shape, seed) for seed in range(3)]).steps
    for step in steps[1:]:
        assert step.values is not None and step.directions is not None
        for k, direction in enumerate(step.directions):
            expected = step.clip_coefficient * float(dot(direction, step.gradient))
            assert float(step.values[:, k].sum()) == pytest.approx(
                expected, abs=1e-12 * float(step.values.abs().sum())
            )


def test_values_and_drift_add_up_to_the_change_of_the_target_loss() -> None:
    """Efficiency: momentum makes a step linear in the gradient, so a tiny one has no other terms."""
    trainer = make_trainer(GPT2, OptimizerSpec("sgd", momentum=0.9, weight_decay=0.3, clip=0.5))
    trainer.run([make_batch(GPT2, seed) for seed in range(4)])
    trainer.schedule = 1e-6
    step = trainer.step(make_batch(GPT2, 9))
    after, _ = trainer.target_gradients()
    assert step.values is not None
    torch.testing.assert_close(step.values.sum(0) + step.drift, step.target_losses - after, rtol=1e-4, atol=0)
    assert (step.drift.abs() > 0.1 * step.values.sum(0).abs()).all()  # the sum would not hold without it


def test_adam_is_not_scored_before_it_has_a_derivative() -> None:
    run = make_trainer(GPT2, OPTIMIZERS["adamw"], at_zero=True).run(
        [make_batch(GPT2, seed) for seed in range(3)]
    )
    assert [values is not None for values in run.values] == [False, True, True]
    assert run.state.steps == 3
    at_target = make_trainer(GPT2, OPTIMIZERS["adamw"]).run([make_batch(GPT2, 0)])
    assert at_target.values[0] is not None and at_target.values[0].isfinite().all()
    proxy = make_trainer(GPT2, OPTIMIZERS["adamw"], proxy=True).run([make_batch(GPT2, 0)])
    assert proxy.values[0] is not None
    sgd = make_trainer(GPT2, OPTIMIZERS["sgd"]).run([make_batch(GPT2, 0)])
    assert sgd.values[0] is not None
    # Same weights and lr: the proxy differs from SGD in nothing but the clip coefficient, equal here too.
    torch.testing.assert_close(proxy.values[0], sgd.values[0], rtol=1e-12, atol=0)


def test_values_do_not_depend_on_how_equal_microbatches_are_laid_out() -> None:
    rows = random_rows(GPT2, 8, 1, masked=False)
    layouts = [(1, 1, 8), (2, 2, 2), (1, 8, 1), (4, 1, 2)]
    steps = [make_trainer(GPT2, OPTIMIZERS["sgd"]).step(split_batch(rows, *layout)) for layout in layouts]
    for step in steps[1:]:
        for key, value in steps[0].by_sample().items():
            torch.testing.assert_close(step.by_sample()[key], value, rtol=1e-11, atol=1e-15)
    # With masks of varying length the layout is part of the loss, and of the values.
    rows = random_rows(GPT2, 8, 1, masked=True)
    steps = [make_trainer(GPT2, OPTIMIZERS["sgd"]).step(split_batch(rows, *layout)) for layout in layouts[:2]]
    assert not torch.allclose(steps[0].by_sample()[0, 3], steps[1].by_sample()[0, 3], rtol=1e-3)


def test_split_batch_follows_megatrons_sampler() -> None:
    batch = split_batch(random_rows(GPT2, 12, 1), dp_size=2, accumulation=3, micro_batch_size=2)
    samples = [[microbatch["sample"].tolist() for microbatch in replica] for replica in batch]
    assert samples == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]


def test_tied_weight_counts_once_in_the_norm_and_gets_both_gradients() -> None:
    """Against the same model with an output layer of its own that holds the same numbers."""
    shape = GPTShape("gpt2", 1, 8, 2, vocab_size=11, seq_length=5)
    untied = GPTShape("gpt2", 1, 8, 2, vocab_size=11, seq_length=5, tied=False)
    parameters = random_parameters(shape)
    batch = make_batch(shape)
    copy = {**parameters, "output_layer.weight": parameters["embedding.word_embeddings.weight"].clone()}
    tied = sample_gradients(OracleGPT(shape), parameters, batch).total()
    apart = sample_gradients(OracleGPT(untied), copy, batch).total()
    both = apart["embedding.word_embeddings.weight"] + apart["output_layer.weight"]
    torch.testing.assert_close(tied["embedding.word_embeddings.weight"], both, rtol=1e-12, atol=1e-15)
    assert global_norm(tied) ** 2 == pytest.approx(sum(float((g * g).sum()) for g in tied.values()))
