"""Estimators: where the validation gradient is taken, and what it is multiplied by.

The value of a set of samples S is ``U_k(S) = L_k(Phi_t(0)) - L_k(Phi_t(g_S))``. Every estimator is

    phi_i = c_t <d_k, g_i>,     d_k = J * sum_n q_n grad L_k(w_n)     (elementwise on the optimizer's shards)

    first_order   one node, w_t (base current) or Phi(0) (base drift: momentum and decay alone); J the step's Jacobian
    midpoint      one node, halfway between Phi(0) and Phi(c G); J = (Phi(0) - Phi(c G)) / (c G)
    simpson       Phi(0), halfway, Phi(c G) with weights 1/6, 4/6, 1/6; the same J

The path estimators are the Aumann-Shapley value of the step, the Shapley value of a game of many small players: a
coordinate's move ``Phi(0) - Phi(c G)`` is shared in proportion to ``g_i / G``, whatever the optimizer does on the way,
and what the move is worth is the integral of grad L_k along it. The integral of a gradient is the same over every path,
so the nodes lie on the straight line between the ends, where the quadrature is at its best. The values' sum is then the
quadrature of the true utility. Under SGD the midpoint is the paper's second-order value (arXiv 2406.11011, Theorem 4)
up to O(lr^3), without a Hessian-vector product.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError

ESTIMATORS = ("first_order", "midpoint", "simpson")
BASES = ("current", "drift")
CREDITS = ("step", "trajectory")


@dataclass(frozen=True)
class Node:
    """A point at which the validation gradient is taken.

    Attributes:
        share: how far along the straight line from Phi(0) to Phi(c G); None: at w_t itself.
        weight: of its gradient.
    """

    share: float | None
    weight: float


@dataclass(frozen=True)
class Estimator:
    """Nodes of one estimator.

    Attributes:
        name: as given.
        nodes: points and weights; the weights add up to 1.
        follows_batch: whether G_t must be known first, by a second forward and backward of the batch.
    """

    name: str
    nodes: tuple[Node, ...]
    follows_batch: bool

    @classmethod
    def of(cls, name: str, base: str = "current") -> Estimator:
        """Raises UserError on a name or base that does not exist."""
        if name not in ESTIMATORS:
            raise UserError(f"estimator {name!r} is none of {', '.join(ESTIMATORS)}")
        if base not in BASES:
            raise UserError(f"base {base!r} is none of {', '.join(BASES)}")
        if name == "midpoint":
            return cls(name, (Node(0.5, 1.0),), True)
        if name == "simpson":
            return cls(name, (Node(0.0, 1 / 6), Node(0.5, 4 / 6), Node(1.0, 1 / 6)), True)
        return cls(name, (Node(None if base == "current" else 0.0, 1.0),), False)

    @property
    def moves(self) -> bool:
        """Are the weights moved to take the gradient?"""
        return any(node.share is not None for node in self.nodes)

    @property
    def start(self) -> Node | None:
        """The node whose loss is the target's loss before the batch's step; None: evaluate at w_t."""
        return next((node for node in self.nodes if not node.share), None)
