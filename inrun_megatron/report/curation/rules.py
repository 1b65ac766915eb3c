"""What the options of `inrun curate` say: which documents go, and how datasets are weighed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from inrun_megatron.errors import UserError


class Unit(StrEnum):
    """What percentages count."""

    documents = "documents"
    tokens = "tokens"


class Blend(StrEnum):
    """How datasets are weighed afterwards.

    tokens: each as before times the share of its tokens that is left, so that what is left is seen as often as before.
    keep: as before, so that what is left of a thinned dataset is seen more often. value: tokens, times exp(strength x
    value), where value is the dataset's score over the largest of all datasets.
    """

    tokens = "tokens"
    keep = "keep"
    value = "value"


@dataclass(frozen=True)
class Rules:
    """What goes. Rules add up: a document goes if one of them says so.

    drop_negative: scores below 0. drop_bottom: the lowest so many per cent. keep_top: all but the highest so many per
    cent. per_dataset: percentages within each dataset instead of over all. minimum_samples: a document that fewer scored
    samples contain is not judged; drop_unjudged: it goes. strength, smoothing: of Blend.value; smoothing is the share of
    the blend that stays as under Blend.tokens.
    """

    drop_negative: bool = False
    drop_bottom: float | None = None
    keep_top: float | None = None
    unit: Unit = Unit.documents
    per_dataset: bool = False
    minimum_samples: int = 1
    drop_unjudged: bool = False
    blend: Blend = Blend.tokens
    strength: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name, percent in (("drop-bottom", self.drop_bottom), ("keep-top", self.keep_top)):
            if percent is not None and not 0 < percent < 100:
                raise UserError(f"--{name} {percent:g} is no percentage; give a number between 0 and 100")
        if self.drop_bottom is not None and self.keep_top is not None:
            raise UserError(
                f"--drop-bottom {self.drop_bottom:g} and --keep-top {self.keep_top:g} both set a threshold; give one"
            )
        if self.minimum_samples < 1:
            raise UserError(f"--min-samples {self.minimum_samples} is no evidence; give 1 or more")
        if not 0 <= self.smoothing <= 1:
            raise UserError(f"--smoothing {self.smoothing:g} is no share; give a number from 0 to 1")
        if not abs(self.strength) <= 100:
            raise UserError(
                f"--strength {self.strength:g} is out of range; give a number up to 100, such as 1"
            )
        if not self.drops and self.blend is not Blend.value:
            raise UserError(
                "no rule is given: use --drop-negative, --drop-bottom P, --keep-top P, --drop-unjudged or --blend value"
            )

    @property
    def drops(self) -> bool:
        """Whether a rule can drop documents."""
        return (
            self.drop_negative
            or self.drop_unjudged
            or self.drop_bottom is not None
            or self.keep_top is not None
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            name: str(value) if isinstance(value, StrEnum) else value for name, value in vars(self).items()
        }
