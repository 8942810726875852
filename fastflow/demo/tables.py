"""What a dense-reward trajectory cost and earned, as plain tables: one source for the terminal and for the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """Cells are text, the first column a label. `bars` (one per row, 0..1) draws a share; the last row may be a total."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    bars: Sequence[float] = ()
    total: bool = False


def rewards_of(trajectory: Any) -> tuple[Tensor, Tensor]:
    """Rewards [B, S] and gains [B, S-1] on the CPU. Raises ValueError where there are none, or several by name."""
    rewards, gains = trajectory.rewards, trajectory.gains
    if isinstance(rewards, dict):
        if len(rewards) != 1:
            raise ValueError(
                f"trajectory.rewards: wanted one reward to report, got {sorted(rewards)}; choose with set_rewards"
            )
        rewards, gains = next(iter(rewards.values())), next(iter(gains.values()))
    if rewards is None:
        raise ValueError("trajectory.rewards: wanted [B, S], got None; roll out with decode= and reward=")
    return rewards.float().cpu(), gains.float().cpu()


def deviation(values: Tensor) -> Tensor:
    """Standard deviation over the samples (the first axis); 0 where there is one sample."""
    return values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


def spread(values: Tensor, digits: int = 2) -> str:
    """Mean ± standard deviation over the samples."""
    return f"{float(values.mean()):.{digits}f} ± {float(deviation(values)):.{digits}f}"


def sequential_evaluations(trajectory: Any) -> int:
    """Network evaluations a sample of a loop that completes each state on its own by all remaining steps."""
    steps = len(trajectory.sigmas) - 1
    return int(steps + sum(steps - s for s in trajectory.states))


def key_figures(trajectory: Any) -> list[tuple[str, str]]:
    """The few numbers to read first: (what, how much)."""
    stats, batch = trajectory.stats, len(trajectory.prompt_index)
    seconds = sum(stats.seconds.values())
    return [
        ("samples", f"{batch:,}"),
        ("network calls", f"{stats.calls:,}"),
        ("evaluations a sample", f"{stats.evaluations / batch:g}"),
        ("images scored", f"{stats.decodes:,}"),
        ("seconds", f"{seconds:.1f}"),
        ("samples a second", f"{batch / seconds:.1f}"),
    ]


def cost_table(trajectory: Any) -> Table:
    """Seconds by stage and their share."""
    stats, batch = trajectory.stats, len(trajectory.prompt_index)
    total = sum(stats.seconds.values())
    shares = [v / total for v in stats.seconds.values()]
    rows = [
        (k, f"{v:.2f}", f"{100 * share:.1f} %") for (k, v), share in zip(stats.seconds.items(), shares, strict=True)
    ]
    naive = sequential_evaluations(trajectory)
    note = (
        f"{stats.evaluations:,} row evaluations ({stats.evaluations / batch:g} a sample) in {stats.calls} network calls. "
        f"A plain loop that completes each state by itself, by all remaining steps, takes {naive} evaluations a sample in "
        f"{naive} calls."
    )
    return Table(
        "Where the time went", ("stage", "seconds", "share"), [*rows, ("all", f"{total:.2f}", "")], note, shares, True
    )


def reward_table(trajectory: Any) -> Table:
    """By state: reward of its completion, and gain and log-probability of the transition that led to it."""
    rewards, gains = rewards_of(trajectory)
    log_probs = {step: trajectory.log_probs[:, k].float().cpu() for k, step in enumerate(trajectory.steps)}
    rows = []
    for s, state in enumerate(trajectory.states):
        sigma = float(trajectory.sigmas[state])
        gain = spread(gains[:, s - 1]) if s else "–"
        score = spread(log_probs[state - 1], 3) if state - 1 in log_probs else "–"
        rows.append((str(state), f"{sigma:.3f}", spread(rewards[:, s]), gain, score))
    note = (
        "Mean ± standard deviation over all samples. Gain and log-probability (nats per element) are those of the step that "
        "leads to the state."
    )
    return Table("Reward by state", ("state", "sigma", "reward", "gain", "log-probability"), rows, note)


def prompt_table(trajectory: Any, prompts: Sequence[str]) -> Table:
    """By prompt: the final reward in its group, and the gain of all steps together."""
    rewards, _ = rewards_of(trajectory)
    index = trajectory.prompt_index.cpu()
    rows = []
    for p in index.unique().tolist():
        group = rewards[index == p]
        final = group[:, -1]
        low, high = (float(v) for v in torch.aminmax(final))
        rows.append(
            (prompts[p], str(len(group)), spread(final), f"{low:.2f} … {high:.2f}", spread(final - group[:, 0]))
        )
    head = ("prompt", "samples", "final reward", "lowest … highest", "final less first state")
    return Table("Reward by prompt", head, rows)


def print_tables(trajectory: Any, *, title: str, console: Any = None) -> None:
    """Key figures, cost by stage and reward by state on the terminal."""
    from rich import box
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table as RichTable

    console = console or Console()
    console.print(f"\n[bold]{title}[/bold]")
    console.print(Columns([f"[bold]{value}[/bold] {name}" for name, value in key_figures(trajectory)], padding=(0, 4)))
    for table in (cost_table(trajectory), reward_table(trajectory)):
        rich = RichTable(box=box.SIMPLE_HEAD, title=table.title, title_justify="left", title_style="bold")
        for column, head in enumerate(table.head):
            rich.add_column(head, justify="left" if column == 0 else "right")
        for number, row in enumerate(table.rows):
            last = table.total and number == len(table.rows) - 1
            rich.add_row(
                *row, style="bold" if last else None, end_section=table.total and number == len(table.rows) - 2
            )
        console.print(rich, highlight=False)
        console.print(table.note, style="dim", highlight=False)
