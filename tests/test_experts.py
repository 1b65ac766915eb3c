"""Mixture-of-experts layers of megatron-core on ranks: what taps see, what they refuse, and what they leave alone.

Values against the oracle: test_exactness.py, test_granularity.py, test_pipeline.py, test_path.py. Dots: test_routed.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from inrun_megatron.errors import UserError
from inrun_megatron.taps.routing import Routing
from tests.counting import standing_in
from tests.distributed import Workers
from tests.small_models import SEQUENCE, VOCABULARY, model_config

ROWS, EXPERTS, TOPK = 3, 4, 2


MIXTURE: dict[str, Any] = {
    "num_experts": EXPERTS,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "moe_shared_expert_gate": True,
    "moe_layer_freq": 2,
    "num_layers": 3,
}


def _batch(rows: int = ROWS) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (rows, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(SEQUENCE).repeat(rows, 1),
        "loss_mask": torch.ones(rows, SEQUENCE),
    }


def _initialise(tp: int, **sizes: int) -> None:
    from megatron.core import parallel_state

    from inrun_megatron.models import cpu

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False, **sizes)
    cpu.install()
    cpu.seed_everything(1, tp_rank=parallel_state.get_tensor_model_parallel_rank(), dp_rank=0)


def _build(tp: int = 1, **changes: Any) -> Any:
    from inrun_megatron.models import build_gpt

    _initialise(tp)
    config = model_config("llama", **{**MIXTURE, **changes})
    return build_gpt(
        config, vocab_size=VOCABULARY, seq_length=SEQUENCE, seed=7, sequence_parallel=tp > 1
    ).double()


def _trained(rank: int, world: int, tp: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    from inrun_megatron.engines.gradients import sum_partial_gradients
    from inrun_megatron.models import token_losses

    model = _build(tp)
    sum_partial_gradients(model, parallel_state.get_tensor_model_parallel_group())
    losses = token_losses(model, _batch())
    losses.mean().backward()
    return {
        "losses": losses.detach(),
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "router": model.decoder.layers[0].mlp.router.weight.grad,
        "layers": [type(layer.mlp).__name__ for layer in model.decoder.layers],
    }


def test_loss_and_parameters_do_not_depend_on_tensor_parallelism(two_ranks: Workers) -> None:
    from inrun_megatron.models.initialise import shard

    (one, _), (first, second) = (two_ranks.run(_trained, tp) for tp in (1, 2))
    assert one["layers"] == ["MoELayer", "MLP", "MoELayer"]
    for other in (first, second):
        # The router's softmax is fp32 in every precision.
        torch.testing.assert_close(other["losses"], one["losses"], rtol=1e-6, atol=0)
        torch.testing.assert_close(other["router"], one["router"], rtol=1e-4, atol=1e-8)
    experts = [
        name for name in one["parameters"] if ".mlp." in name and ("experts" in name or "router" in name)
    ]
    assert len(experts) == 2 * (2 * EXPERTS + 1 + 3)
    whole = {name: one["parameters"][name] for name in experts}
    assert len({tuple(w.flatten()[:5].tolist()) for w in whole.values()}) == len(experts)  # all drawn anew
    for name, weight in whole.items():
        for rank, part in enumerate((first["parameters"][name], second["parameters"][name])):
            differing = [d for d in range(2) if part.shape[d] != weight.shape[d]]
            stride = 2 if "linear_fc1" in name else 1
            cut = shard(weight, differing[0], stride, rank, 2) if differing else weight
            assert torch.equal(part, cut), name
            assert bool(differing) == ("router" not in name and "gate_weight" not in name)


class _Rows:
    """A consumer that asks which tokens experts see, and keeps the rows of those with a gradient."""

    def __init__(self) -> None:
        self.reached: set[int] = set()
        self.seen = 0

    def route(self, routing: Routing) -> None:
        assert routing.total == ROWS * SEQUENCE

    def __call__(self, emission: Any) -> None:
        if emission.routed is not None:
            self.seen += 1
            rows = emission.routed.of(emission.routed.routing.rows(ROWS))
            self.reached |= set(rows[emission.output_grad.abs().sum(1) > 0].tolist())


class _Gathers:
    """`torch.distributed` that counts gathers."""

    calls = 0

    def __getattr__(self, name: str) -> Any:
        self.calls += name == "all_gather_into_tensor"
        return getattr(torch.distributed, name)


def _rows_reached(rank: int, world: int, tp: int, dispatcher: str, recompute: bool) -> tuple[set[int], int]:
    """The rows in which the loss of row 1 has a gradient, and how many emissions of experts there were."""
    from inrun_megatron.models import token_losses
    from inrun_megatron.models.recompute import enable_recompute
    from inrun_megatron.taps import Pass, attach_taps

    model = _build(tp)
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "token_dispatcher"):
            layer.mlp.token_dispatcher = _dispatcher(layer.mlp, dispatcher)
    taps = attach_taps(model)
    if recompute:
        enable_recompute(model.decoder, 1, wrap=taps.capture)
    rows, gathers = _Rows(), _Gathers()
    with standing_in(gathers, ("taps.experts",)):
        with taps.during(Pass((rows,), rows=ROWS, positions=SEQUENCE)):
            losses = token_losses(model, _batch())
        losses[1].sum().backward()  # in which a checkpoint runs the forward again
    mixtures = 2
    assert gathers.calls == (mixtures if tp > 1 else 0)
    return rows.reached, rows.seen


def _dispatcher(layer: Any, kind: str) -> Any:
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    kinds = {
        "allgather": token_dispatcher.MoEAllGatherTokenDispatcher,
        "alltoall": token_dispatcher.MoEAlltoAllTokenDispatcher,
    }
    if kind == "alltoall":
        # Without CUDA there are no streams, and nothing that has to be copied to the host.
        kinds[kind].cuda_dtoh_stream = object()
        kinds[kind]._maybe_dtoh_and_synchronize = lambda self, point, tokens_per_expert=None: (
            tokens_per_expert
        )
    return kinds[kind](
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=get_default_pg_collection(),
    )


@pytest.mark.parametrize(
    ("tp", "dispatcher", "recompute"),
    [(1, "allgather", False), (2, "allgather", True), (1, "alltoall", True), (2, "alltoall", False)],
)
def test_a_row_has_gradients_in_its_own_tokens_alone(
    two_ranks: Workers, tp: int, dispatcher: str, recompute: bool
) -> None:
    """With either dispatcher. Under tensor parallelism the routers' choices are gathered once a layer, also where the forward
    is run again."""
    for reached, seen in two_ranks.run(_rows_reached, tp, dispatcher, recompute):
        assert reached == {1} and seen == 2 * 2 * EXPERTS


def _refusals(rank: int, world: int) -> list[str]:
    """Messages of layers that have no taps."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from inrun_megatron.models import experts
    from inrun_megatron.taps import attach_taps

    experts.install()
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 4}
    usual = {"add_bias_linear": False, "use_cpu_initialization": True, "moe_ffn_hidden_size": 8}
    found = []
    for changes, groups in (
        ({"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}, {}),
        ({"add_bias_linear": True}, {}),
        ({"expert_model_parallel_size": world}, {"expert_model_parallel_size": world}),
    ):
        _initialise(1, **groups)
        config = TransformerConfig(**{**sizes, **usual, **changes})
        layer = build_module(get_gpt_layer_local_spec(num_experts=4), config=config, layer_number=1)
        with pytest.raises(UserError) as caught:
            attach_taps(layer)
        found.append(str(caught.value))
    _initialise(1)
    layer = build_module(
        get_gpt_layer_local_spec(num_experts=4), config=TransformerConfig(**sizes, **usual), layer_number=1
    )
    for alone in (layer.mlp.experts, layer.mlp.experts.local_experts[0].linear_fc1):
        with pytest.raises(UserError) as caught:
            attach_taps(alone)
        found.append(str(caught.value))
    attach_taps(layer).detach()
    own = type("Cosine", (type(layer.mlp.router),), {"gating": lambda self, input: input})
    layer.mlp.router.__class__ = own
    with pytest.raises(UserError) as caught:
        attach_taps(layer)
    found.append(str(caught.value))
    return found


def test_what_taps_do_not_know_is_refused_by_name(two_ranks: Workers) -> None:
    padded, biases, spread, outside, single, gating = two_ranks.run(_refusals)[0]
    assert "moe_pad_expert_input_to_capacity=True, which has no tap yet: use False" in padded
    assert "biases" in biases and "use add_bias_linear=False" in biases
    assert "expert_model_parallel_size=1" in spread and "layer mlp has" in spread
    assert gating.startswith("layer mlp.router is a Cosine with a gating of its own")
    assert "outside a MoELayer" in outside and "outside a MoELayer" in single


def _counts(rank: int, world: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """What a router with biases has counted: at first, after a detached pass, after one that trains; and what is logged of its
    balance after either."""
    from inrun_megatron.models import build_gpt, token_losses
    from inrun_megatron.taps import Pass, attach_taps
    from inrun_megatron.taps.experts import logged_losses

    _initialise(1)
    biased = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    config = model_config("llama", **{**MIXTURE, **biased, "moe_aux_loss_coeff": 0.1})
    model = build_gpt(config, vocab_size=VOCABULARY, seq_length=SEQUENCE, seed=7)
    taps = attach_taps(model)
    router = model.decoder.layers[0].mlp.router
    found, logged = [router.local_tokens_per_expert.tolist()], []
    for detached in (True, False):
        run = Pass((lambda emission: None,), detached=detached, rows=ROWS, positions=SEQUENCE)
        with taps.during(run):
            token_losses(model, _batch()).mean().backward()
        found.append(router.local_tokens_per_expert.tolist())
        logged.append(float(sum(values.sum() for values in logged_losses().values())))
    return (*found, logged)


def test_validation_is_not_counted_for_the_experts_biases(two_ranks: Workers) -> None:
    before, after, trained, logged = two_ranks.run(_counts)[0]
    assert not any(before) and not any(after) and sum(trained) == TOPK * ROWS * SEQUENCE
    assert logged[0] == 0.0 < logged[1]


RATE = 1e-3


def _biases(rank: int, world: int, tp: int) -> tuple[dict[str, list[float]], list[float], list[float]]:
    """Of all routers after two steps of two microbatches; what is left of the counts; and those of another model that
    was given them."""
    from inrun_megatron.engines.balancing import ExpertBiases
    from inrun_megatron.models import token_losses

    biased = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    model = _build(tp, **biased, moe_router_bias_update_rate=RATE)  # in fp64, buffers, too
    biases = ExpertBiases(model)
    for _ in range(2):
        for start in (0, 2):
            own = {name: column[start : start + 2] for name, column in _batch(4).items()}
            token_losses(model, own).mean().backward()
        with torch.no_grad():
            token_losses(model, _batch(4))  # an evaluation, which does not count
        biases.update()
    router = model.decoder.layers[2].mlp.router
    assert router.expert_bias.dtype == router.local_tokens_per_expert.dtype == torch.float32
    other = _build(tp, **biased)
    restored = ExpertBiases(other)
    restored.restore(biases.state())
    return biases.state(), router.local_tokens_per_expert.tolist(), restored.state()  # type: ignore[return-value]


def test_biases_follow_the_loads_alike_in_every_layout(two_ranks: Workers) -> None:
    (one, left, restored), _ = two_ranks.run(_biases, 1)
    (two, *_), _ = two_ranks.run(_biases, 2)
    assert one.keys() == {f"decoder.layers.{layer}.mlp.router" for layer in (0, 2)}
    assert one == restored and not any(left)
    for name, bias in one.items():
        moved = {round(abs(b) / RATE, 4) for b in bias}
        assert moved <= {0.0, 1.0, 2.0} and len(moved - {0.0}) > 0, bias
        assert two[name] == pytest.approx(bias)


def _scale(rank: int, world: int) -> list[float]:
    """By which megatron-core multiplies the losses that balance experts: before, after an evaluation, after a forward that trains,
    inside `without_balancing_losses`, and behind it."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from inrun_megatron.engines.balancing import scale_balancing_losses, without_balancing_losses
    from inrun_megatron.models import token_losses

    engine = SimpleNamespace(
        module=_build(), fp16_enabled=lambda: False, gradient_accumulation_steps=lambda: 4
    )
    found = []

    def note() -> None:
        found.append(float(MoEAuxLossAutoScaler.main_loss_backward_scale))

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    assert scale_balancing_losses(SimpleNamespace(module=torch.nn.Linear(1, 1))) is None
    hook = scale_balancing_losses(engine)
    note()
    with torch.no_grad():
        token_losses(engine.module, _batch())
    note()
    token_losses(engine.module, _batch())
    note()
    with without_balancing_losses():
        token_losses(engine.module, _batch())
        note()
    note()
    assert hook is not None
    hook.remove()
    return found


def test_balancing_losses_are_scaled_as_the_loss_is(two_ranks: Workers) -> None:
    assert two_ranks.run(_scale)[0] == [1.0, 1.0, 0.25, 0.0, 0.25]


def _router_types(rank: int, world: int) -> list[tuple[bool, bool, str]]:
    """Of each precision: are output and gradients those of the router without a tap, bit for bit, and the logits' type?"""
    from inrun_megatron.taps import Pass, attach_taps

    found = []
    for kind in (None, "fp32", "fp64"):
        model = _build(moe_router_dtype=kind).to(torch.bfloat16)
        router = model.decoder.layers[0].mlp.router
        hidden = torch.randn(SEQUENCE, ROWS, 32, dtype=torch.bfloat16)

        def run(router: Any = router, hidden: Tensor = hidden) -> list[Tensor]:
            own = hidden.clone().requires_grad_()
            router.weight.grad = None
            logits = router.gating(own)
            logits.square().sum().backward()
            return [logits.detach(), own.grad, router.weight.grad]

        plain = run()
        taps = attach_taps(model)
        with taps.during(Pass((lambda emission: None,), rows=ROWS, positions=SEQUENCE)):
            tapped = run()
        same = [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, tapped, strict=True)]
        found.append((same[0], all(same[1:]), str(tapped[0].dtype)))
        taps.detach()
    return found


def test_routers_compute_in_the_precision_that_megatron_gives_them(two_ranks: Workers) -> None:
    found = two_ranks.run(_router_types)[0]
    assert [dtype for _, _, dtype in found] == ["torch.bfloat16", "torch.float32", "torch.float64"]
    assert all(output and gradients for output, gradients, _ in found), found
