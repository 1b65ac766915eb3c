"""Modules with a weight ``[out, in]``, and perhaps a bias, that their forward gives to ``F.linear``: routers, and linear layers of
one's own that are no ``nn.Linear``.

The forward runs as it is, with the tap in ``F.linear``'s place. Routers compute in fp32 whatever they train in: a weight that the
forward has cast first is known for what it is, as long as the forward finds a view of the weight in its place. Whatever else it does
with that view gives the weight a gradient past its tap, which the first scored step looks for (``Taps.untouched``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .attach import Taps, full_shape
from .own_forward import USES, Given, watched
from .plain import bias_of, tap_linear


def is_linear(module: nn.Module) -> bool:
    """A weight of two dimensions, a bias of its output's, and nothing else; a norm over two dimensions has a shift like its scale."""
    own = dict(module.named_parameters(recurse=False))
    shapes = {name: full_shape(parameter) for name, parameter in own.items()}
    weight = shapes.pop("weight", ())
    return (
        type(module).forward is not nn.Module.forward
        and len(weight) == 2
        and all(name == "bias" and shape == weight[:1] for name, shape in shapes.items())
    )


def tap_own_linear(taps: Taps, module: Any, name: str) -> None:
    """Tap a module that ``is_linear``."""
    tapped = tap_linear(taps, module, name)
    if tapped is not None:
        module.forward = _OwnLinear(module, tapped)


class _OwnLinear:
    """The forward that takes the module's place."""

    def __init__(self, module: Any, tapped: Callable[..., Tensor]) -> None:
        self._module, self._tapped = module, tapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        weight = _Casts(module.weight)
        module.__dict__["weight"] = weight.view  # an instance's own attributes come before its parameters

        def instead(given: Given) -> Tensor | None:
            own = given.get("weight")
            if own is None or own not in weight or given.get("bias") is not bias_of(module):
                return None
            return self._tapped(given["input"], dtype=own.dtype)

        try:
            with watched(USES[nn.Linear], instead):
                return type(module).forward(module, *args, **kwargs)
        finally:
            del module.__dict__["weight"]


class _Casts:
    """A view of a weight that knows what it has been cast to."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.view = weight.view_as(weight)
        self._made = [self.view]
        for method in ("to", "type", "float", "double", "half", "bfloat16", "type_as"):
            setattr(self.view, method, self._noting(getattr(self.view, method)))

    def _noting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def cast(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            if isinstance(made, Tensor):
                self._made.append(made)
            return made

        return cast

    def __contains__(self, tensor: object) -> bool:
        return any(tensor is own for own in self._made)
