"""Process groups, and this rank's place in them."""

from .layout import Layout

__all__ = ["Layout"]
