"""Writes what a dense-reward rollout looks like: pictures, and one HTML page that needs no other file."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

import fastflow as ff

from . import page
from .figures import Decode, clean_picture, final_picture, reward_plot
from .tables import cost_table, key_figures, print_tables, prompt_table, reward_table, rewards_of

__all__ = ["print_tables", "versions", "write_report"]

ABOUT = "A stochastic rollout in which every state is completed to a clean image and scored, so that each step has a reward."
LINE = 88  # characters of a command line that fit the page
ABOUT_FINAL = "A stochastic rollout whose final samples are scored."


def write_report(
    trajectory: Any,
    out_dir: str | Path,
    *,
    title: str,
    prompts: Sequence[str],
    command: str,
    settings: Mapping[str, Any],
    decode: Decode,
    reward_name: str,
) -> dict[str, Path]:
    """Writes clean.png, rewards.png, final.png and report.html into `out_dir` (made if it is not there).

    trajectory: what `ff.rollout` returns with decode= and reward=; without dense= there is no clean.png and no rewards.png.
    prompts: one label per prompt, as `trajectory.prompt_index` counts them. command: how to get the same result again.
    settings: what to list, in order. decode: as given to the rollout; must give images [M, 1 or 3, H, W], uint8 or in 0..1.
    Returns the paths by name: "clean", "rewards", "final", "report". The page has its pictures inside and loads nothing.
    Raises ValueError if the trajectory has no rewards, or several, or if `prompts` does not cover its prompt_index.
    """
    rewards_of(trajectory)
    if int(trajectory.prompt_index.max()) >= len(prompts):
        raise ValueError(f"prompts: wanted {int(trajectory.prompt_index.max()) + 1} labels or more, got {len(prompts)}")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    dense = len(trajectory.states) > 1
    paths = {name: out / f"{name}.png" for name in (("clean", "rewards", "final") if dense else ("final",))}
    if dense:
        clean_picture(trajectory, paths["clean"], prompts=prompts, decode=decode)
        reward_plot(trajectory, paths["rewards"], reward_name=reward_name)
    final_picture(trajectory, paths["final"], prompts=prompts, decode=decode)
    sections = [
        f'<h1>{escape(title)}</h1><p class="quiet">{ABOUT if dense else ABOUT_FINAL}</p>',
        page.figures(key_figures(trajectory)),
        *(_dense_sections(trajectory, paths) if dense else ()),
        page.table(cost_table(trajectory)),
        page.heading("Final samples", "One row per prompt, from the highest reward of the group to the lowest."),
        page.image(paths["final"], "Final samples by prompt"),
        page.table(prompt_table(trajectory, prompts)),
        page.heading("The same again") + f"<pre>{escape(_folded(command))}</pre>",
        page.pairs({"reward": reward_name, **settings, "schedule hash": trajectory.stats.schedule_hash}),
        page.heading("Versions") + page.pairs(versions()),
    ]
    paths["report"] = out / "report.html"
    paths["report"].write_text(page.document(title, sections), encoding="utf-8")
    return paths


def versions() -> dict[str, str]:
    """What ran: Python, the packages that matter, and the machine in words."""
    found = {"fastflow": ff.__version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**found, "system": f"{platform.system()} {platform.machine()}", "device": device}


def _folded(command: str) -> str:
    """A long command line, an option a line, as a shell takes it."""
    return command if len(command) <= LINE else command.replace(" --", " \\\n    --")


def _dense_sections(trajectory: Any, paths: Mapping[str, Path]) -> list[str]:
    clean = (
        f"What the ODE makes of each state, from the initial noise (0) to the finished sample ({trajectory.states[-1]}). One "
        "row is one sample; below each image stands its reward. What changes from one column to the next is the work of that "
        "step's noise."
    )
    if float(trajectory.transitions.std[-1]) > 0:
        clean += " The last step is stochastic too: its noise stays in the finished sample."
    gain = "The gain of a step is the reward after it less the reward before it: what that step was worth."
    return [
        page.heading("Clean predictions along the steps", clean),
        page.image(paths["clean"], "Clean predictions by prompt and state"),
        page.heading("Reward and gain by step", gain),
        page.image(paths["rewards"], "Reward by state and gain by step"),
        page.table(reward_table(trajectory)),
    ]
