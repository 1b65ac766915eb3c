"""Counting what a step asks of the machine: collectives by type, and the host's reads from the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch import bool as bool_
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Every way by which Python gets a number out of a tensor, and with it waits for a device.
READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__bool__,
    Tensor.__index__,
}


class HostReads(TorchFunctionMode):
    """Counts reads of tensors by the host, by name; on a CPU too, where they cost nothing.

    Args:
        ignored: tensors whose reads do not count: the optimizer's step counters, which torch keeps on the CPU.
    """

    def __init__(self, ignored: Callable[[], Iterable[Tensor]] = tuple) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._ignored = ignored

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and not any(args[0] is tensor for tensor in self._ignored()):
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


# What makes the host wait for a device below Python: a number, or a shape that depends on data.
_WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
}


class HostWaits(TorchDispatchMode):
    """Counts operations whose result the host must wait for, by name, wherever they are called from.

    Args:
        ignored: tensors whose reads do not count.
    """

    def __init__(self, ignored: Callable[[], Iterable[Tensor]] = tuple) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._ignored = ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == bool_ for index in args[1]
        )
        # Writing one number where a mask says so is torch's masked_fill, which waits for nothing.
        masks = masks and (name == "index" or args[2].numel() > 1)
        lengths = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if (name in _WAITS or masks or lengths) and not any(args[0] is own for own in self._ignored()):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts operations that start work on the device, by name: no views, no memory. ``paused``: none now."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        name = func.__name__.split(".")[0]
        if not (view or self.paused or "empty" in name or name in ("_unsafe_view", "detach")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Collectives(TorchDispatchMode):
    """Counts the collectives of this rank by name and number of elements; those of the backward pass as well."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.counts[func.__name__.split(".")[0].strip("_"), sum(t.numel() for t in tensors)] += 1
        return func(*args, **(kwargs or {}))

    def by_type(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for (name, _), count in self.counts.items():
            total[name] += count
        return total


@contextmanager
def standing_in(stand_in: Any, modules: Iterable[str]) -> Iterator[None]:
    """``stand_in`` in the place of `torch.distributed` in modules of the package, named from its root."""
    found: list[Any] = [import_module(f"inrun_megatron.{name}") for name in modules]
    try:
        for module in found:
            module.dist = stand_in
        yield
    finally:
        for module in found:
            module.dist = dist
