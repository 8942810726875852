"""The bytes that `ff.plan` predicts, against what a process and a device really took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastflow as ff
from tests.rollout import footprint
from tests.rollout.networks import SHAPE, conditions, seeds_of, transformer
from tests.tolerance import MEMORY

SIGMAS = ff.sigma_schedule(10, shift=3.0)
RESET = os.access(footprint.RESET, os.W_OK)
Measure = Callable[[str], dict[str, int]]


@pytest.fixture(scope="module")
def measure() -> Iterator[Measure]:
    """A process of its own, which gives back every large tensor at once (glibc's threshold would rise by itself)."""
    pytest.importorskip("diffusers", reason="needs diffusers: the process runs one of its networks")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.rollout.footprint"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=root, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def ask(name: str) -> dict[str, int]:
            asked.write(f"{name}\n")
            asked.flush()
            result: dict[str, int] = json.loads(answers.readline())
            return result

        yield ask
        asked.close()


@pytest.mark.skipif(not RESET, reason="needs /proc/self/clear_refs, by which Linux starts a process's peak anew")
@pytest.mark.parametrize("name", footprint.CASES)
def test_a_process_grows_as_predicted(name: str, measure: Measure) -> None:
    found = measure(name)
    assert found["host"] == 0, "on a CPU the host is the device"
    assert found["measured"] == pytest.approx(found["predicted"], rel=MEMORY), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, whose allocator counts every byte")
@pytest.mark.parametrize("name", footprint.CASES)
def test_a_device_fills_as_predicted(name: str) -> None:
    found = footprint.measure(name, "cuda")
    assert (found["host"] > 0) == (name == "on the host")
    assert found["measured"] == pytest.approx(found["predicted"], rel=MEMORY), found


def memory_of(**changes: Any) -> ff.Memory:
    arguments: dict[str, Any] = {"condition": conditions(), "dense": ff.Completion(), **changes}
    memory = ff.plan(None, SHAPE, SIGMAS, ff.FlowSDE(0.7), seeds_of(2), **arguments).memory
    assert memory is not None
    return memory


ROW = 4 * 8 * 8 * 4  # float32
ENTRY = (5 * 16 + 16) * 4  # of one prompt


def test_every_part_of_a_small_rollout() -> None:
    """6 samples, 10 steps, all states completed: counted by hand."""
    memory = memory_of(reward=lambda images, info: None, max_decode=4, keep=("mean", "clean"))
    assert memory.states == 11 * 6 * ROW and memory.means == 10 * 6 * ROW and memory.completions == 11 * 6 * ROW
    # log-probabilities; flags of the chain and of the completions, for each step
    assert memory.working == 10 * 6 * 4 + 10 * (6 + 66) * 4
    assert memory.start == 2 * 6 * ROW, "draws, and what they are added to"
    assert memory.call == 9 * 6 * (ROW + ENTRY), "velocities and conditions of all completions"
    assert memory.score == 4 * ROW and memory.end == 6 * ROW and memory.host == 0
    assert memory.peak == memory.states + memory.means + memory.completions + memory.working + memory.call


def test_guidance_doubles_what_a_call_holds() -> None:
    negative = {"negative": conditions(1, seed=1)}
    one, two = memory_of(guidance=ff.CFG(3.0), **negative), memory_of(guidance=ff.CFG(3.0, calls=2), **negative)
    # both halves: states (side by side), conditions, velocities
    assert one.call == 9 * 6 * (2 * ROW + 2 * ENTRY + 2 * ROW)
    assert two.call == 9 * 6 * (2 * ENTRY + 2 * ROW)


def test_knobs_that_save_memory() -> None:
    whole = memory_of(reward=lambda images, info: None)
    assert memory_of(max_rows=6).call == 6 * (ROW + ENTRY) < whole.call
    assert whole.score == 66 * ROW and memory_of().score == 0
    assert memory_of(steps=[3, 4], dense=ff.Completion(states="window")).peak < whole.peak / 2
    network = ff.models.SD3(transformer().to(torch.bfloat16))
    plan = ff.plan(network, SHAPE, SIGMAS, ff.FlowSDE(0.7), seeds_of(2), condition=conditions(), dense=ff.Completion())
    assert plan.memory is not None and plan.memory.call == 9 * 6 * (ROW // 2 + ENTRY), (
        "velocities in the network's dtype"
    )


def test_a_plan_prints_its_bytes() -> None:
    text = str(ff.plan(None, (16, 128, 128), SIGMAS, ff.FlowSDE(0.7), torch.arange(64), dense=ff.Completion()))
    assert text.endswith("widths 64, 128, 192, 256, 320, 384, 448, 512, 576; 1.9 GiB beside the network")
    memory = ff.Memory(
        states=3 << 30, means=0, completions=1 << 20, working=512, start=0, call=1 << 18, score=0, end=0, host=5 << 29
    )
    assert str(memory) == "1.3 MiB beside the network, 2.5 GiB on the host"
    assert str(memory_of()).endswith("KiB beside the network")
    small = ff.Memory(states=100, means=0, completions=0, working=0, start=0, call=0, score=0, end=0, host=0)
    assert str(small) == "100 B beside the network"
