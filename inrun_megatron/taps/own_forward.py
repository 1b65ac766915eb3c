"""A plain layer's subclass with a forward of its own: it runs as it is, and its use of its weight is tapped.

Scaled embeddings, positions with an offset, norms with another epsilon: while such a forward runs, ``F.linear``, ``F.embedding``
and so on are the tap's where they are given the module's own parameters. (Not by a ``TorchFunctionMode``: it does not see
``F.linear`` once DeepSpeed has put its own in that place, as ZeRO-3 does.) What a forward does with its parameters beside that is
found in the first validation pass, in which no gradient may reach one (``Taps.untouched``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# What a plain layer's forward calls, and the names of its arguments.
USES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.Linear: ("linear", ("input", "weight", "bias")),
    nn.Embedding: ("embedding", ("input", "weight")),
    nn.LayerNorm: ("layer_norm", ("input", "normalized_shape", "weight", "bias", "eps")),
    nn.RMSNorm: ("rms_norm", ("input", "normalized_shape", "weight", "eps")),
}


def around(module: nn.Module, kind: type[nn.Module], tapped: Callable[..., Tensor]) -> Callable[..., Any]:
    """The forward of ``module``, a ``kind`` or a subclass of it, in which the use of its own weight is ``tapped``.

    Args:
        tapped: takes the input and, by name, what else the function of ``USES`` is given and a tap must know (``eps``).
    """
    own = type(module).forward
    if own is kind.forward:  # with torch's own name for its argument, which may be given by name
        return (lambda x: tapped(x)) if kind is nn.RMSNorm else (lambda input: tapped(input))

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _instead(module, kind, tapped):
            return own(module, *args, **kwargs)

    return forward


@contextmanager
def _instead(module: nn.Module, kind: type[nn.Module], tapped: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, the function of ``USES`` is ``tapped`` when it is given the module's parameters."""
    name, names = USES[kind]
    function = getattr(F, name)

    def use(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("weight") is not module.weight or given.get("bias") is not getattr(module, "bias", None):
            return function(*args, **kwargs)
        return tapped(given["input"], **({"eps": given["eps"]} if "eps" in given else {}))

    setattr(F, name, use)
    try:
        yield
    finally:
        setattr(F, name, function)
