"""fastflow: cheap and exact reinforcement-learning rollouts of flow-matching and diffusion models.

import fastflow as ff
"""

from __future__ import annotations

import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# A bare checkout and an editable install find `fastflow.kernels` beside this folder; a wheel has it inside.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")):
    __path__.append(_os.path.dirname(_here))

from .dynamics import (  # noqa: E402
    CPS,
    DDIM,
    ODE,
    At,
    DanceSDE,
    DPMSolverSDE,
    FlowDDIM,
    FlowSDE,
    Sigmas,
    TableSDE,
    Transitions,
    WanSDE,
    sigma_schedule,
    sigmas_from,
    sub_grid,
)
from .errors import BackendError, RolloutError, RolloutInterrupted  # noqa: E402
from .guidance import CFG  # noqa: E402
from .noise import Noise, sample_seeds  # noqa: E402
from .ops import StepOutput, log_prob, step  # noqa: E402
from .rewards import RewardServer  # noqa: E402
from .rollout import (  # noqa: E402
    Completion,
    Graphs,
    Info,
    Memory,
    Plan,
    Route,
    Shared,
    Trajectory,
    check_seeds,
    evaluate,
    gather,
    plan,
    rollout,
)
from .training import (  # noqa: E402
    CalibrationUpdate,
    ExplorationCalibrator,
    GroupInfo,
    MatchingRows,
    OffTrajectory,
    Parity,
    Replay,
    adaptive_kl_weight,
    discount_weights,
    granular_advantages,
    group_advantages,
    matching_loss,
    matching_rows,
    noise_aware_weight,
    noised,
    off_trajectory,
    parity,
    policy_loss,
    replay,
    rescore,
    reward_difference_loss,
    step_dpo_loss,
    step_gains,
    trajectory_dpo_loss,
    tree_advantages,
    tree_rewards,
    turning_points,
    turning_rewards,
)

if _TYPE_CHECKING:
    from . import models as models

__version__ = "0.1.0"

__all__ = [
    "CFG",
    "CPS",
    "DDIM",
    "ODE",
    "At",
    "BackendError",
    "CalibrationUpdate",
    "Completion",
    "DPMSolverSDE",
    "DanceSDE",
    "ExplorationCalibrator",
    "FlowDDIM",
    "FlowSDE",
    "Graphs",
    "GroupInfo",
    "Info",
    "MatchingRows",
    "Memory",
    "Noise",
    "OffTrajectory",
    "Parity",
    "Plan",
    "Replay",
    "RewardServer",
    "RolloutError",
    "RolloutInterrupted",
    "Route",
    "Shared",
    "Sigmas",
    "StepOutput",
    "TableSDE",
    "Trajectory",
    "Transitions",
    "WanSDE",
    "adaptive_kl_weight",
    "check_seeds",
    "discount_weights",
    "evaluate",
    "gather",
    "granular_advantages",
    "group_advantages",
    "log_prob",
    "matching_loss",
    "matching_rows",
    "models",
    "noise_aware_weight",
    "noised",
    "off_trajectory",
    "parity",
    "plan",
    "policy_loss",
    "replay",
    "rescore",
    "reward_difference_loss",
    "rollout",
    "sample_seeds",
    "sigma_schedule",
    "sigmas_from",
    "step",
    "step_dpo_loss",
    "step_gains",
    "sub_grid",
    "trajectory_dpo_loss",
    "tree_advantages",
    "tree_rewards",
    "turning_points",
    "turning_rewards",
]


def __getattr__(name: str) -> _Any:
    if name == "models":
        import importlib

        return importlib.import_module(".models", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
