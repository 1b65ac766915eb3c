"""Adapters to DeepSpeed: what is not public of its engines and optimizers is known here and nowhere else."""

from .zero import ZeroAdapter

__all__ = ["ZeroAdapter"]
