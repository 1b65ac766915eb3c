"""Adapters to DeepSpeed: all of its internals are known here and nowhere else."""

from .zero import ZeroAdapter

__all__ = ["ZeroAdapter"]
