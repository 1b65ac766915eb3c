"""The core attention against the textbook's formula, with documents, masks and grouped queries."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from inrun_megatron.models import transformer_config
from inrun_megatron.models.attention import SdpaCoreAttention, document_mask, for_every_head
from tests.small_models import SEQUENCE, model_config


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_is_the_textbook_formula(groups: int) -> None:
    config = transformer_config(model_config("llama", num_query_groups=groups))
    attention = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(SEQUENCE, 2, 4, 8, generator=generator, dtype=torch.float64)  # [s, b, n, d]
    key, value = torch.randn(2, SEQUENCE, 2, groups, 8, generator=generator, dtype=torch.float64)
    context = attention(query, key, value, None)
    key, value = (tensor.repeat_interleave(4 // groups, dim=2) for tensor in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / 8**0.5
    future = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    expected = torch.einsum("bnst,tbnd->sbnd", weights, value).reshape(SEQUENCE, 2, 32)
    torch.testing.assert_close(context, expected, rtol=1e-12, atol=1e-12)


def test_attention_with_documents_is_that_of_each_document_alone() -> None:
    config = transformer_config(model_config("gpt2"))
    attention = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self").double().eval()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, 2, 4, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    documents = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 12])
    together = attention(query, key, value, document_mask(documents))
    pieces = [(0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 12)]
    for row, begin, end in pieces:
        alone = attention(*(t[begin:end, row : row + 1] for t in (query, key, value)))
        torch.testing.assert_close(together[begin:end, row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_layers_keep_one_mask_between_them() -> None:
    """As numbers it takes 2 or 4 bytes for each query and key, and every layer's backward needs it."""
    config = transformer_config(model_config("gpt2"))
    layers = [SdpaCoreAttention(config, number, AttnMaskType.causal, "self").eval() for number in (1, 2)]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, 2, 4, 8, generator=generator).requires_grad_() for _ in range(3))
    documents = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 12])
    mask, kept = document_mask(documents), set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (12, 12):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        first, second = (layer(query, key, value, mask) for layer in layers)
    assert len(kept) == 1 and torch.equal(first, second)
    # A mask that is written to is made into numbers again, in each precision of its own.
    mask.copy_(document_mask(torch.zeros_like(documents)))
    torch.testing.assert_close(layers[0](query, key, value, mask), layers[0](query, key, value))
    precise = layers[0](query.double(), key.double(), value.double(), mask)
    assert precise.dtype == torch.float64


def test_keys_for_every_head_are_those_of_its_group() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key, value = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(
        attend(query, for_every_head(key, 6), for_every_head(value, 6), is_causal=True),
        attend(query, key, value, is_causal=True, enable_gqa=True),
    )


def test_attention_refuses_what_it_would_ignore() -> None:
    config = transformer_config(model_config("gpt2"))
    attention = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self")
    tensor = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match="no bias and no packed sequences"):
        attention(tensor, tensor, tensor, None, attention_bias=torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="no bias and no packed sequences"):
        attention(tensor, tensor, tensor, None, packed_seq_params=object())
    with pytest.raises(ValueError, match="causal"):
        SdpaCoreAttention(config, 1, AttnMaskType.padding, "self")
