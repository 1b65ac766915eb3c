"""Per-row dot products of biases, norms and embeddings with directions. No distributed code.

Shape legend: B output gradient with rows along ``batch_dim``, ``[s, b, h]`` or ``[b, s, h]``;
directions K tensors of the parameter's shape; dots ``[b, K]``, added to.

    bias       dots[i, k] += sum_t B_it . D_k
    norm       dots[i, k] += sum_t B_it . (D_k * xhat_it)  (+ sum_t B_it . Dshift_k)
    embedding  dots[i, k] += sum_t B_it . D_k[id_it]

The ``token_*`` functions give the summands of each token, for parts of rows (segments.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import wide, widened


def row_gradients(tokens: Tensor, batch_dim: int, dtype: torch.dtype) -> Tensor:
    """Sum over every dimension but the rows and the features: ``[b, h]``."""
    if tokens.dim() == 3:
        return tokens.sum(1 - batch_dim, dtype=dtype)
    rows = tokens.movedim(batch_dim, 0)
    return rows.to(dtype).flatten(1, -2).sum(1) if rows.dim() > 2 else rows.to(dtype)


def sum_of_tokens(tokens: Tensor) -> Tensor:
    """Sum over every dimension but the features: ``[*, h]`` -> ``[h]``, in fp32 or wider."""
    return tokens.flatten(0, -2).sum(0, dtype=wide(tokens.dtype))


def vector_dots(gradients: Tensor, directions: Sequence[Tensor], dots: Tensor) -> None:
    """``dots[i, k] += gradients_i . D_k`` for per-row gradients ``[b, h]``."""
    dots.addmm_(gradients.to(dots.dtype), torch.stack([d.to(dots.dtype) for d in directions], dim=1))


def token_vector_dots(tokens: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """``tokens . D_k`` of every token: ``[*, h]`` -> ``[*, K]``, fp64."""
    columns = torch.stack([widened(d) for d in directions], dim=1)
    return (tokens.to(columns.dtype) @ columns).double()


def token_embedding_dots(output_grad: Tensor, ids: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """``B_t . D_k[id_t]`` of every token: ``[*, h]`` -> ``[*, K]``, fp64."""
    own = output_grad.to(wide(directions[0].dtype))
    return torch.stack([torch.linalg.vecdot(own, widened(d[ids])) for d in directions], dim=-1).double()


def embedding_dots(
    output_grad: Tensor, ids: Tensor, batch_dim: int, directions: Sequence[Tensor], dots: Tensor
) -> None:
    """``dots[i, k] += sum_t B_it . D_k[id_it]``; rows whose output gradient is zero (masked ids) add nothing."""
    for k, direction in enumerate(directions):
        products = (output_grad.to(wide(direction.dtype)) * widened(direction[ids])).sum(-1)
        rows = products.movedim(batch_dim, 0)
        dots[:, k] += rows.reshape(rows.shape[0], -1).sum(1)


def embedding_gradient(output_grad: Tensor, ids: Tensor, out: Tensor) -> None:
    """``out[id] += B`` summed over all tokens; out ``[vocabulary, h]``."""
    rows, gradients = ids.flatten(), output_grad.flatten(0, -2).to(out.dtype)
    if out.is_cuda:  # sorts, where index_add_ would add in another order in every run
        out.index_put_((rows,), gradients, accumulate=True)
    else:
        out.index_add_(0, rows, gradients)
