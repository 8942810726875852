"""The operations: one transition, and the log-probability of a stored one."""

from .log_prob import log_prob
from .step import StepOutput, step

__all__ = ["StepOutput", "log_prob", "step"]
