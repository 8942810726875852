"""Adapters: a network that the host already holds, as the `model(sample, sigma, condition) -> velocity` of a rollout."""

from .sd3 import SD3

__all__ = ["SD3"]
