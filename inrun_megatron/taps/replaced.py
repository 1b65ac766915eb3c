"""A method that a tap has put in the place of a module's own, on the instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

METHODS = ("forward", "_forward_impl", "gating")
"""What attachers replace: of any module, of megatron-core's linear layers, and of its routers."""


class Replaced:
    """``module.<method>`` by ``function``, until ``restore()``.

    A copy of the module (an average of the weights, say) has its type's own method again: ``function`` would compute with
    the weights of the module that was copied.
    """

    def __init__(self, module: nn.Module, method: str, function: Callable[..., Any]) -> None:
        self.module, self.method, self._function = module, method, function
        module.__dict__[method] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.method)

    @property
    def in_place(self) -> bool:
        """Has nobody replaced it since?"""
        return self.module.__dict__.get(self.method) is self

    def restore(self) -> None:
        """Put the type's own method back."""
        if self.in_place:
            del self.module.__dict__[self.method]


def methods_of(module: nn.Module) -> dict[str, Any]:
    """Methods of its own that somebody has given this module; those of a copy (above) are its type's."""
    own = {method: module.__dict__[method] for method in METHODS if method in module.__dict__}
    return {m: f for m, f in own.items() if getattr(f, "__func__", None) is not getattr(type(module), m)}
