"""Pictures of a dense-reward trajectory as PNG files: clean predictions by state, final samples, reward and gain by step.

matplotlib is used through its object interface (Figure and FigureCanvasAgg): no pyplot, no global backend or style.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .tables import deviation, rewards_of

INK, GREY, LINE, BLUE, ORANGE = "#1c2330", "#69707d", "#d9dde3", "#2563a8", "#c2571a"
FRAME = (217, 221, 227)  # LINE, in 8 bits
DPI = 160

Decode = Callable[[Tensor, Any], Tensor]


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of that size in pixels with an Agg canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def decode_rows(trajectory: Any, decode: Decode, samples: Tensor, state: int | None = None) -> Tensor:
    """Images uint8 [R, S, H, W, C] of the clean predictions of the samples [R]; of one state only if it is named (S = 1)."""
    clean, positions = trajectory.clean[samples.to(trajectory.clean.device)], torch.tensor(trajectory.states)
    if state is not None:
        clean, positions = clean[:, state, None], positions[[state]]
    rows, states = clean.shape[:2]
    info = SimpleNamespace(
        prompt_index=trajectory.prompt_index[samples].cpu().repeat_interleave(states),
        sample_index=samples.cpu().repeat_interleave(states),
        position=positions.repeat(rows),
    )
    images = torch.as_tensor(decode(clean.flatten(0, 1), info)).cpu()
    if images.ndim != 4 or images.shape[0] != rows * states or images.shape[1] not in (1, 3):
        raise ValueError(f"decode: wanted images [{rows * states}, 1 or 3, H, W], got {list(images.shape)}")
    if images.is_floating_point():
        images = (images.float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    sheet: Tensor = images.permute(0, 2, 3, 1).unflatten(0, (rows, states))
    return sheet


def clean_picture(trajectory: Any, path: Path, *, prompts: Sequence[str], decode: Decode, rows: int = 8) -> None:
    """One row per prompt (its first sample), one column per state: what the ODE would make of that state, and its reward."""
    index = trajectory.prompt_index.cpu()
    first = {prompts[p]: int((index == p).nonzero()[0, 0]) for p in reversed(index.unique().tolist())}
    chosen = torch.tensor(sorted(first.values())[:rows])
    rewards = rewards_of(trajectory)[0][chosen]
    grid = Grid(decode_rows(trajectory, decode, chosen), tile=104, gap=(32, 10), left=150, top=96)
    for r, sample in enumerate(chosen.tolist()):
        grid.label(r, prompts[int(index[sample])], 9.5)
        for s in range(len(trajectory.states)):
            grid.text(grid.x(s), grid.y(r) + grid.height / 2 + 14, f"{float(rewards[r, s]):.1f}", 7.5, GREY)
    for s, state in enumerate(trajectory.states):
        grid.text(grid.x(s), 34, str(state), 9.5, INK)
        grid.text(grid.x(s), 68, f"{float(trajectory.sigmas[state]):.2f}", 7.5, GREY)
    grid.text(grid.left - 16, 34, "state", 9.5, INK, align="right")
    grid.text(grid.left - 16, 68, "sigma", 7.5, GREY, align="right")
    grid.figure.savefig(path)


def final_picture(trajectory: Any, path: Path, *, prompts: Sequence[str], decode: Decode, columns: int = 16) -> None:
    """The final samples: one row per prompt, its group from the highest reward to the lowest."""
    index, rewards = trajectory.prompt_index.cpu(), rewards_of(trajectory)[0][:, -1]
    groups = [(p, (index == p).nonzero()[:, 0]) for p in index.unique().tolist()]
    groups = [(p, g[rewards[g].argsort(descending=True, stable=True)][:columns]) for p, g in groups]
    most = max(len(group) for _, group in groups)
    images = [decode_rows(trajectory, decode, group, state=-1)[:, 0] for _, group in groups]
    sheet = torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in images])
    grid = Grid(sheet, tile=72, gap=(8, 8), left=120, top=10)
    for r, (p, _) in enumerate(groups):
        grid.label(r, prompts[p], 8.5)
    grid.figure.savefig(path)


class Grid:
    """A figure with images [R, C, H, W, 1 or 3] in rows and columns, pixel for pixel; places are pixels from the upper left.

    Each image is enlarged to about `tile` pixels without smoothing and framed by a thin line. Grey images are drawn as dark
    ink on white. `gap` (below, right) is white between frames; `left` and `top` are margins for labels.
    """

    def __init__(self, images: Tensor, *, tile: int, gap: tuple[int, int], left: int, top: int) -> None:
        rows, columns, height, width, channels = images.shape
        scale = max(1, round(tile / height))
        self.height, self.width = height * scale + 2, width * scale + 2
        self.pitch = (self.height + gap[0], self.width + gap[1])
        self.left, self.top = left, top
        sheet = torch.full((rows, self.pitch[0], columns, self.pitch[1], 3), 255, dtype=torch.uint8)
        tiles = 255 - images.expand(-1, -1, -1, -1, 3) if channels == 1 else images
        tiles = tiles.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        sheet[:, : self.height, :, : self.width] = torch.tensor(FRAME, dtype=torch.uint8)
        sheet[:, 1 : self.height - 1, :, 1 : self.width - 1] = tiles.permute(0, 2, 1, 3, 4)
        sheet = sheet.reshape(rows * self.pitch[0], columns * self.pitch[1], 3)
        self.size = (left + sheet.shape[1], top + sheet.shape[0])
        self.figure = new_figure(*self.size)
        self.figure.figimage(sheet.numpy(), xo=left, yo=0)

    def x(self, column: int) -> float:
        """The middle of a column."""
        return self.left + column * self.pitch[1] + self.width / 2

    def y(self, row: int) -> float:
        """The middle of a row."""
        return self.top + row * self.pitch[0] + self.height / 2

    def text(self, x: float, y: float, text: str, size: float, color: str, align: str = "center") -> None:
        width, height = self.size
        self.figure.text(x / width, 1.0 - y / height, text, fontsize=size, color=color, ha=align, va="center")

    def label(self, row: int, text: str, size: float) -> None:
        """The name of a row, left of it."""
        self.text(self.left - 16, self.y(row), text, size, INK, align="right")


def reward_plot(trajectory: Any, path: Path, *, reward_name: str) -> None:
    """Above, the reward by state: mean, one standard deviation, and each prompt's mean. Below, the gain of each transition."""
    rewards, gains = rewards_of(trajectory)
    index = trajectory.prompt_index.cpu()
    by_prompt = torch.stack([rewards[index == p].mean(0) for p in index.unique()])
    states = torch.tensor(trajectory.states).numpy()
    mean, std = rewards.mean(0).numpy(), deviation(rewards).numpy()
    figure = new_figure(1150, 960)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2), "hspace": 0.12})
    for k, line in enumerate(by_prompt.numpy()):
        upper.plot(states, line, color=GREY, alpha=0.35, lw=0.8, label="mean of one prompt" if k == 0 else None)
    upper.fill_between(states, mean - std, mean + std, color=BLUE, alpha=0.15, lw=0, label="± one standard deviation")
    upper.plot(states, mean, color=BLUE, lw=2.0, marker="o", ms=4, label="mean of all samples")
    upper.set_ylabel("reward of the completion", color=INK)
    upper.legend(loc="lower left", fontsize=8, frameon=False, ncols=3)
    bottom, top = upper.get_ylim()
    upper.set_ylim(bottom - 0.14 * (top - bottom), top)

    middles = (states[:-1] + states[1:]) / 2
    parts = lower.violinplot(list(gains.T.numpy()), positions=middles, widths=0.75, showextrema=False)
    for body in parts["bodies"]:
        body.set(facecolor=ORANGE, alpha=0.22, edgecolor="none")
    lower.axhline(0.0, color=LINE, lw=1.0, zorder=0)
    lower.errorbar(
        middles, gains.mean(0).numpy(), yerr=deviation(gains).numpy(), fmt="o", ms=4, color=ORANGE, lw=1.2, capsize=2.5
    )
    lower.set_ylabel("gain of the step", color=INK)
    lower.set_xlabel("state (0: noise; last: the sample).  A gain stands between the states it compares", color=INK)
    lower.set_xticks(states)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.tick_params(colors=GREY, labelsize=8.5)
        axes.yaxis.grid(True, color=LINE, lw=0.5, alpha=0.7)
        axes.set_axisbelow(True)
    figure.suptitle(f"Reward: {reward_name}", x=0.1, ha="left", y=0.955, fontsize=11, color=INK)
    figure.subplots_adjust(left=0.1, right=0.985, top=0.91, bottom=0.095)
    figure.savefig(path)
