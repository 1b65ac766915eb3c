"""Taps: layers that emit their sharded activation and output-gradient buffers."""

from .attach import REGISTRY, Taps, attach_taps, register
from .coverage import Coverage
from .emission import Call, Consumer, Emission, Pass, Sharding, Site
from .routing import Routing

__all__ = [
    "REGISTRY",
    "Call",
    "Consumer",
    "Coverage",
    "Emission",
    "Pass",
    "Routing",
    "Sharding",
    "Site",
    "Taps",
    "attach_taps",
    "register",
]
