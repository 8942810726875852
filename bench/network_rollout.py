"""`bench rollout --model NAME`: dense rollouts of networks of real size, in lockstep and as the sequential loop of TP-GRPO.

The loop completes each state alone, 65 network calls at T = 10, with the same network, attention and compile state. What is
quick comes first: how the network's time depends on the width of a call (which decides what lockstep can win beyond its fewer
evaluations), and where the time of a whole rollout with decode and reward goes. Then interleaved rounds of all ways, as many
as fit into the time, and what the engine adds to its network. Files are written anew after every part and every round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

import fastflow as ff
from tests.tolerance import REWIDTH

from . import gpu_cli, network_report, networks
from .gpu_report import heading
from .gpu_timing import clock_of
from .machine import gpu
from .networks import Network
from .registry import Call, Mismatch, compare
from .sequential import Dense, dense_rollout, guided

ROWS, STEPS, NOISE_LEVEL = 8, 10, 0.7
SEQUENTIAL, FULL, EXACT = "sequential", "lockstep full", "lockstep exact"
GRAPHS = " in graphs"
SATURATED = (
    1.06  # 1.25 / 1.18: rows of a wide call that cost no more than this fraction of theirs in a narrow one win nothing
)
CHECKED_STEPS = 3
DECODED = 8  # images of a decode and reward call
SPLIT = {FULL: False, FULL + GRAPHS: True}  # ways whose time is split by stage -> whether in graphs


@dataclass(frozen=True)
class Ways:
    """Wall seconds of each way by round, and the last trajectory of each lockstep."""

    seconds: dict[str, list[float]]
    last: dict[str, ff.Trajectory]
    overheads: dict[str, list[float]]  # (wall - network) / network, by round

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """How many times quicker, median over rounds."""
        return statistics.median(b / a for a, b in zip(self.seconds[name], self.seconds[base], strict=True))


@dataclass(frozen=True)
class Setting:
    """A network and how it is rolled."""

    network: Network
    device: torch.device
    rows: int
    steps: int = STEPS
    backend: str = "auto"
    few_widths: bool = False  # compiled networks
    graphs: dict[str, ff.Graphs] = field(default_factory=dict)

    def rollout(self, lockstep: str, graphs: bool = False, scored: bool = False) -> ff.Trajectory:
        network, spec = self.network, self.network.spec
        more: dict[str, Any] = (
            {"decode": network.decode, "reward": network.reward, "max_decode": DECODED} if scored else {}
        )
        if graphs:
            more["graphs"] = self.graphs.setdefault(lockstep, ff.Graphs())
        return ff.rollout(
            network.model, spec.shape, self.sigmas, ff.FlowSDE(NOISE_LEVEL), self.seeds, condition=network.condition,
            negative=network.negative, guidance=network.guidance, dense=ff.Completion(), lockstep=lockstep, progress=False,
            device=self.device, backend=self.backend, widths="auto" if self.few_widths else None, **more,
        )  # fmt: skip

    def sequential(self) -> Dense:
        network, spec = self.network, self.network.spec
        velocity = guided(network.model, network.condition, network.negative, spec.scale)
        with torch.no_grad():
            return dense_rollout(velocity, spec.shape, self.sigmas, NOISE_LEVEL, self.seeds.to(self.device))

    @property
    def sigmas(self) -> ff.Sigmas:
        return ff.sigma_schedule(self.steps, shift=self.network.spec.shift)

    @property
    def seeds(self) -> torch.Tensor:
        return ff.sample_seeds(0, 0, range(self.rows), 1)


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(networks.SPECS)
    parser.add_argument(
        "--model", choices=("digits", *networks.SPECS), default="digits", metavar="NAME", help=f"digits, {names}"
    )
    parser.add_argument(
        "--compile", action="store_true", help="of a shape: the network under torch.compile, in all ways"
    )
    parser.add_argument("--no-graphs", action="store_true", help="of a shape: leave CUDA graphs out")


def run(console: Console, arguments: argparse.Namespace) -> None:
    """One spec on one device. Raises Mismatch where the ways disagree, ValueError without the device."""
    clock = clock_of(arguments.device)
    spec, device, rows = networks.SPECS[arguments.model], clock.device, arguments.rows or ROWS
    backend = gpu_cli.chosen(arguments.backend, device)[-1]
    about = gpu(device, arguments.sha)
    heading(console, about, clock.cache)
    network = networks.build(spec, rows, device, arguments.compile)
    console.print(
        f"{spec.name}: {spec.about}; {network.parameters / 1e9:.2f} B parameters, {rows} samples, T = {STEPS}, {backend}"
    )
    setting = Setting(network, device, rows, backend=backend, few_widths=arguments.compile)
    check(setting)
    graphs = device.type == "cuda" and not arguments.no_graphs
    regime = row_seconds(setting)
    to = network_report.Report(console, about, setting, arguments.results, arguments.compile, regime, saturated(regime))
    lockstep = lockstep_ways(setting, graphs)
    splits: dict[str, dict[str, float]] = {}
    for name, call in lockstep.items():
        call()  # not counted: libraries choose, graphs are captured
        if name in SPLIT:
            splits[name] = split(setting, SPLIT[name])
            to.keep_splits(splits)
    to.tell_splits(splits)
    ends = arguments.began + arguments.seconds
    to.tell_ways(measure(setting, lockstep, arguments.repeats, ends, to.keep_ways))


def check(setting: Setting) -> None:
    """The ways agree on a small network of the same family in float32, and this one's velocities are finite numbers.

    In bfloat16 the same row comes out differently in a call of another width, so the network itself shows nothing.
    """
    spec, device = setting.network.spec, setting.device
    short = Setting(networks.build(networks.SPECS[spec.kin], 2, device), device, 2, CHECKED_STEPS, setting.backend)
    with whole_float32():
        expected = short.sequential()
        for lockstep in ("exact", "full"):
            traj = short.rollout(lockstep)
            for part in ("samples", "log_probs", "clean"):
                compare(f"{part} of lockstep {lockstep}", getattr(traj, part), getattr(expected, part), REWIDTH)
    velocity = guided(setting.network.model, setting.network.condition, setting.network.negative, spec.scale)
    with torch.no_grad():
        if not bool(velocity(torch.randn(setting.rows, *spec.shape, device=device), 0.5).isfinite().all()):
            raise Mismatch(f"velocity of {spec.name}: not finite")


@contextmanager
def whole_float32() -> Iterator[None]:
    """Convolutions in float32 round no input to fewer bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def lockstep_ways(setting: Setting, graphs: bool) -> dict[str, Callable[[], ff.Trajectory]]:
    """By name, those first whose time is split by stage."""
    calls = {FULL: _way(setting, "full", False)}
    if graphs:
        calls[FULL + GRAPHS] = _way(setting, "full", True)
    return {**calls, EXACT: _way(setting, "exact", False)}


def measure(
    setting: Setting,
    lockstep: Mapping[str, Call],
    repeats: int,
    ends: float,
    keep: Callable[[Ways], None] = lambda ways: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Ways:
    """Interleaved rounds of the ways, each run before, and the loop, whose one width the check has made warm.

    The first round is always run, and no other that would take longer than until `ends` of the clock if it took as long as the
    one before. keep: is handed the ways so far after every round.
    """
    calls: dict[str, Call] = {**lockstep, SEQUENTIAL: setting.sequential}
    found: dict[str, list[float]] = {name: [] for name in calls}
    overheads: dict[str, list[float]] = {FULL: [], EXACT: []}
    last: dict[str, ff.Trajectory] = {}
    order, names, round_took = random.Random(0), list(calls), 0.0
    while len(found[SEQUENTIAL]) < repeats and (not round_took or clock() + round_took <= ends):
        began = clock()
        for name in order.sample(names, len(names)):
            wall, result = walled(calls[name], setting.device)
            found[name].append(wall)
            if isinstance(result, ff.Trajectory):
                last[name] = result
            if name in overheads:
                overheads[name].append(wall / result.stats.seconds["network"] - 1.0)
        round_took = clock() - began
        keep(Ways(found, last, overheads))
    return Ways(found, last, overheads)


def _way(setting: Setting, kind: str, graphs: bool) -> Callable[[], ff.Trajectory]:
    return lambda: setting.rollout(kind, graphs)


def walled(call: Call, device: torch.device) -> tuple[float, Any]:
    """Wall seconds until the device is done, and what the call returned."""
    wait(device)
    began = time.perf_counter()
    result = call()
    wait(device)
    return time.perf_counter() - began, result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row_seconds(setting: Setting, repeats: int = 3) -> dict[int, float]:
    """Network seconds per sample in calls of the main chain's width and of the widest call of lockstep "full"."""
    spec, found = setting.network.spec, {}
    for rows in (setting.rows, setting.rows * setting.steps):
        sample = torch.randn(rows, *spec.shape, device=setting.device)
        condition = networks.prompts(spec, rows, setting.device, 1)
        negative = networks.prompts(spec, rows, setting.device, 2) if spec.scale is not None else None
        velocity = guided(setting.network.model, condition, negative, spec.scale)
        with torch.no_grad():
            velocity(sample, 0.5)
            times = [walled(lambda v=velocity, s=sample: v(s, 0.5), setting.device)[0] for _ in range(repeats)]  # type: ignore[misc]
        found[rows] = statistics.median(times) / rows
    return found


def saturated(regime: Mapping[int, float]) -> bool:
    """Whether wide calls do a row hardly quicker than narrow ones."""
    narrow, wide = regime[min(regime)], regime[max(regime)]
    return narrow / wide < SATURATED


def split(setting: Setting, graphs: bool) -> dict[str, float]:
    """Seconds by stage of one rollout with decode and reward, and "idle": the rest of the wall. The network is warm."""
    network, shape = setting.network, setting.network.spec.shape
    info = ff.Info(*torch.zeros(3, DECODED, dtype=torch.int64))
    with torch.no_grad():
        network.reward(network.decode(torch.randn(DECODED, *shape, device=setting.device), info), info)
    wall, traj = walled(lambda: setting.rollout("full", graphs, scored=True), setting.device)
    stages = {name: traj.stats.seconds[name] for name in ("network", "step", "decode", "reward")}
    return {**stages, "idle": max(wall - sum(stages.values()), 0.0), "wall": wall}
