"""Directions, and how they travel: filled, summed over ranks, scaled and brought to the layers that read them."""

from .vectors import Directions, stored_type

__all__ = ["Directions", "stored_type"]
