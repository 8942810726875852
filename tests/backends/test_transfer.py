"""Copies to a device: none within a capture, and none that the host reads before it is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastflow.transfer import upload


@pytest.mark.parametrize(
    ("device", "capturing", "pinned", "expected"),
    [
        ("cuda:0", False, False, True),
        ("cuda:0", True, False, False),
        ("cuda:0", False, True, False),
        ("meta", False, False, False),
    ],
)
def test_what_may_go_on_meanwhile(
    monkeypatch: pytest.MonkeyPatch, device: str, capturing: bool, pinned: bool, expected: bool
) -> None:
    asked: list[Any] = []
    t = torch.arange(3)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: pinned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking=False: asked.append((device, non_blocking)))
    upload(t, torch.device(device))
    assert asked == [(torch.device(device), expected)]


def test_a_tensor_in_place_is_itself() -> None:
    t = torch.arange(3)
    assert upload(t, t.device) is t
