"""What the demo writes: pictures, and a page that loads nothing."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import fastflow as ff
from fastflow.demo import tables
from fastflow.demo.report import write_report

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects elements and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(trajectory: Any, out: Path, digits: Any, **changes: Any) -> dict[str, Path]:
    arguments: dict[str, Any] = {
        "title": "A <title> & more",
        "prompts": ["three", "eight", "three"],
        "command": "fastflow rollout --model digits > log",
        "settings": {"steps": 4},
        "decode": digits.decode,
        "reward_name": digits.DigitReward.name,
    }
    return write_report(trajectory, out, **(arguments | changes))


def test_files(trajectory: ff.Trajectory, digits: Any, tmp_path: Path) -> None:
    paths = report(trajectory, tmp_path / "a" / "b", digits)
    assert sorted(paths) == ["clean", "final", "report", "rewards"]
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "clean.png", "final.png", "report.html", "rewards.png",
    ]  # fmt: skip
    for name in ("clean", "final", "rewards"):
        assert paths[name].read_bytes().startswith(PNG)


def test_page_is_complete_and_loads_nothing(trajectory: ff.Trajectory, digits: Any, tmp_path: Path) -> None:
    text = report(trajectory, tmp_path, digits)["report"].read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert not {"link", "script", "iframe", "object"} & set(tags)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 3 and all(str(i["src"]).startswith("data:image/png;base64,") and i["alt"] for i in images)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert "<title> & more" not in text and "A <title> & more" in page.text, "text is escaped"
    for wanted in (
        "fastflow rollout --model digits > log",
        trajectory.stats.schedule_hash,
        metadata.version("torch"),
        "eight",
    ):
        assert wanted in page.text


def test_a_long_command_is_folded(trajectory: ff.Trajectory, digits: Any, tmp_path: Path) -> None:
    command = "fastflow rollout --model digits" + " --seed 0" * 12
    page = Page(report(trajectory, tmp_path, digits, command=command)["report"].read_text(encoding="utf-8"))
    shown = page.text.split("The same again")[1].split("reward")[0]
    assert shown.count("\\\n") == 13 and shlex.split(shown.replace("\\\n", "")) == shlex.split(command)


def test_numbers_of_the_tables(trajectory: ff.Trajectory) -> None:
    rewards = trajectory.rewards
    table = tables.reward_table(trajectory)
    assert [row[0] for row in table.rows] == ["0", "1", "2", "3", "4"]
    assert table.rows[4][2] == f"{float(rewards[:, 4].mean()):.2f} ± {float(rewards[:, 4].std()):.2f}"
    assert table.rows[2][3] == tables.spread(rewards[:, 2] - rewards[:, 1])
    assert table.rows[2][4] == tables.spread(trajectory.log_probs[:, 1], 3)
    assert table.rows[0][3:] == ("–", "–")
    cost = tables.cost_table(trajectory)
    assert sum(cost.bars) == pytest.approx(1.0)
    assert re.search(r"90 row evaluations \(10 a sample\) in 7 network calls.* takes 14 evaluations", cost.note)
    assert dict(tables.key_figures(trajectory))["images scored"] == "45"
    prompts = tables.prompt_table(trajectory, ["a", "b", "c"])
    assert [row[:2] for row in prompts.rows] == [("a", "3"), ("b", "3"), ("c", "3")]


def test_final_samples_alone(trajectory: ff.Trajectory, digits: Any, tmp_path: Path) -> None:
    last = replace(
        trajectory,
        clean=trajectory.clean[:, -1:],
        states=(4,),
        rewards=trajectory.rewards[:, -1:],
        gains=trajectory.gains[:, :0],
    )
    assert sorted(report(last, tmp_path, digits)) == ["final", "report"]


def test_one_sample(trajectory: ff.Trajectory, digits: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert report(trajectory[4], tmp_path, digits)
    assert tables.reward_table(trajectory[4]).rows[1][2].endswith(" ± 0.00")
    assert [str(w.message) for w in recwarn] == []


def test_one_named_reward_is_reported_and_two_are_not(trajectory: ff.Trajectory, digits: Any, tmp_path: Path) -> None:
    assert report(trajectory.set_rewards({"margin": trajectory.rewards}), tmp_path, digits)
    with pytest.raises(ValueError, match=r"wanted one reward to report, got \['a', 'b'\]"):
        report(trajectory.set_rewards({"a": trajectory.rewards, "b": trajectory.rewards}), tmp_path, digits)


def test_refuses_what_it_cannot_report(trajectory: ff.Trajectory, digits: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts: wanted 3 labels or more, got 2"):
        report(trajectory, tmp_path, digits, prompts=["a", "b"])
    with pytest.raises(ValueError, match=r"trajectory.rewards: wanted \[B, S\], got None"):
        report(replace(trajectory, rewards=None, gains=None), tmp_path, digits)
    with pytest.raises(ValueError, match=r"decode: wanted images \[15, 1 or 3, H, W\]"):
        report(trajectory, tmp_path, digits, decode=lambda clean, info: clean.flatten(1), prompts=["a", "b", "c"])


def test_decode_may_give_colour_and_floats(trajectory: ff.Trajectory, digits: Any, tmp_path: Path) -> None:
    def colour(clean: torch.Tensor, info: Any) -> torch.Tensor:
        assert len(info.prompt_index) == len(info.sample_index) == len(info.position) == len(clean)
        return ((clean + 1) / 2).expand(-1, 3, -1, -1)

    assert report(trajectory, tmp_path, digits, decode=colour)
