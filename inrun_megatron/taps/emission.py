"""What a tap emits: its layer's activation and output-gradient buffers, and what they are shards of.

Shape legend (one rank's local shapes): s tokens, b rows of the microbatch, `in` / `out` features of a
linear layer, h hidden size. Megatron layers are sequence first ``[s, b, .]``, embeddings batch first
``[b, s, .]``; ``Site.batch_dim`` says which dimension counts the rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..dots.precision import widened
from ..errors import UserError
from .routing import Routed, Routing


class Sharding(Enum):
    """How a parameter use is laid out over the tensor-parallel group; decides how partial dots sum.

    Partial dot products are linear in the training side, so over the group they are summed; a use whose
    gradient is the same on every rank must then be counted on one rank only.
    """

    COLUMN = "column"  # weight rows are split: full activation, sharded output gradient
    ROW = "row"  # weight columns are split: sharded activation, full output gradient
    VOCABULARY = "vocabulary"  # embedding rows are split
    SEQUENCE = "sequence"  # replicated parameter that sees this rank's share of the tokens
    HEADS = "heads"  # replicated parameter that sees this rank's share of the attention heads
    REPLICATED = "replicated"  # replicated parameter, same gradient on every rank: counts once

    @property
    def splits(self) -> bool:
        """True where every tensor-parallel rank holds another part of the parameter."""
        return self in (Sharding.COLUMN, Sharding.ROW, Sharding.VOCABULARY)


@dataclass(frozen=True)
class Site:
    """One use of a module's parameters.

    Attributes:
        name: the module's path in the model.
        kind: ``linear``, ``bias`` (any vector of which every token has its own view), ``embedding``, ``norm`` or ``experts``
            (linear layers whose weights ``[E, out, in]`` are one parameter).
        sharding: see :class:`Sharding`.
        batch_dim: the dimension of the activation that counts the rows of the microbatch.
        tp_rank, tp_size: place in the tensor-parallel group that the shards belong to.
        transposed: ``linear``, ``experts``: the weight lies as ``[in, out]``.
        expert: it sees tokens ``[n, .]`` that are routed to it (routing.py), not rows.
    """

    name: str
    kind: str
    sharding: Sharding
    batch_dim: int
    tp_rank: int = 0
    tp_size: int = 1
    transposed: bool = False
    expert: bool = False

    @cached_property
    def counts_here(self) -> bool:
        """False where another rank of the tensor-parallel group counts the same (replicated) gradient.

        The name decides which one, so that the ranks share the work instead of waiting for the first of them.
        """
        if self.sharding is not Sharding.REPLICATED:
            return True
        return self.tp_rank == zlib.crc32(self.name.encode()) % self.tp_size

    @cached_property
    def replicated(self) -> bool:
        """True where other ranks compute this gradient, too: all must add it up in the same order, or replicas drift."""
        return self.sharding is Sharding.REPLICATED and self.tp_size > 1

    @cached_property
    def sequence_shard(self) -> tuple[int, int]:
        """(which, of how many) shard of the sequence the buffers hold; (0, 1): whole rows.

        Megatron's linear layers see whole rows under sequence parallelism too: gathered before the product, or not
        scattered yet.
        """
        return (self.tp_rank, self.tp_size) if self.sharding is Sharding.SEQUENCE else (0, 1)


@dataclass
class Emission:
    """A layer's buffers in one backward call; no copies are made.

    Attributes:
        site: which layer, and what the buffers are shards of.
        run: the pass that the forward belonged to (captured at forward time).
        weight: the parameter (its ``.data`` is gathered here under ZeRO-3); for ``norm`` the scale, for ``bias`` the bias.
        output_grad: gradient of the loss with respect to the layer's output, ``[s, b, out]`` or ``[b, s, h]``.
        activation: ``linear``, ``norm``, ``experts``: the input ``[s, b, in]``; ``embedding``: local row ids, int64 ``[b, s]``;
            ``bias``: None.
        bias: ``norm``: the shift, if there is one.
        mean, rstd: ``norm``: the tokens' statistics ``[s, b, 1]``; no mean: RMSNorm.
        weight_grad: set by a consumer that computed the weight's or bias's gradient on its way (``linear`` and ``bias``);
            the tap computes it otherwise. Of a ``norm`` they are the tap's, with ``bias_grad``: the gradients ``[h]`` of scale and
            shift over all tokens, which training takes; None in detached passes.
        routed: of experts: which tokens these are; of one expert's layer where a consumer asked in the forward.
    """

    site: Site
    run: Pass
    weight: Parameter
    output_grad: Tensor
    activation: Tensor | None = None
    bias: Parameter | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None
    routed: Routed | None = None
    _normalised: Tensor | None = field(default=None, repr=False)

    @property
    def input(self) -> Tensor:
        """``activation`` of a layer that has one: all but biases."""
        assert self.activation is not None, self.site
        return self.activation

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of a linear layer, whose weight's gradient is ``B^T A`` as the weight lies."""
        return (self.output_grad, self.input) if self.site.transposed else (self.input, self.output_grad)

    def part_tokens(self) -> None:
        """Put rows and positions in front, as views, where a model has joined them, ``[b * s, .]``, or has heads between them,
        ``[b, heads, s, h]``."""
        shape = self.output_grad.shape
        if len(shape) == 3 or self.site.expert:
            return
        dims = self.run.token_dims(self.site)
        if dims is None:
            return
        if len(shape) == 2 and shape[0] == dims[0] * dims[1]:
            if self.run.rows > 1:
                self.run.require_apart(
                    f"layer {self.site.name} sees rows and positions joined, {shape[0]} tokens"
                )
            self._view(lambda buffer: buffer.unflatten(0, dims))
        elif len(shape) == 4 and (shape[0], shape[2]) == dims and shape[1] != shape[2]:
            self._view(lambda buffer: buffer.transpose(1, 2))

    def _view(self, view: Callable[[Tensor], Tensor]) -> None:
        for name in ("output_grad", "activation", "mean", "rstd", "_normalised"):
            buffer = getattr(self, name)
            if buffer is not None:
                setattr(self, name, view(buffer))

    def normalised(self) -> Tensor:
        """A norm's normalised input ``[s, b, h]``, in fp32 or wider."""
        if self._normalised is None:
            assert self.rstd is not None
            wide = widened(self.input)
            self._normalised = (wide if self.mean is None else wide - self.mean) * self.rstd
        return self._normalised


Consumer = Callable[[Emission], None]
"""Called with every emission. One that has to know which tokens an expert sees has a method ``route``, which the layer's forward
calls with its ``Routing`` (routing.py)."""


@dataclass(eq=False)
class Pass:
    """One forward and its backward, as the taps see it.

    A tap keeps the pass that was current at *forward* time; backward never reads global state.

    Attributes:
        consumers: called with every emission of this pass, in order.
        detached: parameters take no part in autograd, so that no ``AccumulateGrad`` node runs and the
            engine's gradient hooks stay silent; gradient flows from a dummy leaf.
        microbatch: index of the microbatch within the step.
        rows, positions: of the microbatch; positions may be unknown.
        apart: it has been looked at in two rows or more that layers keep a microbatch's rows apart, or is now.
        expanded: embeddings whose ids ``[s]`` or ``[1, s]`` were given to every row.
        arriving: called with every parameter before a layer reads it, where weights are still on their way.
    """

    consumers: Sequence[Consumer] = ()
    detached: bool = False
    microbatch: int = 0
    rows: int = 1
    positions: int | None = None
    apart: bool = True
    expanded: list[str] = field(default_factory=list, repr=False)
    arriving: Callable[[Parameter], None] | None = None
    anchor: Tensor | None = field(default=None, repr=False)

    @property
    def routes(self) -> list[Callable[[Routing], None]]:
        """Of the consumers that have to know which tokens experts see."""
        return [consumer.route for consumer in self.consumers if hasattr(consumer, "route")]

    def require_apart(self, what: str) -> None:
        """Rows can only be told from the order of tokens where that order has been looked at; ``what`` needs it.

        Raises:
            UserError: it has not.
        """
        if not self.apart:
            raise UserError(
                f"{what}, and whether they keep their rows is looked at in the first target's first microbatch, which needs two "
                f"rows or more for that: give validation microbatches more rows"
            )

    def may_be_positions(self, tokens: int) -> bool:
        """Of an embedding that sees as many ids ``[tokens]`` as there are rows: may they be positions?"""
        return tokens > 1 and self.positions in (None, tokens)

    def token_dims(self, site: Site) -> tuple[int, int] | None:
        """The dimensions of tokens that a layer sees when it keeps rows and positions: ``(s, b)`` or ``(b, s)``, if known."""
        if self.positions is None:
            return None
        positions = self.positions // site.sequence_shard[1]
        return (self.rows, positions) if site.batch_dim == 0 else (positions, self.rows)

    def anchor_on(self, device: torch.device) -> Tensor | None:
        """The dummy leaf that makes outputs require a gradient where parameters are detached."""
        if not self.detached:
            return None
        if self.anchor is None or self.anchor.device != device:
            self.anchor = torch.zeros((), device=device, requires_grad=True)
        return self.anchor


@dataclass
class Call:
    """What one call of a tapped module hands to its autograd function."""

    site: Site
    run: Pass | None
    weight: Parameter
    bias: Parameter | None = None

    def __post_init__(self) -> None:
        if self.run is not None and self.run.arriving is not None:
            for parameter in (self.weight, self.bias):
                if parameter is not None:
                    self.run.arriving(parameter)

    @property
    def emits(self) -> bool:
        """Does anybody want this call's emission?"""
        return self.run is not None and bool(self.run.consumers)

    @property
    def detached(self) -> bool:
        """Does the call run in a pass whose parameters get no gradients?"""
        return self.run is not None and self.run.detached

    def attached(self, parameter: Parameter | None) -> Parameter | None:
        """The parameter as an autograd input, or None in a detached pass.

        The Parameter itself, never a detached alias: under ZeRO-3 an alias of the gathered weight would
        keep the gathered storage alive after DeepSpeed has let go of it.
        """
        return None if self.detached else parameter

    def refuse_autocast(self) -> None:
        """A tap computes in the types that it is given, where torch's own layer would cast, its backward among them."""
        if torch.is_autocast_enabled(self.weight.device.type):
            raise UserError(
                f"layer {self.site.name} runs under torch.autocast, which is not supported while scoring: leave it out (or "
                f"enabled=False around the layer) and use bf16 or fp16 in the DeepSpeed config"
            )

    def anchor(self, like: Tensor) -> Tensor | None:
        """The leaf on ``like``'s device that a detached pass's gradients flow from; None where parameters get theirs."""
        return None if self.run is None else self.run.anchor_on(like.device)

    def emit(self, output_grad: Tensor, activation: Tensor | None = None, **more: Any) -> Emission:
        """Show an emission, whose further fields are ``more``, to the pass's consumers."""
        assert self.run is not None
        emission = Emission(self.site, self.run, self.weight, output_grad, activation, **more)
        emission.part_tokens()
        for consumer in self.run.consumers:
            consumer(emission)
        return emission
