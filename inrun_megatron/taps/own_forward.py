"""Layers with a forward of their own: it runs as it is, and its use of its parameters by a plain layer's function is tapped.

Scaled embeddings, positions with an offset, norms with another epsilon: while such a forward runs, ``F.linear``, ``F.embedding``
and so on are the tap's where they are given the module's own parameters. (Not by a ``TorchFunctionMode``: it does not see
``F.linear`` once DeepSpeed has put its own in that place, as ZeRO-3 does.) What a forward does with its parameters beside that is
found in the first validation pass, in which no gradient may reach one (``Taps.untouched``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Use:
    """A function that a plain layer's forward calls: its name in ``torch.nn.functional``, its arguments, further defaults that
    a tap must know."""

    function: str
    arguments: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...] = ()


USES: dict[type[nn.Module], Use] = {
    nn.Linear: Use("linear", ("input", "weight", "bias")),
    nn.Embedding: Use(
        "embedding",
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        (("padding_idx", None), ("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)),
    ),
    nn.LayerNorm: Use("layer_norm", ("input", "normalized_shape", "weight", "bias", "eps"), (("eps", 1e-5),)),
    nn.RMSNorm: Use("rms_norm", ("input", "normalized_shape", "weight", "eps"), (("eps", None),)),
}

Given = dict[str, Any]
"""The arguments of one call, by name."""


@contextmanager
def watched(use: Use, instead: Callable[[Given], Tensor | None]) -> Iterator[None]:
    """Inside, calls of the function return what ``instead`` returns, or, where that is None, what they are."""
    function = getattr(F, use.function)

    def called(*args: Any, **kwargs: Any) -> Any:
        known = len(args) <= len(use.arguments)
        output = instead(dict(zip(use.arguments, args, strict=False)) | kwargs) if known else None
        return function(*args, **kwargs) if output is None else output

    setattr(F, use.function, called)
    try:
        yield
    finally:
        setattr(F, use.function, function)


def around(
    module: nn.Module,
    kind: type[nn.Module],
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    tapped: Callable[..., Tensor],
) -> Callable[..., Any]:
    """The forward of ``module``, in which the use of its ``weight`` and ``bias`` by ``kind``'s function is ``tapped``.

    Args:
        tapped: takes the input and, by name, the function's further arguments of ``Use.defaults``.
    """
    own, use = type(module).forward, USES[kind]

    def instead(given: Given) -> Tensor | None:
        if given.get("weight") is not weight or given.get("bias") is not bias:
            return None
        return tapped(given["input"], **{name: given.get(name, default) for name, default in use.defaults})

    def forward(*args: Any, **kwargs: Any) -> Any:
        with watched(use, instead):
            return own(module, *args, **kwargs)

    return forward
