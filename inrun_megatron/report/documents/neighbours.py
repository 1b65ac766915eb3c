"""Rows of equal keys that are neighbours (runs, below): where they begin, sums over them."""

from __future__ import annotations

import numpy as np


def changes(*keys: np.ndarray) -> np.ndarray:
    """Where a row differs from the one before in one of `keys` [rows]; the first does."""
    fresh = np.ones(len(keys[0]), bool)
    fresh[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return fresh


def starts(*keys: np.ndarray) -> np.ndarray:
    """Where runs of equal keys begin."""
    return np.flatnonzero(changes(*keys))


def added(numbers: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """Sums of the runs that begin there; `reduceat` knows no empty arrays."""
    return np.add.reduceat(numbers, begin) if len(begin) else numbers[:0]


def within(size: np.ndarray) -> np.ndarray:
    """0, 1, ... size - 1 of each run, one after another."""
    return np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
