"""Process groups and reductions."""

from .layout import Layout

__all__ = ["Layout"]
