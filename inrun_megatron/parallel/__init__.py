"""Process groups, this rank's place in them, and how it leaves them."""

from .layout import Layout
from .leaving import wait_at_exit

__all__ = ["Layout", "wait_at_exit"]
