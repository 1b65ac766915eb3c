"""Modules with a weight ``[out, in]``, and perhaps a bias, that their forward gives to ``F.linear``: routers, and linear layers of
one's own that are no ``nn.Linear``.

The forward runs as it is, with the tap in ``F.linear``'s place. Routers compute in fp32 whatever they train in: a weight that the
forward has cast first is known for what it is, as the forward finds a view of the weight in its place. Whatever else it does with
that view gives the weight a gradient past its tap, which the first scored step looks for (``Taps.untouched``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attach import Taps
from .coverage import full_shape
from .own_forward import USES, Given, watched
from .plain import bias_of, tap_linear


def is_linear(module: nn.Module) -> bool:
    """A weight of two dimensions, a bias of its output's, nothing else, and code that calls a function named ``linear``."""
    own = dict(module.named_parameters(recurse=False))
    shapes = {name: full_shape(parameter) for name, parameter in own.items()}
    weight = shapes.pop("weight", ())
    return (
        len(weight) == 2
        and all(name == "bias" and shape == weight[:1] for name, shape in shapes.items())
        and _calls_linear(type(module))
    )


def _calls_linear(kind: type[nn.Module]) -> bool:
    """Does one of its own methods? Only the first scored step shows with what."""
    own = [member for base in kind.__mro__ if base not in nn.Module.__mro__ for member in vars(base).values()]
    codes = (getattr(inspect.unwrap(member), "__code__", None) for member in own if callable(member))
    return any(code is not None and "linear" in code.co_names for code in codes)


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
        weight, bias = _Casts(module._parameters["weight"]), bias_of(module)
        shift = None if bias is None else _Casts(bias)

        def instead(given: Given) -> Tensor | None:
            own, added = given.get("weight"), given.get("bias")
            if own is None or own not in weight:
                return None
            if added is not None if shift is None else added not in shift:
                return None
            return self._tapped(given["input"], dtype=own.dtype)

        before = module.__dict__.copy()  # a forward may call itself
        module.__dict__["weight"] = weight.view  # an instance's own attributes come before its parameters
        if shift is not None:
            module.__dict__["bias"] = shift.view
        try:
            with watched(USES[nn.Linear], instead):
                return type(module).forward(module, *args, **kwargs)
        finally:
            for name in ("weight", "bias"):
                if name in before:
                    module.__dict__[name] = before[name]
                else:
                    module.__dict__.pop(name, None)


class _Casts:
    """A view of a parameter that knows what it has been cast to: tensors that still have its numbers, and its gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.view = parameter.view_as(parameter)
        self._trains = parameter.requires_grad
        self._made: list[tuple[Tensor, int]] = []
        for method in ("to", "type", "float", "double", "half", "bfloat16", "type_as"):
            setattr(self.view, method, self._noting(getattr(self.view, method)))

    def _noting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def cast(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            if isinstance(made, Tensor):
                self._made.append((made, made._version))
            return made

        return cast

    def __contains__(self, tensor: object) -> bool:
        return tensor is self.view or any(
            tensor is own and self._unchanged(own, version) for own, version in self._made
        )

    def _unchanged(self, own: Tensor, version: int) -> bool:
        # A cast without gradients is a constant, also to the module's own training.
        follows = own.requires_grad == (self._trains and torch.is_grad_enabled())
        return own._version == version and follows
