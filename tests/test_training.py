"""The engine trains alike in every layout and, nearly, in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inrun_megatron.config import (
    Config,
    DataConfig,
    ParallelConfig,
    ShapleyConfig,
    TrainingConfig,
)
from inrun_megatron.losses import masked_mean
from inrun_megatron.training.batches import StepLoader
from inrun_megatron.training.deepspeed_config import merge
from tests.distributed import Workers
from tests.sequences import SEQUENCE, Sequences
from tests.small_models import VOCABULARY, model_config

STEPS = 3


def settings(*, shape: str = "gpt2", tp: int = 1, sp: bool = False, zero: int = 0, **training: Any) -> Config:
    arguments: dict[str, Any] = {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": STEPS,
        "lr": 0.1,
    }
    return Config(
        model=model_config(shape),
        data=DataConfig(data_path=("unused",), seq_length=SEQUENCE),
        training=TrainingConfig(**(arguments | training)),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sp, zero_stage=zero),
        shapley=ShapleyConfig(enabled=False),
    )


def _train(rank: int, world: int, config: Config, left_out: str | None = None) -> dict[str, Any]:
    """STEPS steps; losses, gradient norms, and the final norm's weight. left_out: a function of engine.py."""
    import torch.distributed as dist

    from inrun_megatron.models import token_losses
    from inrun_megatron.parallel import Layout
    from inrun_megatron.training import distributed, engine

    distributed.initialise(config.parallel)
    layout = Layout.from_megatron()
    config, deepspeed_config, batch = merge(config, layout.dp_size)
    with pytest.MonkeyPatch.context() as patch:
        if left_out is not None:
            patch.setattr(engine, left_out, lambda *arguments: [])
        trainer = engine.build_trainer(config, deepspeed_config, batch, VOCABULARY)
    loader = StepLoader(Sequences(), batch, dp_rank=layout.dp_rank, consumed_samples=0)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = torch.zeros(())
        for microbatch in loader.next_step():
            one = masked_mean(token_losses(trainer.engine, microbatch), microbatch["loss_mask"])
            trainer.engine.backward(one)
            trainer.engine.step()
            loss += one.detach() / batch.accumulation / layout.dp_size
        dist.all_reduce(loss, group=layout.dp_group)
        losses.append(loss.item())
        norms.append(trainer.engine.get_global_grad_norm())
        trainer.schedule.step(batch.size)
    loader.close()
    import deepspeed

    norm = trainer.model.decoder.final_layernorm.weight
    with deepspeed.zero.GatheredParameters([norm]):
        weight = norm.detach().float().clone()
    return {
        "losses": losses,
        "norms": [float(norm) for norm in norms],
        "weight": weight,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "marked": sum(
            getattr(parameter, "sequence_parallel", False) for parameter in trainer.model.parameters()
        ),
    }


SGD: dict[str, Any] = {"optimizer": "sgd", "clip_grad": 0.5}
LAYOUTS = [
    {"zero": 1},
    {"zero": 2},
    {"zero": 3},
    {"tp": 2},
    {"tp": 2, "zero": 2},
    {"tp": 2, "sp": True},
    {"tp": 2, "sp": True, "zero": 1},
    {"tp": 2, "sp": True, "zero": 3},
]
# What differs by shape is how layers are split; what a ZeRO stage holds is the same flat vector.
LLAMA_LAYOUTS = [{"zero": 3}, {"tp": 2}, {"tp": 2, "sp": True}]
CASES = [(layout, "gpt2") for layout in LAYOUTS] + [(layout, "llama") for layout in LLAMA_LAYOUTS]


@pytest.fixture(scope="module")
def baseline(two_ranks: Workers) -> dict[str, dict[str, Any]]:
    return {shape: two_ranks.run(_train, settings(shape=shape, **SGD))[0] for shape in ("gpt2", "llama")}


@pytest.mark.parametrize(("layout", "shape"), CASES, ids=str)
def test_training_does_not_depend_on_the_layout(
    two_ranks: Workers, baseline: dict[str, dict[str, Any]], layout: dict[str, Any], shape: str
) -> None:
    """SGD with clipping: a gradient that is off by a factor, or counted twice in the norm, shows."""
    expected = baseline[shape]
    for result in two_ranks.run(_train, settings(shape=shape, **layout, **SGD)):
        assert result["losses"] == pytest.approx(expected["losses"], rel=2e-6)
        assert result["norms"] == pytest.approx(expected["norms"], rel=2e-5)
        torch.testing.assert_close(result["weight"], expected["weight"], rtol=0, atol=1e-6)
    assert (
        expected["norms"][0] > 0.5 and (expected["weight"] - 1).abs().max() > 1e-4
    )  # clipping and training happened


def test_without_the_sum_sequence_parallel_training_is_wrong(
    two_ranks: Workers, baseline: dict[str, dict[str, Any]]
) -> None:
    """Control: DeepSpeed alone lets the replicas of a norm drift apart."""
    results = two_ranks.run(_train, settings(tp=2, sp=True, **SGD), "sum_partial_gradients")
    assert results[0]["marked"] == 14  # 5 norms with weight and bias, 2 row-parallel biases per layer
    assert (results[0]["weight"] - results[1]["weight"]).abs().max() > 1e-5
    assert (results[0]["weight"] - baseline["gpt2"]["weight"]).abs().max() > 1e-5


BF16 = [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"tp": 2, "zero": 0}, {"tp": 2, "sp": True, "zero": 2}]


@pytest.mark.parametrize("layout", BF16, ids=str)
def test_bf16_is_near_fp32(
    two_ranks: Workers, baseline: dict[str, dict[str, Any]], layout: dict[str, Any]
) -> None:
    result = two_ranks.run(_train, settings(bf16=True, **layout, **SGD))[0]
    assert result["losses"] == pytest.approx(baseline["gpt2"]["losses"], rel=2e-3)
    assert result["losses"] != baseline["gpt2"]["losses"]
    assert result["norms"] == pytest.approx(baseline["gpt2"]["norms"], rel=1e-2)


def test_canary_unfused_optimizer_forgets_tensor_parallel_shards(
    two_ranks: Workers, baseline: dict[str, dict[str, Any]]
) -> None:
    """Control of `mark_tensor_parallel_gradients`: without it DeepSpeed's norm misses rank 1's shards."""
    config = settings(bf16=True, tp=2, zero=0, **SGD)
    result = two_ranks.run(_train, config, "mark_tensor_parallel_gradients")[0]
    assert result["norms"][0] < 0.98 * baseline["gpt2"]["norms"][0]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_bf16_takes_no_step_before_the_first(two_ranks: Workers, optimizer: str) -> None:
    """At stage 0 DeepSpeed's optimizer takes one when it is built: decay at the whole learning rate, Adam's t one ahead."""
    rest: dict[str, Any] = {"bf16": True, "optimizer": optimizer, "weight_decay": 2.0, "lr": 0.05}
    at = [two_ranks.run(_train, settings(zero=stage, **rest))[0] for stage in (0, 1)]
    assert at[0]["losses"] == pytest.approx(at[1]["losses"], rel=1e-3)
    assert at[1]["losses"][2] != pytest.approx(at[1]["losses"][0], rel=5e-3)  # a step does more than that
