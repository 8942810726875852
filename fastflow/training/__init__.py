"""What a trainer does with a trajectory."""

from __future__ import annotations

from .credit import GroupInfo, group_advantages
from .credit_calibrator import CalibrationUpdate, ExplorationCalibrator
from .credit_steps import discount_weights, granular_advantages, step_gains
from .credit_tree import tree_advantages, tree_rewards
from .credit_turning import turning_points, turning_rewards
from .matching import MatchingRows, matching_loss, matching_rows, noised
from .matching_objectives import adaptive_kl_weight
from .off_trajectory import OffTrajectory, off_trajectory
from .pairs import noise_aware_weight, reward_difference_loss, step_dpo_loss, trajectory_dpo_loss
from .parity import Parity, parity
from .policy import policy_loss
from .replay import Replay, replay, rescore

__all__ = [
    "CalibrationUpdate",
    "ExplorationCalibrator",
    "GroupInfo",
    "MatchingRows",
    "OffTrajectory",
    "Parity",
    "Replay",
    "adaptive_kl_weight",
    "discount_weights",
    "granular_advantages",
    "group_advantages",
    "matching_loss",
    "matching_rows",
    "noise_aware_weight",
    "noised",
    "off_trajectory",
    "parity",
    "policy_loss",
    "replay",
    "rescore",
    "reward_difference_loss",
    "step_dpo_loss",
    "step_gains",
    "trajectory_dpo_loss",
    "tree_advantages",
    "tree_rewards",
    "turning_points",
    "turning_rewards",
]
