"""Rollouts: every state, the log-probability of every transition, a clean prediction from every state, in few network calls."""

from .api import plan, rollout
from .chains import Completion
from .condition import Shared
from .finish import Info
from .network import evaluate
from .plan import Call, Plan
from .trajectory import Trajectory

__all__ = ["Call", "Completion", "Info", "Plan", "Shared", "Trajectory", "evaluate", "plan", "rollout"]
