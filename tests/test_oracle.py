"""The oracle checked against autograd of the whole batch, finite differences and torch.optim."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import (
    GlobalBatch,
    GPTShape,
    OptimizerSpec,
    OptimizerState,
    OracleGPT,
    OracleTarget,
    OracleTrainer,
    Parameters,
    dot,
    random_parameters,
    random_rows,
    sample_gradients,
    split_batch,
    target_gradient,
    with_padded_vocab,
)
from tests.oracle_optimizer import Moments, global_norm, jacobian_tensor, step_all, step_tensor

GPT2 = GPTShape(
    "gpt2",
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    vocab_size=13,
    seq_length=6,
    padded_vocab_size=16,
)
LLAMA = GPTShape(
    "llama",
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    vocab_size=13,
    seq_length=6,
)
SHAPES = pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
OPTIMIZERS = {
    "sgd": OptimizerSpec("sgd", weight_decay=0.1, clip=0.5),
    "momentum": OptimizerSpec("sgd", momentum=0.9, dampening=0.1, weight_decay=0.1),
    "nesterov": OptimizerSpec("sgd", momentum=0.9, nesterov=True),
    "adam": OptimizerSpec("adam", beta2=0.95, weight_decay=0.3, clip=0.5),
    "adamw": OptimizerSpec("adamw", beta2=0.95, weight_decay=0.3, clip=0.5),
}
EACH_OPTIMIZER = pytest.mark.parametrize("spec", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def make_batch(shape: GPTShape, seed: int = 1) -> GlobalBatch:
    """8 samples as 2 replicas x 2 accumulation steps x 2 rows, with loss masks of varying length."""
    return split_batch(random_rows(shape, 8, seed), 2, 2, 2)


def make_trainer(shape: GPTShape, spec: OptimizerSpec, **options: bool) -> OracleTrainer:
    targets = [OracleTarget(f"target{k}", random_rows(shape, 3, 50 + k)) for k in range(2)]
    return OracleTrainer(shape, random_parameters(shape), spec, lambda step: 0.01 / step, targets, **options)


def batch_loss(model: OracleGPT, parameters: Parameters, batch: GlobalBatch) -> Tensor:
    """Megatron's convention written out for whole microbatches."""
    means = []
    for replica in batch:
        for microbatch in replica:
            losses = model.token_losses(parameters, microbatch)
            mask = microbatch["loss_mask"].double()
            means.append((losses * mask).sum() / mask.sum())
    return torch.stack(means).mean()


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


@EACH_OPTIMIZER
def test_steps_equal_torch_optim(spec: OptimizerSpec) -> None:
    """Six steps of the trainer, with clipping and weight-decay groups, against torch's optimizers."""
    trainer = make_trainer(GPT2, spec)
    leaves = {name: value.clone().requires_grad_() for name, value in trainer.weights.items()}
    groups = [
        {"params": [p for n, p in leaves.items() if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for n, p in leaves.items() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if spec.kind == "sgd":
        options = {"momentum": spec.momentum, "dampening": spec.dampening, "nesterov": spec.nesterov}
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, **options)  # type: ignore[arg-type]
    else:
        kind = torch.optim.Adam if spec.kind == "adam" else torch.optim.AdamW
        optimizer = kind(groups, lr=1.0, betas=(spec.beta1, spec.beta2), eps=spec.eps)
    clipped = []
    for step in range(1, 7):
        batch = make_batch(GPT2, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / step
        optimizer.zero_grad()
        batch_loss(trainer.model, leaves, batch).backward()
        if spec.clip:
            torch.nn.utils.clip_grad_norm_(leaves.values(), spec.clip)
        optimizer.step()
        clipped.append(trainer.step(batch).clip_coefficient)
        worst = max((trainer.weights[name] - leaf).abs().max().item() for name, leaf in leaves.items())
        assert worst < 1e-12, f"step {step}"
    assert (max(clipped) < 1.0) == bool(spec.clip)


@EACH_OPTIMIZER
@pytest.mark.parametrize("steps", [0, 4])
def test_jacobian_is_the_derivative_of_the_step(spec: OptimizerSpec, steps: int) -> None:
    """J at zero gradient by autograd and by central differences, with a state from before the step."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(20, generator=generator, dtype=torch.float64)
    moments = Moments(
        torch.randn(20, generator=generator, dtype=torch.float64),
        torch.rand(20, generator=generator, dtype=torch.float64) + 0.1,
    )
    decay = spec.weight_decay

    def step(gradient: Tensor) -> Tensor:
        return step_tensor(spec, 0.01, steps, weight, gradient, moments, decay)[0]

    zero = torch.zeros_like(weight, requires_grad=True)
    (slope,) = torch.autograd.grad(step(zero).sum(), zero)
    difference = (step(torch.full_like(weight, 1e-5)) - step(torch.full_like(weight, -1e-5))) / 2e-5
    jacobian = jacobian_tensor(spec, 0.01, steps, weight, moments, decay)
    torch.testing.assert_close(jacobian, -slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(jacobian, -difference, rtol=1e-7, atol=0)


def test_adamw_jacobian_is_the_published_formula() -> None:
    spec, lr, t = OptimizerSpec("adamw", beta2=0.95, weight_decay=0.3), 0.01, 5
    weight, second = (
        torch.linspace(-1, 1, 9, dtype=torch.float64),
        torch.linspace(0.1, 2, 9, dtype=torch.float64),
    )
    moments = Moments(weight.flip(0), second)
    expected = lr * (1 - 0.9) / (1 - 0.9**t) / ((0.95 * second / (1 - 0.95**t)).sqrt() + 1e-8)
    torch.testing.assert_close(
        jacobian_tensor(spec, lr, t - 1, weight, moments, 0.3), expected, rtol=1e-14, atol=0
    )
    # Elements whose gradient was always zero: the derivative is large, but no NaN.
    unseen = Moments(torch.zeros(9), torch.zeros(9))
    for kind in ("adam", "adamw"):
        still = OptimizerSpec(kind)
        assert jacobian_tensor(still, lr, t - 1, weight, unseen, 0.0).isfinite().all()


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
    trainer._lr = 1e-6
    step = trainer.step(make_batch(GPT2, 9))
    after, _ = trainer.target_gradients()
    assert step.values is not None
    torch.testing.assert_close(step.values.sum(0) + step.drift, step.target_losses - after, rtol=1e-4, atol=0)
    assert (step.drift.abs() > 0.1 * step.values.sum(0).abs()).all()  # the sum would not hold without it


@pytest.mark.parametrize("steps", [0, 4])
def test_direction_at_the_target_is_the_step_on_the_validation_gradient(steps: int) -> None:
    """Without decay and with momentum at rest, J h is what AdamW's own step on h moves; at the first step too."""
    spec = OptimizerSpec("adamw", beta2=0.95)
    generator = torch.Generator().manual_seed(2)
    weight, slope = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
    second = torch.rand(20, generator=generator, dtype=torch.float64) * (steps > 0)
    moments = Moments(torch.zeros(20, dtype=torch.float64), second)
    moved = weight - step_tensor(spec, 0.01, steps, weight, slope, moments, 0.0)[0]
    jacobian = jacobian_tensor(spec, 0.01, steps, weight, moments, 0.0, slope)
    torch.testing.assert_close(jacobian * slope, moved, rtol=1e-12, atol=1e-15)
    at_zero = jacobian_tensor(spec, 0.01, steps, weight, moments, 0.0)
    assert ((at_zero * slope).abs() > 1.001 * moved.abs()).any()


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_the_two_jacobians_agree_where_the_target_gradient_is_small(kind: str) -> None:
    weight, second = (
        torch.linspace(-1, 1, 9, dtype=torch.float64),
        torch.linspace(0.1, 2, 9, dtype=torch.float64),
    )
    moments = Moments(weight.flip(0), second)
    spec = OptimizerSpec(kind, momentum=0.9, weight_decay=0.3)  # type: ignore[arg-type]
    at_zero = jacobian_tensor(spec, 0.01, 4, weight, moments, 0.3)
    near = jacobian_tensor(spec, 0.01, 4, weight, moments, 0.3, torch.full_like(weight, 1e-7))
    far = jacobian_tensor(spec, 0.01, 4, weight, moments, 0.3, torch.ones_like(weight))
    torch.testing.assert_close(near, at_zero, rtol=1e-10, atol=0)
    assert torch.allclose(far, at_zero, rtol=1e-6) == (kind == "sgd")


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


def test_state_is_not_changed_by_a_step_taken_from_it() -> None:
    parameters = random_parameters(GPT2)
    state = OptimizerState.initial(parameters)
    gradients = {name: torch.ones_like(value) for name, value in parameters.items()}
    first, _ = step_all(OPTIMIZERS["adamw"], 0.1, parameters, gradients, state)
    second, after = step_all(OPTIMIZERS["adamw"], 0.1, parameters, gradients, state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (state.steps, after.steps) == (0, 1)
