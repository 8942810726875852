"""curves.png, samples.png and report.html of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.demo import digits, page
from fastflow.demo.figures import BLUE, GREY, LINE, ORANGE, Grid, new_figure
from fastflow.demo.figures import INK as DARK
from fastflow.demo.report import versions
from fastflow.demo.tables import Table, spread

TITLE = "Reinforcement learning of handwritten digits"
CALIBRATION = "calibration.png"  # beside the page, where the noise was calibrated
COLUMNS = 12  # pictures per prompt


def curves(rows: Sequence[Mapping[str, float]], path: Path, reward: str, distance: str) -> str:
    """Reward, ratio, clip fraction and distance from the network as it came, by update. Returns what is drawn, in words."""
    lower = (("ratio_max", "largest ratio", 1.0), ("clip_fraction", "clipped, %", 100.0), ("kl", distance, 1.0))
    lower = tuple(panel for panel in lower if not math.isnan(rows[0][panel[0]]))  # no ratios without stored transitions
    height = 460 + 180 * len(lower)
    figure = new_figure(1150, height)
    heights = {"height_ratios": (3, *(1.3 for _ in lower)), "hspace": 0.18}
    axes = figure.subplots(1 + len(lower), 1, sharex=True, gridspec_kw=heights)
    updates = [row["update"] for row in rows]
    mean, std = ([row[name] for row in rows] for name in ("reward_mean", "reward_std"))
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axes[0].fill_between(
        updates, low, high, color=BLUE, alpha=0.15, lw=0, label="± one standard deviation of the samples"
    )
    axes[0].plot(updates, mean, color=BLUE, lw=1.8, label="mean of the update's samples")
    axes[0].set_ylabel(reward, color=DARK)
    axes[0].legend(loc="lower right", fontsize=8, frameon=False)
    for each, (name, label, scale) in zip(axes[1:], lower, strict=True):
        each.plot(updates, [scale * row[name] for row in rows], color=ORANGE, lw=1.4)
        each.set_ylabel(label, color=DARK)
    axes[-1].set_xlabel("update", color=DARK)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(LINE)
        each.tick_params(colors=GREY, labelsize=8.5)
        each.yaxis.grid(True, color=LINE, lw=0.5, alpha=0.7)
        each.ticklabel_format(axis="y", useOffset=False)
    figure.align_ylabels(axes)
    figure.subplots_adjust(left=0.1, right=0.985, top=1.0 - 16 / height, bottom=80 / height)
    figure.savefig(path)
    return ", ".join(["reward", *(label for _, label, _ in lower)]) + " by update"


def samples(before: Tensor, after: Tensor, prompts: Sequence[int], path: Path) -> None:
    """images uint8 [P, C, 1, 8, 8] of the same noise: two rows a prompt, the network as it came above the trained one."""
    rows = torch.stack([before, after], 1).flatten(0, 1)[:, :COLUMNS].permute(0, 1, 3, 4, 2)
    grid = Grid(rows, tile=72, gap=(8, 8), left=170, top=10)
    for p, digit in enumerate(prompts):
        grid.label(2 * p, f"digit {digit}, before", 8.5)
        grid.label(2 * p + 1, "after", 8.5)
    grid.figure.savefig(path)


def write(
    folder: Path,
    rows: Sequence[Mapping[str, float]],
    *,
    prompts: Sequence[int],
    before: tuple[Tensor, Mapping[str, Tensor]],
    after: tuple[Tensor, Mapping[str, Tensor]],
    reward: str,
    command: str,
    settings: Mapping[str, Any],
    distance: str,
    calibrated: bool,
) -> Path:
    """before, after: (images uint8 [P, C, 1, 8, 8], {reward: [P * C]}) of the same noise. distance: what the log's kl is.
    calibrated: CALIBRATION is in the folder. Returns the page's path."""
    drawn = curves(rows, folder / "curves.png", reward, distance)
    samples(before[0], after[0], prompts, folder / "samples.png")
    scores = []
    for name in before[1]:
        gain = after[1][name] - before[1][name]
        error = float(gain.double().std() / len(gain) ** 0.5)
        cells = (spread(before[1][name]), spread(after[1][name]), f"{float(gain.mean()):+.2f} ± {error:.2f}")
        scores.append((name, *cells))
    note = (
        "Samples of the ODE, from the same noise with and without the LoRA: mean ± standard deviation of the samples, and the "
        "mean rise ± its standard error. margin: nats by which the classifier prefers the digit asked for. ink: minus the "
        "distance from the target, per cent of full ink."
    )
    seconds, last = sum(row["seconds"] for row in rows), rows[-1]
    sections = [
        f'<h1>{escape(TITLE)}</h1><p class="quiet">A small SD3 network, LoRA, and a reward of its finished images.</p>',
        page.figures(
            [
                ("updates", f"{len(rows)}"),
                ("reward at the first update", f"{rows[0]['reward_mean']:.2f}"),
                ("at the last", f"{last['reward_mean']:.2f}"),
                (f"{distance} to the network as it came", f"{last['kl']:.3g}"),
                ("evaluations", f"{sum(row['evaluations'] for row in rows):,.0f}"),
                ("seconds", f"{seconds:.1f}"),
            ]
        ),
        page.heading("Curves", "Of the samples that each update was made from, stochastic as they were."),
        page.image(folder / "curves.png", drawn),
        *(calibration(folder) if calibrated else ()),
        page.heading("Before and after", "Each column starts from the same noise."),
        page.image(folder / "samples.png", "Samples before and after training"),
        page.table(Table("Rewards before and after", ("reward", "before", "after", "rise"), scores, note)),
        page.heading("The same again") + f"<pre>{escape(command)}</pre>",
        page.pairs(settings),
        page.heading("Versions") + page.pairs(versions()),
    ]
    path = folder / "report.html"
    path.write_text(page.document(TITLE, sections), encoding="utf-8")
    return path


def calibration(folder: Path) -> list[str]:
    """The section of a run whose noise was calibrated."""
    below = (
        "The noise of each step, found before training: more while gains above and below 0 are in balance, else less."
    )
    picture = page.image(folder / CALIBRATION, "Noise by step, and sign balance of the gains by step")
    return [page.heading("Calibration", below), picture]


def pictures(clean: Tensor, prompts: int) -> Tensor:
    """Final states [P * C, 1, 8, 8] -> images uint8 [P, C, 1, 8, 8]."""
    return digits.decode(clean).unflatten(0, (prompts, -1))
