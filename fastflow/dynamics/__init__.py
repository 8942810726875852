"""Dynamics as data: each family turns a schedule into the scalars of its transitions, in float64, on the host."""

from .at import At as At
from .base import Dynamics as Dynamics
from .base import Grid as Grid
from .base import Rows as Rows
from .cps import CPS as CPS
from .dance_sde import DanceSDE as DanceSDE
from .ddim import DDIM as DDIM
from .dpm_solver_sde import DPMSolverSDE as DPMSolverSDE
from .flow_ddim import FlowDDIM as FlowDDIM
from .flow_sde import FlowSDE as FlowSDE
from .ode import ODE as ODE
from .schedule import Sigmas as Sigmas
from .schedule import sigma_schedule as sigma_schedule
from .schedule import sigmas_from as sigmas_from
from .schedule import sub_grid as sub_grid
from .table_sde import TableSDE as TableSDE
from .transitions import StackedTransitions as StackedTransitions
from .transitions import Transitions as Transitions
from .wan_sde import WanSDE as WanSDE

__all__ = [
    "CPS", "DDIM", "ODE", "At", "DPMSolverSDE", "DanceSDE", "Dynamics", "FlowDDIM", "FlowSDE", "Grid", "Rows", "Sigmas",
    "StackedTransitions", "TableSDE", "Transitions", "WanSDE", "sigma_schedule", "sigmas_from", "sub_grid",
]  # fmt: skip
