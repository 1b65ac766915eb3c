"""Modules of vectors, of any type: norms of all spellings, scales, shifts.

Such a module's forward runs as it is. Where it calls torch's own ``F.layer_norm`` or ``F.rms_norm`` with its vectors (nanoGPT's
LayerNorm), that is tapped as in a plain norm. Else (everybody's RMSNorm) every token has a view of its own of the vector, as
biases have (bias.py), whose gradient arrives unreduced. That holds for what is done feature by feature; the first call of every
layer is compared with the module's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attach import Taps, full_shape, register
from .bias import bias as tapped_bias
from .emission import Call, Site
from .own_forward import USES, Given, around, watched
from .plain import place, require_all_heads, tapped_norm, tensor_parallel_place


def vectors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that has nothing but vectors of one length, and a forward; none of any other module's.

    Nor of one with buffers: statistics of a batch, perhaps, through which rows change each other's losses in training.
    """
    own = dict(module.named_parameters(recurse=False))
    shapes = {full_shape(p) for p in own.values()}
    alone = not [*module.children(), *module.buffers()] and type(module).forward is not nn.Module.forward
    return own if alone and len(shapes) == 1 and len(shapes.pop()) == 1 else {}


@register(nn.Module)
def _vectors(taps: Taps, module: Any, name: str) -> None:
    trained = [vector for vector in vectors_of(module).values() if vector.requires_grad]
    if not trained:
        return
    rank, size = tensor_parallel_place()
    site = Site(name, "norm", place(trained[0]), 1 if taps.sequence_first else 0, rank, size)
    require_all_heads(taps, module, site)
    module.forward = _Forward(taps, module, site)
    taps.cover(site.sharding, *trained)


class _Forward:
    """The forward of a module of vectors; its first call finds out how the vectors are used."""

    def __init__(self, taps: Taps, module: nn.Module, site: Site) -> None:
        self._taps, self._module, self._site = taps, module, site
        self._vectors = vectors_of(module)
        self._width = full_shape(next(iter(self._vectors.values()))).numel()
        self._found: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._found is None:
            with torch.no_grad():
                self._found = self._find(*args, **kwargs)
        return self._found(*args, **kwargs)

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self._module, *args, **kwargs)

    def _find(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """``_as_norm`` or ``_by_token``, which must compute what the module's own forward does.

        Raises:
            UserError: it does not.
        """
        for vector in self._vectors.values():
            Call(self._site, self._taps.current, vector)  # waits for weights that are on their way
        calls: list[tuple[type[nn.Module], Given]] = []

        def noting(kind: type[nn.Module]) -> AbstractContextManager[None]:
            def note(given: Given) -> None:
                calls.append((kind, given))

            return watched(USES[kind], note)

        with noting(nn.LayerNorm), noting(nn.RMSNorm):
            plain = self._own(*args, **kwargs)
        own = {id(vector) for vector in self._vectors.values()}
        for kind, given in calls:
            weight, shift = given.get("weight"), given.get("bias")
            if id(weight) in own and (shift is None or id(shift) in own):
                return self._as_norm(kind, weight, shift)
        try:
            output = self._by_token(*args, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self._refused()}: its forward does not take such a vector ({reason})"
            ) from error
        if not _same(output, plain):
            raise UserError(
                f"{self._refused()}: its output is another one then, or differs from call to call"
            )
        return self._by_token

    def _as_norm(self, kind: type[nn.Module], weight: Any, shift: Any) -> Callable[..., Any]:
        if not weight.requires_grad:
            raise UserError(
                f"layer {self._site.name} trains its shift without its scale: freeze it, too (requires_grad=False)"
            )
        use = tapped_norm(self._taps, self._site, weight, shift, rms=kind is nn.RMSNorm)
        return around(self._module, kind, weight, shift, use)

    def _by_token(self, *args: Any, **kwargs: Any) -> Any:
        like = next((x for x in (*args, *kwargs.values()) if self._is_input(x)), None)
        if like is None:
            raise UserError(
                f"{self._refused()}: it has no input with {self._width} features, its last dimension"
            )
        site = replace(self._site, kind="bias")
        views = {
            name: tapped_bias(
                Call(site, self._taps.current, vector), like if self._width > 1 else like[..., :1]
            )
            for name, vector in self._vectors.items()
            if vector.requires_grad
        }
        self._module.__dict__.update(views)  # an instance's own attributes come before its parameters
        try:
            return self._own(*args, **kwargs)
        finally:
            for name in views:
                del self._module.__dict__[name]

    def _is_input(self, x: Any) -> bool:
        tokens = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        return tokens and self._width in (1, x.shape[-1])

    def _refused(self) -> str:
        kind = type(self._module).__name__
        return (
            f"layer {self._site.name} ({kind}) has no tap, and its vectors cannot be given to every token apart; freeze them "
            f"(requires_grad=False), or register a tap for the type"
        )


def _same(output: Any, plain: Any) -> bool:
    if not (isinstance(output, Tensor) and isinstance(plain, Tensor) and output.shape == plain.shape):
        return False
    near = 4 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    return torch.allclose(output, plain, rtol=0.0, atol=near, equal_nan=True)
