"""Modules of vectors, of any type: RMSNorms of all spellings, scales, shifts.

Such a module's forward runs as it is, with a view of the vector that every token has for itself (as biases have, bias.py),
whose gradient arrives unreduced. That holds for what is done feature by feature; the first call of every layer is compared with
the module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attach import Taps, full_shape, register
from .bias import bias as tapped_bias
from .emission import Call, Site
from .plain import place, require_all_heads, tensor_parallel_place


@register(nn.Module)
def _vectors(taps: Taps, module: Any, name: str) -> None:
    vectors = vectors_of(module)
    rank, size = tensor_parallel_place()
    expanded: dict[str, Callable[[Tensor], Tensor]] = {}
    for own, vector in vectors.items():
        site = Site(name, "bias", place(vector), 1 if taps.sequence_first else 0, rank, size)
        require_all_heads(taps, module, site)
        if vector.requires_grad:
            expanded[own] = partial(_of_every_token, taps, site, vector)
            taps.cover(site.sharding, vector)
    if expanded:
        width = full_shape(next(iter(vectors.values()))).numel()
        module.forward = _EveryToken(module, name, width, expanded)


def _of_every_token(taps: Taps, site: Site, vector: nn.Parameter, like: Tensor) -> Tensor:
    call = Call(site, taps.current, vector)
    return tapped_bias(call, like if vector.numel() > 1 else like[..., :1])


def vectors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that has nothing but vectors of one length, and a forward; none of any other module's."""
    own = dict(module.named_parameters(recurse=False))
    shapes = {full_shape(p) for p in own.values()}
    alone = next(module.children(), None) is None and type(module).forward is not nn.Module.forward
    return own if alone and len(shapes) == 1 and len(shapes.pop()) == 1 else {}


class _EveryToken:
    """A module's forward with vectors that every token has for itself.

    The first call compares it with the module's own: what a forward does with a vector may depend on its being one.

    Args:
        width: of the vectors: the input's features, or 1.
        expanded: by parameter, ``input [*, h] -> view [*, width]``.
    """

    def __init__(
        self, module: nn.Module, name: str, width: int, expanded: dict[str, Callable[[Tensor], Tensor]]
    ) -> None:
        self._module, self._name, self._width, self._expanded = module, name, width, expanded
        self._seen = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = type(self._module).forward
        like = next((x for x in (*args, *kwargs.values()) if self._is_input(x)), None)
        if like is None:
            raise UserError(
                f"{self._refused()}: it has no input with {self._width} features, its last dimension"
            )
        if self._seen:
            with self._instead(like):
                return own(self._module, *args, **kwargs)
        with torch.no_grad():
            plain = own(self._module, *args, **kwargs)
        try:
            with self._instead(like):
                output = own(self._module, *args, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self._refused()}: its forward does not take such a vector ({reason})"
            ) from error
        if not _same(output, plain):
            raise UserError(
                f"{self._refused()}: its output is another one then, or differs from call to call"
            )
        self._seen = True
        return output

    def _is_input(self, x: Any) -> bool:
        tokens = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        return tokens and self._width in (1, x.shape[-1])

    @contextmanager
    def _instead(self, like: Tensor) -> Iterator[None]:
        """The instance's own attributes come before its parameters."""
        views = {parameter: expanded(like) for parameter, expanded in self._expanded.items()}
        self._module.__dict__.update(views)
        try:
            yield
        finally:
            for parameter in views:
                del self._module.__dict__[parameter]

    def _refused(self) -> str:
        kind = type(self._module).__name__
        return (
            f"layer {self._name} ({kind}) has no tap, and its vectors cannot be given to every token apart; freeze them "
            f"(requires_grad=False), or register a tap for the type"
        )


def _same(output: Any, plain: Any) -> bool:
    if not (isinstance(output, Tensor) and isinstance(plain, Tensor) and output.shape == plain.shape):
        return False
    near = 4 * torch.finfo(plain.dtype).eps * float(plain.detach().abs().max())
    return torch.allclose(output.detach(), plain, rtol=0.0, atol=near, equal_nan=True)
