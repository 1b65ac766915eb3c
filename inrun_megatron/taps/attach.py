"""Putting taps into a model: a registry from module type to how that type is tapped.

A trainable parameter that no tap covers is an error that names it: values that silently leave out a part
of the model would look right and be wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .coverage import Coverage, full_shape
from .emission import Pass, Sharding
from .replaced import METHODS, Replaced, methods_of
from .routing import Routed

# Taps a module in place and tells ``taps.cover`` which of its parameters are now seen.
Attacher = Callable[["Taps", Any, str], None]
REGISTRY: dict[type[nn.Module], Attacher] = {}
_REFUSING: set[type[nn.Module]] = set()


def register(*types: type[nn.Module], refuses: bool = False) -> Callable[[Attacher], Attacher]:
    """Register how modules of exactly these types (or subclasses without an entry) are tapped; ``refuses``: they are not."""

    def add(attacher: Attacher) -> Attacher:
        for kind in types:
            REGISTRY[kind] = attacher
        if refuses:
            _REFUSING.update(types)
        return attacher

    return add


@dataclass
class Taps:
    """The taps of one model and the pass that their forwards belong to now.

    Attributes:
        model: the module whose layers are tapped (in place, per instance).
        sequence_first: plain norms and linears see ``[s, b, h]`` (Megatron) rather than ``[b, s, h]``.
        current: the pass that a forward joins; None: taps compute, and emit nothing.
        sharding: of every tapped parameter, by ``id``.
        routed: of experts' linear layers, by ``id``: which tokens the layer sees now (experts.py).
        settled: detached passes, in evaluation and in training mode, have been watched (see ``untouched``).
    """

    model: nn.Module
    sequence_first: bool
    current: Pass | None = None
    sharding: dict[int, Sharding] = field(default_factory=dict)
    routed: dict[int, Callable[[], Routed | None]] = field(default_factory=dict)
    settled: bool = False
    _replaced: list[tuple[str, Replaced]] = field(default_factory=list)
    _trains: list[tuple[str, nn.Parameter, bool]] = field(default_factory=list)
    _detached: bool = False

    def cover(self, sharding: Sharding, *parameters: nn.Parameter | None) -> None:
        """These parameters (those that train) now have a tap and are laid out like this."""
        for parameter in parameters:
            if parameter is None or not parameter.requires_grad:
                continue
            before = self.sharding.setdefault(id(parameter), sharding)
            assert before.splits == sharding.splits, "a parameter is used both split and replicated"

    @contextmanager
    def during(self, run: Pass | None) -> Iterator[None]:
        """Forwards inside belong to ``run``."""
        previous, self.current = self.current, run
        try:
            yield
        finally:
            self.current = previous

    @contextmanager
    def untouched(self, loss: Tensor | None = None) -> Iterator[None]:
        """The backward of a detached pass, from ``loss``, happens inside, which no parameter may see. The first ones are watched.

        Raises:
            UserError: names a parameter that is used outside its tapped module too, for example by ``F.linear(x,
                embedding.weight)``: it would train on the validation gradient, and lack a part of its samples' values.
                Or ``loss`` depends on a parameter that is not in the model at all.
        """
        if self.settled:
            yield
            return
        if loss is not None:
            self._refuse_strangers(loss)

        def refuse(name: str) -> Callable[[object], None]:
            def hook(_: object) -> None:
                raise UserError(
                    f"parameter {name} is used outside its own module, or there in another way than by its layer's usual "
                    f"function, where no tap sees it: call the module that holds it, tie weights through modules, or "
                    f"register a tap for the layer that uses it"
                )

            return hook

        named = self.model.named_parameters()
        hooks = [p.register_hook(refuse(n)) for n, p in named if p.requires_grad]  # before it is accumulated
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _refuse_strangers(self, loss: Tensor) -> None:
        """The loss of a detached pass may have no parameters beside the model's, which hooks watch; see ``untouched``."""
        own = {id(p) for p in self.model.parameters()}
        seen, nodes = set(), [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
                raise UserError(
                    f"the loss function trains a parameter of shape {tuple(leaf.shape)} that is not in the engine's module: "
                    f"validation would leave a gradient in it; move it into the module, in a layer that can be tapped, or "
                    f"detach it in the loss function"
                )
            nodes += [following for following, _ in node.next_functions]

    def capture(self, function: Callable[..., object]) -> Callable[..., object]:
        """``function``, later called as if in the pass that is current now.

        For activation recomputation: the recomputed forward runs in backward and must see the pass of
        the first one.
        """
        run = self.current

        def in_pass(*args: object, **kwargs: object) -> object:
            with self.during(run):
                return function(*args, **kwargs)

        return in_pass

    def coverage(self) -> Coverage:
        """Which trainable parameters the taps see."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        missing = [(n, p) for n, p in named if id(p) not in self.sharding]
        elements = sum(full_shape(p).numel() for _, p in named)
        return Coverage(
            parameters=len(named),
            tapped=len(named) - len(missing),
            elements=elements,
            tapped_elements=elements - sum(full_shape(p).numel() for _, p in missing),
            missing=tuple(n for n, _ in missing),
        )

    def attach(self, module: nn.Module, name: str, attacher: Attacher) -> None:
        """Tap one module.

        Raises:
            UserError: the attacher would undo what somebody else has put in the place of the module's forward.
        """
        before = methods_of(module)
        attacher(self, module, name)
        for method in METHODS:
            function = module.__dict__.get(method)
            if function is None or function is before.get(method):
                continue
            if method in before:
                for own in METHODS:
                    module.__dict__.pop(own, None)
                module.__dict__.update(before)
                raise UserError(
                    f"layer {name} has a {method} of its own on the instance, and the tap would undo that: close() an "
                    f"InRunShapley that still has the model, or wrap the layer in a module instead of replacing its {method}"
                )
            self._replaced.append((name, Replaced(module, method, function)))

    def remember_trained(self) -> None:
        """Of all parameters, whether they train now: what `require_unchanged` compares with."""
        self._trains = [(name, p, p.requires_grad) for name, p in self.model.named_parameters()]

    def require_unchanged(self) -> None:
        """Taps must be where they were put, and the same parameters trainable as then.

        Raises:
            UserError: names the layer whose forward, or the parameter whose ``requires_grad``, is another since.
        """
        if self._detached:
            raise UserError("the model's taps have been taken out by close(): make a new InRunShapley")
        for name, replaced in self._replaced:
            if not replaced.in_place:
                raise UserError(
                    f"layer {name} has lost its tap: its {replaced.method} has been replaced since; close() before a model is "
                    f"changed, and make a new InRunShapley afterwards"
                )
        for name, parameter, trained in self._trains:
            if parameter.requires_grad != trained:
                now = "frozen" if trained else "made trainable"
                raise UserError(
                    f"parameter {name} has been {now} since taps were attached, and values would be of what trained then; "
                    f"close() before a model is changed, and make a new InRunShapley afterwards"
                )

    def detach(self) -> None:
        """Put the model's own forwards back."""
        for _, replaced in self._replaced:
            replaced.restore()
        self._replaced.clear()
        self.sharding.clear()
        self.routed.clear()
        self._detached = True


def require_forward(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    """A tap that computes ``kind``'s forward itself must not be put on another one.

    Raises:
        UserError: a subclass that overrides ``forward``.
    """
    if type(module).forward is not kind.forward:
        raise UserError(
            f"layer {name} is a {type(module).__name__}, which overrides the forward of {kind.__name__}, and the tap would "
            f"undo that: register a tap for the type, or freeze its parameters (requires_grad=False)"
        )


def computes_weight(module: nn.Module) -> bool:
    """Is the weight of a plain layer no parameter, but made of others (weight_norm, parametrize)? A tap would see the result only."""
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, kinds) and "weight" not in module._parameters


def _attacher(module: nn.Module) -> Attacher | None:
    for kind in type(module).__mro__:
        if kind in REGISTRY:
            return REGISTRY[kind]
    return None


def _fill_registry() -> tuple[type[nn.Module], ...]:
    """Import what registers taps; returns megatron-core's parallel layers."""
    from . import any_module, plain  # noqa: F401

    if "transformers" in sys.modules:  # a model of theirs is made with it; importing it takes seconds
        with suppress(ImportError):
            from . import huggingface  # noqa: F401
    try:
        from . import experts, megatron  # noqa: F401
    except ImportError:  # megatron-core is needed only for models made of its layers
        return ()
    return megatron.PARALLEL_LAYERS


def attach_taps(model: nn.Module, *, sequence_first: bool | None = None, strict: bool = True) -> Taps:
    """Tap every layer of ``model`` that holds trainable parameters.

    Args:
        model: a model of megatron-core parallel layers, or of plain ``nn.Linear``, ``nn.Embedding``,
            ``nn.LayerNorm`` and ``nn.RMSNorm``.
        sequence_first: layout of plain layers' inputs; default: True if the model has a Megatron layer.
        strict: raise where a trainable parameter is left without a tap.

    Raises:
        UserError: names the parameters without a tap and their modules' types, or a layer that cannot be scored.
    """
    megatron_types = _fill_registry()
    if sequence_first is None:
        sequence_first = any(isinstance(m, megatron_types) for m in model.modules())
    taps = Taps(model, sequence_first)
    try:
        for name, module in model.named_modules():
            attacher = _attacher(module)
            if attacher is not None:
                taps.attach(module, name, attacher)
        if strict:
            _require_full_coverage(taps)
    except UserError:
        taps.detach()  # the model goes on without
        raise
    taps.remember_trained()
    return taps


def _require_full_coverage(taps: Taps) -> None:
    coverage, model = taps.coverage(), taps.model
    if coverage.missing:
        owners = {
            f"{name}.{own}" if name else own: module
            for name, module in model.named_modules()
            for own, _ in module.named_parameters(recurse=False)
        }
        listed = ", ".join(f"{n} ({_type_name(owners.get(n))})" for n in coverage.missing[:5])
        more = f" and {len(coverage.missing) - 5} more" if len(coverage.missing) > 5 else ""
        supported = ", ".join(sorted(t.__name__ for t in REGISTRY.keys() - _REFUSING - {nn.Module}))
        remedy = (
            f"freeze them (requires_grad=False), use a supported layer, or register a tap for the type "
            f"(inrun_megatron.taps.register; supported: {supported}, and modules of nothing but vectors)"
        )
        any_module = REGISTRY.get(nn.Module)
        if all(name in owners and _attacher(owners[name]) is not any_module for name in coverage.missing):
            remedy = "a layer has one where its weight trains: freeze them, too (requires_grad=False), or train the weights"
        computing = [name for name, module in model.named_modules() if computes_weight(module)]
        made = [n for n in computing if any(name.startswith(f"{n}.") for name in coverage.missing)]
        if made:
            remedy = (
                f"the weight of {made[0]} is computed from others (weight_norm, parametrize), which no tap sees: make it a "
                f"parameter again (remove_parametrizations, remove_weight_norm), or freeze all of the layer (requires_grad=False)"
            )
        raise UserError(
            f"{len(coverage.missing)} of {coverage.parameters} trainable parameters have no tap: {listed}{more}; {remedy}"
        )


def _type_name(module: nn.Module | None) -> str:
    return "?" if module is None else type(module).__name__
