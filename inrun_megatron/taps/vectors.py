"""Modules of vectors, of any type: norms of all spellings, scales, shifts.

Such a module's forward runs as it is. Where it calls torch's own ``F.layer_norm`` or ``F.rms_norm`` with its vectors (nanoGPT's
LayerNorm), that is tapped as in a plain norm. Else (everybody's RMSNorm) every token has a view of its own of the vector, as
biases have (bias.py), whose gradient arrives unreduced. That holds where a token's output depends on the token's own view alone,
and so it is tried in a layer's first call, with other numbers for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attach import Taps
from .bias import bias as tapped_bias
from .coverage import full_shape
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


def tap_vectors(taps: Taps, module: Any, name: str) -> None:
    """Tap a module of vectors; nothing happens to any other one."""
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
            here = next(iter(self._vectors.values())).device
            with torch.no_grad(), torch.random.fork_rng([here] if here.type == "cuda" else []):
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
        like = self._input(*args, **kwargs)
        if not isinstance(plain, Tensor) or plain.shape[:-1] != like.shape[:-1]:
            raise UserError(f"{self._refused()}: it does not return one tensor with the tokens of its input")
        drawn = {name: _drawn(vector, self._of(like)) for name, vector in self._vectors.items()}
        try:
            output = self._with(drawn, *args, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self._refused()}: its forward does not take such vectors ({reason})"
            ) from error
        for token in {(0,) * (plain.dim() - 1), tuple(n - 1 for n in plain.shape[:-1])}:
            alone = self._with({name: views[token] for name, views in drawn.items()}, *args, **kwargs)
            if output.shape != alone.shape or not _near(output[token], alone[token]):
                raise UserError(
                    f"{self._refused()}: it does something else with them, or differs from call to call"
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
        like, site = self._of(self._input(*args, **kwargs)), replace(self._site, kind="bias")
        views = {
            name: tapped_bias(Call(site, self._taps.current, vector), like)
            for name, vector in self._vectors.items()
            if vector.requires_grad
        }
        return self._with(views, *args, **kwargs)

    def _with(self, vectors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        self._module.__dict__.update(vectors)  # an instance's own attributes come before its parameters
        try:
            return self._own(*args, **kwargs)
        finally:
            for name in vectors:
                del self._module.__dict__[name]

    def _input(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first one with as many features as the vectors have."""
        for x in (*args, *kwargs.values()):
            tokens = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
            if tokens and self._width in (1, x.shape[-1]):
                return x
        raise UserError(f"{self._refused()}: it has no input with {self._width} features, its last dimension")

    def _of(self, like: Tensor) -> Tensor:
        """A tensor of the shape that a vector of every token has."""
        return like if self._width > 1 else like[..., :1]

    def _refused(self) -> str:
        kind = type(self._module).__name__
        return (
            f"layer {self._site.name} ({kind}) has no tap, and its vectors cannot be given to every token apart; freeze them "
            f"(requires_grad=False), or register a tap for the type"
        )


def _drawn(vector: Tensor, like: Tensor) -> Tensor:
    """Numbers near the vector's, others for every token."""
    generator = torch.Generator(vector.device).manual_seed(0)
    noise = torch.randn(like.shape, generator=generator, device=vector.device, dtype=torch.float32)
    return vector + (0.1 * noise * (1.0 + vector.abs())).to(vector.dtype)


def _near(output: Tensor, alone: Tensor) -> bool:
    """Equal but for rounding; overflows are no difference."""
    finite = alone.abs().nan_to_num(0.0, 0.0, 0.0)
    near = 4 * torch.finfo(alone.dtype).eps * float(finite.sum())
    return torch.allclose(output, alone, rtol=0.0, atol=near, equal_nan=True)
