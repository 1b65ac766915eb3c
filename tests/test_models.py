"""Models: the same function for every tensor-parallel size and padding, on a machine without CUDA."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import transformer_block
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock

from inrun_megatron.models import GPT, build_gpt, cpu, padded_vocabulary, token_losses, transformer_config
from inrun_megatron.models.initialise import shard
from inrun_megatron.models.norm import Norm
from inrun_megatron.models.recompute import enable_recompute
from tests.distributed import Workers
from tests.small_models import SEQUENCE, SHAPES, VOCABULARY, model_config


def microbatch(rows: int = 3) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (rows, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    tokens[0, -1] = VOCABULARY - 1  # the last real row, alone on its tensor-parallel rank
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(SEQUENCE).repeat(rows, 1),
    }


def build(
    shape: str, tp: int, *, sequence_parallel: bool = False, dropout: float = 0.0, **changes: Any
) -> GPT:
    """On a rank: a model with `tp` tensor-parallel ranks, in fp64 so that sums may be compared closely."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    cpu.install()
    cpu.seed_everything(
        1,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
    )
    config = model_config(shape, dropout, **changes)
    return build_gpt(
        config, vocab_size=VOCABULARY, seq_length=SEQUENCE, seed=7, sequence_parallel=sequence_parallel
    ).double()


@pytest.fixture
def on_cpu() -> Iterator[None]:
    yield
    cpu.uninstall()


# --- what is the same for every layout -------------------------------------------------------------------------------


def _losses_and_gradients(
    rank: int, world: int, shape: str, tp: int, sequence_parallel: bool
) -> dict[str, Any]:
    model = build(shape, tp, sequence_parallel=sequence_parallel)
    losses = token_losses(model, microbatch())
    losses.mean().backward()
    table = model.embedding.word_embeddings.weight
    return {
        "losses": losses.detach(),
        "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "rows": table.shape[0],
        "padding": table.detach()[max(VOCABULARY - rank * table.shape[0], 0) :]
        if tp > 1
        else table.detach()[VOCABULARY:],
        "gradient": table.grad,
        "position": None if shape == "llama" else model.embedding.position_embeddings.weight.grad,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_parameters_and_gradients_do_not_depend_on_tensor_parallelism(
    two_ranks: Workers, shape: str
) -> None:
    (one, _), (first, second), (sp_first, sp_second) = (
        two_ranks.run(_losses_and_gradients, shape, tp, sp) for tp, sp in ((1, False), (2, False), (2, True))
    )
    assert one["rows"] == 384 and first["rows"] == 256  # 257 padded to 384 for TP 1 and to 512 for TP 2
    for other in (first, second, sp_first, sp_second):
        torch.testing.assert_close(other["losses"], one["losses"], rtol=1e-6, atol=0)
        if one["position"] is not None:
            torch.testing.assert_close(other["position"], one["position"], rtol=1e-5, atol=1e-9)
    # Padding rows are 0 and get no gradient.
    table = torch.cat([first["gradient"], second["gradient"]])
    torch.testing.assert_close(table[:VOCABULARY], one["gradient"][:VOCABULARY], rtol=1e-5, atol=1e-9)
    for result in (one, first, second):
        assert not result["padding"].any()
    assert not table[VOCABULARY:].any() and not one["gradient"][VOCABULARY:].any() and table.any()
    for name, whole in one["parameters"].items():
        parts = [first["parameters"][name], second["parameters"][name]]
        if "word_embeddings" in name or "output_layer" in name:
            assert torch.equal(torch.cat(parts)[:VOCABULARY], whole[:VOCABULARY]), name
            continue
        differing = [dim for dim in range(whole.dim()) if parts[0].shape[dim] != whole.shape[dim]]
        for rank, part in enumerate(parts):
            stride = 2 if shape == "llama" and "linear_fc1" in name else 1
            expected = shard(whole, differing[0], stride, rank, 2) if differing else whole
            assert torch.equal(part, expected), name


def _upstream_loss(rank: int, world: int, tp: int) -> torch.Tensor:
    model = build("gpt2", tp)
    model.compute_language_model_loss = partial(GPTModel.compute_language_model_loss, model)  # type: ignore[method-assign]
    return token_losses(model, microbatch()).detach()


def test_upstream_counts_the_padding(two_ranks: Workers) -> None:
    """Control: without masking the padded logits, TP 1 and TP 2 differ."""
    one, two = (two_ranks.run(_upstream_loss, tp)[0] for tp in (1, 2))
    assert (two - one).abs().min() > 0.1  # about log(512 / 384)


def _reference(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = build("gpt2", 1)
    batch = microbatch()
    logits = model(batch["tokens"], batch["position_ids"], None)  # [b, s, v]
    losses = F.cross_entropy(logits[..., :VOCABULARY].transpose(1, 2), batch["labels"], reduction="none")
    return token_losses(model, batch).detach(), losses.detach()


def test_loss_is_the_cross_entropy_over_the_true_vocabulary(two_ranks: Workers) -> None:
    ours, reference = two_ranks.run(_reference)[0]
    torch.testing.assert_close(ours.float(), reference.float(), rtol=1e-5, atol=1e-6)


def test_vocabulary_is_padded_as_in_megatron() -> None:
    assert padded_vocabulary(257, 128, 1) == 384
    assert padded_vocabulary(257, 128, 2) == 512
    assert padded_vocabulary(50257, 128, 1) == 50304
    assert padded_vocabulary(256, 128, 2) == 256


def _unknown_parameter(rank: int, world: int) -> str:
    from inrun_megatron.models.initialise import initialise

    model = build("gpt2", 1)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError) as caught:
        initialise(model, model.config, vocab_size=VOCABULARY, seed=1, tp_rank=0, tp_size=1)
    return str(caught.value)


def test_a_parameter_without_initialisation_is_named(two_ranks: Workers) -> None:
    assert "extra.weight, extra.bias" in two_ranks.run(_unknown_parameter)[0]


# --- norm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "kind"), [("gpt2", torch.nn.LayerNorm), ("llama", torch.nn.RMSNorm)])
def test_norms_work_under_sequence_parallelism(shape: str, kind: type) -> None:
    config = transformer_config(model_config(shape), tensor_parallel=2, sequence_parallel=True)
    norm = Norm(config, 32, eps=1e-5)
    assert type(norm) is kind and all(
        getattr(parameter, "sequence_parallel", False) for parameter in norm.parameters()
    )
    with pytest.raises(AssertionError, match="sequence parallel"):  # canary: the factory is needed
        WrappedTorchNorm(config, 32)


# --- canaries for models/cpu.py --------------------------------------------------------------------------------------


def test_canary_upstream_needs_cuda(on_cpu: None) -> None:
    if torch.cuda.is_available():
        pytest.skip("a machine with CUDA needs none of this")
    cpu.uninstall()
    rotary = RotaryEmbedding(8, 1.0, use_cpu_initialization=True, cp_group=None)
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        rotary.get_emb(4)
    tracker = megatron_random.CudaRNGStatesTracker()
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        tracker.add("x", 1)
    assert cpu.install() and cpu.install()
    assert rotary.get_emb(4).device.type == "cpu"
    assert isinstance(megatron_random.get_cuda_rng_tracker(), cpu.CpuRngTracker)
    # What `install` sets must be what upstream reads.
    assert megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED
    assert isinstance(torch.empty(1, device=torch.cuda.current_device()), torch.Tensor)


def _draws(tp_rank: int, dp_rank: int) -> tuple[float, float]:
    cpu.seed_everything(5, tp_rank=tp_rank, dp_rank=dp_rank)
    with megatron_random.get_cuda_rng_tracker().fork():
        parallel = torch.rand(()).item()
    return torch.rand(()).item(), parallel


def test_rng_streams_of_ranks(on_cpu: None) -> None:
    cpu.install()
    draws = {(tp, dp): _draws(tp, dp) for tp in range(2) for dp in range(2)}
    assert (
        draws[0, 0][0] == draws[1, 0][0] != draws[0, 1][0]
    )  # the default stream is shared by tensor-parallel ranks
    assert len({parallel for _, parallel in draws.values()}) == 4


def test_rng_state_can_be_saved_and_forks_nest(on_cpu: None) -> None:
    cpu.install()
    cpu.seed_everything(5, tp_rank=0, dp_rank=0)
    tracker = megatron_random.get_cuda_rng_tracker()

    def draw() -> list[float]:
        drawn = [torch.rand(()).item()]
        with tracker.fork():
            drawn.append(torch.rand(()).item())
            with tracker.fork("data-parallel-rng"):
                drawn.append(torch.rand(()).item())
            drawn.append(torch.rand(()).item())
        return [*drawn, torch.rand(()).item()]

    draw()
    state = cpu.rng_state()
    first = draw()
    assert draw() != first
    cpu.set_rng_state(state)
    assert draw() == first
    with pytest.raises(ValueError, match="does not exist"), tracker.fork("none"):
        pass


# --- recomputation ---------------------------------------------------------------------------------------------------


def _gradients(
    rank: int, world: int, shape: str, tp: int, num_layers: int | None, sequence_parallel: bool
) -> Any:
    """Gradients with dropout of two microbatches, what the wrapper saw, and the RNG position afterwards."""
    model = build(shape, tp, sequence_parallel=sequence_parallel, dropout=0.2, num_layers=3)
    calls: list[str] = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        calls.append("wrap")

        def run(*arguments: Any) -> Any:
            calls.append("recompute" if torch.is_grad_enabled() else "forward")
            return function(*arguments)

        return run

    if num_layers is not None:
        enable_recompute(model.decoder, num_layers, wrap)
    for _ in range(2):
        token_losses(model, microbatch()).mean().backward()
    with megatron_random.get_cuda_rng_tracker().fork():
        position = torch.rand(()).item(), model.decoder.training
    return {name: parameter.grad for name, parameter in model.named_parameters()}, calls, position


@pytest.mark.parametrize(("shape", "tp", "sp"), [("gpt2", 1, False), ("llama", 2, False), ("gpt2", 2, True)])
def test_recomputation_changes_nothing(two_ranks: Workers, shape: str, tp: int, sp: bool) -> None:
    plain = two_ranks.run(_gradients, shape, tp, None, sp)
    for num_layers, chunks in ((1, 3), (2, 2)):
        for before, after in zip(plain, two_ranks.run(_gradients, shape, tp, num_layers, sp), strict=True):
            assert all(torch.equal(before[0][name], gradient) for name, gradient in after[0].items())
            assert after[1] == ["wrap", "forward"] * chunks + ["recompute"] * chunks + (
                ["wrap", "forward"] * chunks + ["recompute"] * chunks
            )
            assert before[2] == after[2]


def _evaluation(rank: int, world: int) -> tuple[int, int, bool]:
    model = build("gpt2", 1, dropout=0.2)
    runs = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            runs.append(1)
            return function(*arguments)

        return noted

    enable_recompute(model.decoder, 1, wrap)
    model.eval()
    losses = token_losses(model, microbatch())
    losses.mean().backward()
    with_gradients = len(runs)
    with torch.no_grad():
        same = torch.equal(token_losses(model, microbatch()), losses)
    return with_gradients, len(runs), same and not model.decoder.training


def test_recomputation_follows_gradients_not_the_training_flag(two_ranks: Workers) -> None:
    """A validation pass with gradients in evaluation mode is recomputed, without dropout; one without is not."""
    assert two_ranks.run(_evaluation)[0] == (4, 4, True)


def test_canary_of_recomputation() -> None:
    """`enable_recompute` replaces this method, later a function of its module; arguments are passed by name."""
    upstream = getattr(TransformerBlock, "_checkpointed_forward", None) or inspect.unwrap(
        transformer_block.checkpointed_forward
    )
    parameters = list(inspect.signature(upstream).parameters)
    assert parameters[:10] == [
        "self",
        "hidden_states",
        "attention_mask",
        "context",
        "context_mask",
        "rotary_pos_emb",
        "attention_bias",
        "packed_seq_params",
        "use_inner_quantization_context",
        "padding_mask",
    ]
    assert parameters[10:] in ([], ["extract_layer_indices", "layer_offset"])
    source = inspect.getsource(TransformerBlock.forward)
    assert "self.config.recompute_granularity == 'full' and self.training" in source
