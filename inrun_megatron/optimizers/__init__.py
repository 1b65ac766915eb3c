"""The optimizer's step Phi(g), elementwise: its Jacobian, where it leads, and its slope along the batch's path."""

from .adam import STAND_IN, AdamStep
from .sgd import ProxyStep, SGDStep
from .step import CPU_BLOCK, Step, block_size

__all__ = ["CPU_BLOCK", "STAND_IN", "AdamStep", "ProxyStep", "SGDStep", "Step", "block_size"]
