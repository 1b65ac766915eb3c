"""Models of Hugging Face's transformers in a loop of one's own: values are those of gradients taken one row at a time, in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed import Workers
from tests.own_loop import make_engine

VOCABULARY, LENGTH, ROWS, RATE = 64, 12, 3, 1e-2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attention_dropout": 0.0}
HIDDEN = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
RESIDUAL = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **NO_DROPOUT}
NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "embed_dropout": 0.0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}  # an offset of positions; [b * s, h]
MPT = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
GROUPS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# What each family has beside plain layers.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,  # Conv1D, positions [1, s], tied
    "gptj": GPT2 | {"rotary_dim": 4},
    "codegen": GPT2 | {"rotary_dim": 4},
    "gpt_neo": SIZES | NEO | {"resid_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_neox": SIZES | HIDDEN,
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **HIDDEN},
    "phi": SIZES | NO_DROPOUT,
    "phi3": SIZES | NO_DROPOUT,
    "stablelm": SIZES,
    "starcoder2": SIZES | RESIDUAL,
    "llama": SIZES,  # RMSNorm of its own
    "mistral": SIZES,
    "qwen2": SIZES,  # some biases
    "gemma": SIZES,  # RMSNorm around 1
    "gemma2": SIZES,  # the same, scaled embeddings, capped logits, tied
    "olmo": SIZES,
    "cohere": SIZES,
    "granite": SIZES,
}
BY_HEAD = ("qwen3", "gemma3_text", "olmo2", "cohere2", "exaone4")  # norms of queries and keys
OTHERS = ("glm4", "helium", "smollm3", "ernie4_5", "arcee")
MIXTURES: dict[str, dict[str, Any]] = {}
if int(metadata.version("transformers").split(".")[0]) >= 5:
    MODELS |= dict.fromkeys(BY_HEAD + OTHERS, SIZES)
    # Before, these do not run in fp64, or take no `use_cache`.
    MODELS |= {"opt": SIZES | OPT, "mpt": MPT, "openai-gpt": GPT2}
    MIXTURES |= {
        "mixtral": SIZES | {"num_local_experts": 4},
        "olmoe": SIZES | EXPERTS,
        "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 16},
        "qwen3_moe": SIZES | EXPERTS,
        "granitemoe": SIZES | {"num_local_experts": 4},
        "gpt_oss": SIZES | {"num_local_experts": 4},
        "glm4_moe": SIZES | GROUPS,
        "deepseek_v3": SIZES | GROUPS | LATENT,
        "deepseek_v2": SIZES | GROUPS | LATENT,
        "ernie4_5_moe": SIZES | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    }
    MODELS |= MIXTURES


def _model(kind: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **MODELS[kind], **tokens)
    torch.manual_seed(0)
    config._experts_implementation = "eager"  # the grouped product knows no fp64
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not name.endswith("sinks"))  # no layer's
    with torch.no_grad():
        for parameter in model.parameters():  # no norm and no bias may be what it is at first
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def _losses(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits = module(input_ids=batch["tokens"], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return losses.view_as(batch["labels"])


def _batch(seed: int) -> dict[str, Tensor]:
    text = torch.randint(3, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(ROWS, LENGTH)
    mask[0, :4] = 0.0
    return {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(), "loss_mask": mask}


def _gradient(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of the sum over loss tokens."""
    loss = (_losses(model, batch) * batch["loss_mask"]).sum()
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def _one_row_at_a_time(kind: str, rank: int, world: int) -> Tensor:
    model, held_out, values = _model(kind).double(), [_batch(50 + r) for r in range(world)], []
    tokens = sum(float(batch["loss_mask"].sum()) for batch in held_out)
    direction = [sum(g) / tokens for g in zip(*(_gradient(model, batch) for batch in held_out))]
    batch = _batch(10 + rank)
    for row in range(ROWS):
        gradient = _gradient(model, {name: column[row : row + 1] for name, column in batch.items()})
        share = 1.0 / (float(batch["loss_mask"].sum()) * world)
        values.append(RATE * share * sum((d * g).sum() for d, g in zip(direction, gradient)))
    return torch.stack(values)


def _scored(rank: int, world: int, kind: str, stage: int) -> tuple[Tensor, Tensor]:
    from inrun_megatron import InRunShapley, ShapleyTarget

    expected = _one_row_at_a_time(kind, rank, world)
    model = _model(kind)
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3 and kind in MIXTURES:  # some of which DeepSpeed marks as leaves
        zero["leaf_module"] = {"classes": []}
    engine = make_engine(model, sgd, zero, clip=0.0)
    held_out = _batch(50 + rank)
    target = ShapleyTarget("held_out", [held_out], num_tokens=world * int(held_out["loss_mask"].sum()))
    shapley = InRunShapley(engine, [target], _losses, base="current")
    batch = _batch(10 + rank)
    with shapley.step(1) as step:
        with step.samples(torch.zeros(ROWS), torch.arange(ROWS), batch["loss_mask"]):
            engine.backward((_losses(engine, batch) * batch["loss_mask"]).sum() / batch["loss_mask"].sum())
            engine.step()
    shapley.close()
    assert step.result.values is not None
    return step.result.values[:, 0].double(), expected


@pytest.mark.parametrize("kind", MODELS)
def test_values_are_those_of_one_row_at_a_time(two_ranks: Workers, kind: str) -> None:
    for stage in (0, 3):
        for values, expected in two_ranks.run(_scored, kind, stage):
            difference = float((values - expected).abs().max() / expected.abs().max())
            print(f"{kind} ZeRO-{stage} {difference:.1e}")
            assert difference < 1e-5
