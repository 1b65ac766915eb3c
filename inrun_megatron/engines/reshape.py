"""The optimizer's state from a checkpoint of another parallel layout.

DeepSpeed's files hold flat shards that say nothing of what lies in them. So each rank leaves a note beside them, with
every parameter by the name it has in GPTModel:

    shards_00003.json   file, tensor and offset of each fragment of a parameter; how tensor parallelism cut it

A rank of another layout finds in the notes what its own pieces are made of: with the same tensor-parallel size the same
fragments of the same shards, otherwise the shards are first put together and cut anew. Masters and moments are taken
over bit for bit; the layers' weights are the masters rounded, as after every step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import UserError
from ..models.initialise import VOCABULARY, Cut, cut_of, joined, shard
from . import zero_files
from .inner import set_steps
from .shards import FlatGroup, Piece, Residence
from .zero_files import STEP, WEIGHT
from .zero_groups import OptimizerState

Names = Mapping[int, str]
"""id(parameter) -> its name in GPTModel."""


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of a piece, from `offset`: those of a parameter's shard (flat) from `start`."""

    parameter: str
    start: int
    offset: int
    numel: int


def fragments(group: FlatGroup, piece: Piece, names: Names, dp_rank: int) -> Iterator[Fragment]:
    """What a piece is made of; padding is left out."""
    for span in group.spans:
        begin, size = span.start, span.parameter.numel()
        skipped = 0  # of the shard, before what this rank holds of it
        if group.residence is Residence.PARTITIONED:
            size = span.parameter.ds_numel  # type: ignore[attr-defined]
            skipped = dp_rank * span.numel
        first = group.start + piece.start
        lo, hi = max(begin, first), min(begin + span.numel, first + piece.numel, begin + size - skipped)
        if lo < hi:
            yield Fragment(names[id(span.parameter)], lo - begin + skipped, lo - first, hi - lo)


def _shape(parameter: Parameter) -> list[int]:
    return list(getattr(parameter, "ds_shape", parameter.shape))


def describe(state: OptimizerState, names: Names, own_names: Names, tag: str) -> str | None:
    """This rank's note for a checkpoint, as JSON; None where another replica holds the same.

    own_names: what the engine's module calls the parameters.
    """
    layout, engine = state.layout, state.engine
    if layout.dp_rank > 0 and all(group.residence is Residence.REPLICATED for group in state.groups):
        return None
    parameters = [span.parameter for group in state.groups for span in group.spans]
    places = zero_files.weight_places(engine, tag) if state.is_bare else {}
    note = {
        "tp": [layout.tp_rank, layout.tp_size],
        "pp_rank": layout.pp_rank,
        "optimizer": type(state.inner).__name__,  # where steps are counted, say
        "model_file": zero_files.model_file(engine, tag),
        "optimizer_file": zero_files.optimizer_file(engine, tag),
        "parameters": {
            names[id(p)]: {
                "shape": _shape(p),
                "cut": asdict(cut) if (cut := cut_of(p)) is not None else None,
                "saved": places.get(own_names[id(p)]),
            }
            for p in parameters
        },
        "pieces": [
            {
                "param_group": piece.param_group,
                "fragments": [
                    [s.parameter, s.start, s.offset, s.numel]
                    for s in fragments(group, piece, names, layout.dp_rank)
                ],
            }
            for group, piece in state.pieces()
        ],
    }
    return json.dumps(note) + "\n"


@dataclass(frozen=True)
class _Source:
    """A fragment in a file."""

    file: Path
    number: int  # of the tensor in it
    param_group: int
    fragment: Fragment
    saved: Any  # where the layers' own weights are the masters: (file, keys)


class Saved:
    """The checkpoint of another layout, parameter by parameter. UserError where there are no notes in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sources: dict[tuple[str, int], list[_Source]] = {}
        self._shapes: dict[str, list[int]] = {}
        self._cuts: dict[str, Cut | None] = {}
        notes = [json.loads(path.read_text("utf-8")) for path in sorted(directory.glob("shards_*.json"))]
        if not notes:
            raise UserError(
                f"{directory} has no shards_*.json, which say what lies where in its files: restore them from a copy"
            )
        # A tied weight lies on the first and on the last stage: the first one's is taken.
        stage: dict[str, int] = {}
        for note in notes:
            for name in note["parameters"]:
                stage[name] = min(stage.get(name, note["pp_rank"]), note["pp_rank"])
        self.tp_size: int = notes[0]["tp"][1]
        self.model_file = directory / notes[0]["model_file"]
        self.optimizer_file = directory / notes[0]["optimizer_file"]
        for note in notes:
            own = {name for name in note["parameters"] if stage[name] == note["pp_rank"]}
            for name in own:
                about = note["parameters"][name]
                self._shapes[name] = about["shape"]
                self._cuts[name] = None if about["cut"] is None else Cut(**about["cut"])
            for number, piece in enumerate(note["pieces"]):
                for fragment in (Fragment(*values) for values in piece["fragments"]):
                    if fragment.parameter in own:
                        source = _Source(
                            directory / note["optimizer_file"],
                            number,
                            piece["param_group"],
                            fragment,
                            note["parameters"][fragment.parameter]["saved"],
                        )
                        self._sources.setdefault((fragment.parameter, note["tp"][0]), []).append(source)

    def check_names(self, names: set[str]) -> None:
        """UserError unless these, of all stages, are the parameters that were saved."""
        for there, other, missing in (
            ("the checkpoint", "this run lacks", sorted(self._shapes.keys() - names)),
            ("this run", "the checkpoint lacks", sorted(names - self._shapes.keys())),
        ):
            if missing:
                raise UserError(
                    f"{there} has a parameter {missing[0]}, which {other}: give the flags of the model that was saved"
                )

    def fields(self, name: str) -> dict[str, Any]:
        """What is saved of a parameter: field -> None for elementwise ones, the value for others."""
        source = self._sources[name, 0][0]
        found = zero_files.moments(source.file, source.number, source.param_group)
        return {WEIGHT: None} | {k: None if isinstance(v, Tensor) else v for k, v in found.items()}

    def _elements(self, source: _Source, field: str) -> Tensor:
        if field != WEIGHT:
            return zero_files.moments(source.file, source.number, source.param_group)[field]
        masters = zero_files.masters(source.file)
        if masters is not None:
            return masters[source.number].reshape(-1)
        file, keys = source.saved
        found = zero_files.opened(self._directory / file)
        for key in keys:
            found = found[key]
        return found.reshape(-1)

    def _fragment(self, name: str, field: str, tp_rank: int, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of one saved shard, flat."""
        out = torch.zeros(numel, dtype=torch.float32)
        filled = 0
        for source in self._sources[name, tp_rank]:
            own = source.fragment
            lo, hi = max(start, own.start), min(start + numel, own.start + own.numel)
            if lo < hi:
                at = own.offset + lo - own.start
                out[lo - start : hi - start] = self._elements(source, field)[at : at + hi - lo]
                filled += hi - lo
        if filled != numel:
            raise UserError(
                f"{self._directory} holds {filled} of {numel} elements of {name}: a shard is missing"
            )
        return out

    def read(
        self, parameter: Parameter, fragment: Fragment, field: str, tp_rank: int, tp_size: int
    ) -> Tensor:
        """A field's elements of a fragment of this run's shard of a parameter, flat, fp32. UserError: another shape."""
        name, cut = fragment.parameter, cut_of(parameter)
        shape = self._shapes[name]
        if self._cuts[name] != cut:
            raise UserError(f"{self._directory} has {name} cut as {self._cuts[name]}, this run as {cut}")
        if cut is None or tp_size == self.tp_size:
            if shape != _shape(parameter):
                raise _another_model(self._directory, name, shape, _shape(parameter))
            at = tp_rank if cut is not None else 0
            return self._fragment(name, field, at, fragment.start, fragment.numel)
        size = torch.Size(shape).numel()
        shards = [self._fragment(name, field, r, 0, size).view(shape) for r in range(self.tp_size)]
        whole = joined(shards, cut)
        expected = _shape(parameter)
        expected[cut.dim] *= tp_size
        if name.endswith(VOCABULARY):  # padding depends on the tensor-parallel size; its rows are 0
            padded = whole.new_zeros(expected)
            rows = min(len(whole), len(padded))
            padded[:rows] = whole[:rows]
            whole = padded
        if list(whole.shape) != expected:
            raise _another_model(self._directory, name, list(whole.shape), expected)
        own = shard(whole, cut.dim, cut.stride, tp_rank, tp_size)
        return own.reshape(-1)[fragment.start : fragment.start + fragment.numel]


def _another_model(directory: Path, name: str, saved: list[int], now: list[int]) -> UserError:
    return UserError(
        f"{directory} has {name} of shape {saved}, this run of {now}: give the flags of the model that was saved"
    )


def restore(state: OptimizerState, names: Names, saved: Saved) -> None:
    """Put masters, moments, step counts and loss scale of another layout into this one's optimizer.

    The layers' weights are the caller's to set (`Lookahead.copy_from_masters`, a collective). UserError where the checkpoint is of another model.
    """
    inner, layout = state.inner, state.layout
    parameters = {names[id(span.parameter)]: span.parameter for group in state.groups for span in group.spans}
    states: dict[int, dict[str, Any]] = {}
    steps: dict[int, int] = {}  # by parameter group
    with torch.no_grad(), state.with_parameters():
        for number, (group, piece) in enumerate(state.pieces()):
            elements: dict[str, Tensor] = {}
            for fragment in fragments(group, piece, names, layout.dp_rank):
                parameter = parameters[fragment.parameter]
                for field, value in saved.fields(fragment.parameter).items():
                    if field == STEP:
                        steps[piece.param_group] = value
                        continue
                    whole = elements.setdefault(field, torch.zeros(piece.numel))
                    own = saved.read(parameter, fragment, field, layout.tp_rank, layout.tp_size)
                    whole[fragment.offset : fragment.offset + fragment.numel] = own
            weight = elements.pop(WEIGHT, None)
            if weight is not None:
                piece.tensor.data.view(-1).copy_(weight)
            states[number] = {key: value.view_as(piece.tensor) for key, value in elements.items()}
        current = inner.state_dict()
        set_steps(inner, current["param_groups"], states, steps)
        inner.load_state_dict({"state": states, "param_groups": current["param_groups"]})
    zero_files.restore_loss_scale(state.engine.optimizer, zero_files.loss_scale(saved.optimizer_file))
