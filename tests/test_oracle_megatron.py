"""The oracle's forward pass and its shards against megatron-core's own GPTModel, at tensor-parallel size 1 and 2.

Megatron's pieces that need CUDA are replaced here by the smallest thing that runs, not by the package's own models:
the oracle must not lean on what it is there to judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import assert_cases, run_cases
from tests.oracle import (
    GPTShape,
    OracleGPT,
    merge_shards,
    parameter_shapes,
    random_parameters,
    random_rows,
    split_parameters,
)
from tests.oracle_shards import split_kind

SHAPES = {
    "gpt2": GPTShape("gpt2", 2, 32, 4, vocab_size=29, seq_length=12, padded_vocab_size=32),
    "gpt2 untied": GPTShape("gpt2", 1, 32, 4, vocab_size=32, seq_length=12, tied=False),
    "llama": GPTShape(
        "llama", 2, 32, 4, vocab_size=32, seq_length=12, num_query_groups=2, ffn_hidden_size=48
    ),
    "llama partial rotary": GPTShape("llama", 1, 32, 4, vocab_size=32, seq_length=12, rotary_percent=0.5),
    "llama one group": GPTShape(
        "llama", 1, 32, 4, vocab_size=30, seq_length=12, num_query_groups=1, padded_vocab_size=32
    ),
}


class PlainAttention(torch.nn.Module):
    """Causal attention in plain torch, in the place of DotProductAttention, which needs CUDA."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]."""
        s, b, n, d = query.shape
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return context.permute(2, 0, 1, 3).reshape(s, b, n * d)


def build_model(shape: GPTShape, tp_size: int) -> torch.nn.Module:
    """megatron-core's GPTModel for a shape, on CPU."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size)
    llama = shape.kind == "llama"
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
        tensor_model_parallel_size=tp_size,
        normalization="RMSNorm" if llama else "LayerNorm",
        gated_linear_unit=llama,
        activation_func=F.silu if llama else F.gelu,
        add_bias_linear=not llama,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=PlainAttention)
    return GPTModel(
        config,
        spec,
        vocab_size=shape.padded_vocab,
        max_sequence_length=shape.seq_length,
        position_embedding_type="rope" if llama else "learned_absolute",
        rotary_percent=shape.rotary_percent,
        rotary_base=shape.rotary_base,
        share_embeddings_and_output_weights=shape.is_tied,
        parallel_output=True,
    )


@dataclass(frozen=True)
class Report:
    """What one rank saw. Differences are the largest over tokens."""

    shapes: dict[str, tuple[int, ...]]  # of the rank's parameters
    logits64: float  # fp64 logits of the real vocabulary against the oracle
    loss64: float
    loss32: float  # Megatron's own fp32 loss against the oracle's, where no row is padding
    round_trip: float  # model parameters merged over ranks against the full ones


def compare_with_megatron(rank: int, world_size: int, case: str) -> Report:
    shape = SHAPES[case]
    full = random_parameters(shape, seed=4)
    batch = random_rows(shape, 3, 6)
    oracle = OracleGPT(shape)
    expected = oracle.logits(full, batch["tokens"], batch["position_ids"])
    losses = oracle.token_losses(full, batch)
    model = build_model(shape, world_size).double()
    named = dict(model.named_parameters())
    shards = split_parameters(full, shape, world_size, rank)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(shards[name])
        logits = model(batch["tokens"], batch["position_ids"], None, runtime_gather_output=True)  # [b, s, V]
        logits = logits[..., : shape.vocab_size]
    loss64 = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    with torch.no_grad():
        model.float()
        loss32 = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    oracle32 = oracle.token_losses({name: value.float() for name, value in full.items()}, batch)
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(
        gathered, {name: p.detach() for name, p in model.double().named_parameters()}
    )
    merged = merge_shards(gathered, shape)
    return Report(
        {name: tuple(parameter.shape) for name, parameter in named.items()},
        (logits - expected).abs().max().item(),
        (loss64.view_as(losses) - losses).abs().max().item(),
        (loss32 - oracle32).abs().max().item(),
        max((merged[name] - value).abs().max().item() for name, value in full.items()),
    )


@pytest.mark.parametrize("tp_size", [1, 2])
def test_forward_and_shards_equal_megatron(tp_size: int) -> None:
    cases = list(SHAPES)
    for case, reports in zip(
        cases, assert_cases(run_cases(compare_with_megatron, tp_size, cases)), strict=True
    ):
        shape = SHAPES[case]
        for rank, report in enumerate(reports):
            where = f"{case}, tensor-parallel rank {rank} of {tp_size}"
            shards = split_parameters(random_parameters(shape), shape, tp_size, rank)
            assert report.shapes == {name: tuple(value.shape) for name, value in shards.items()}, where
            assert report.logits64 < 1e-12, where
            assert report.loss64 < 1e-12, where
            assert report.round_trip < 1e-6, where
            if shape.padded_vocab == shape.vocab_size:
                assert report.loss32 < 3e-6, where
            else:
                # Megatron's own loss counts padded rows in the softmax; here they hold numbers, so it shows.
                assert report.loss32 > 1e-3, where


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_split_and_merge_round_trip(shape: GPTShape, tp_size: int) -> None:
    full = random_parameters(shape)
    shards = [split_parameters(full, shape, tp_size, rank) for rank in range(tp_size)]
    merged = merge_shards(shards, shape)
    assert list(merged) == list(parameter_shapes(shape))
    assert all(torch.equal(merged[name], full[name]) for name in full)


def test_gated_layer_is_not_split_like_a_plain_one() -> None:
    shape = SHAPES["llama"]
    full = random_parameters(shape)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert split_kind(name, shape) == "gated rows"
    gate, up = full[name].chunk(2)
    shard = split_parameters(full, shape, 2, 1)[name]
    assert torch.equal(shard, torch.cat((gate.chunk(2)[1], up.chunk(2)[1])))
    assert not torch.equal(shard, full[name].chunk(2)[1])


def test_merge_refuses_replicas_that_differ() -> None:
    shape = SHAPES["gpt2"]
    shards = [split_parameters(random_parameters(shape), shape, 2, rank) for rank in range(2)]
    shards[1]["decoder.final_layernorm.weight"][3] += 1e-3
    with pytest.raises(AssertionError, match=r"final_layernorm.weight: rank 1 differs from rank 0 by 1.0"):
        merge_shards(shards, shape)
