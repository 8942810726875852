"""Launches without a GPU: Triton behind a stand-in for its driver, and a record of what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fastflow.kernels import config

from fastflow.backends import matching, policy_rows, reference, triton_losses
from fastflow.backends import triton as backend
from fastflow.backends.base import PolicyCall, StepCall
from fastflow.compile.triton_aot import StandIn


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[StandIn]:
    """Triton's active driver is the stand-in."""
    from triton.runtime import driver

    with monkeypatch.context() as patch:
        made = StandIn(number)
        patch.setattr(driver, "_active", made)
        yield made


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch, number: int = 90) -> Iterator[set[tuple[str, str]]]:
    """(kernel, specialization) of every launch inside, none of which is compiled."""
    from triton import knobs

    found: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **rest: Any) -> bool:
        found.add((fn.name.rpartition(".")[2], key))
        return True  # do not compile

    with stand_in(monkeypatch, number), monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "jit_cache_hook", note)
        yield found


class Both:
    """A backend that asks for Triton's launches and answers with the reference's numbers."""

    def refuse(self, call: StepCall) -> None:
        return None

    def step(self, call: StepCall) -> None:
        backend.launch_step(call, config.DEFAULT)
        reference.step(call)

    def log_prob_backward(self, call: StepCall, grad: torch.Tensor, *grads: torch.Tensor | None) -> None:
        backend.launch_backward(call, grad, *grads, config.DEFAULT)
        reference.log_prob_backward(call, grad, *grads)

    def policy_rows(self, call: PolicyCall) -> None:
        triton_losses.launch_policy(call, config.DEFAULT)
        policy_rows.policy_rows(call)

    def matching(self, call: StepCall, beta: float, means: torch.Tensor) -> None:
        triton_losses.launch_matching(call, beta, means, config.DEFAULT)
        matching.matching(call, beta, means)

    def matching_backward(self, call: StepCall, grad: torch.Tensor, grad_velocity: torch.Tensor) -> None:
        triton_losses.launch_matching_backward(call, grad, grad_velocity, config.DEFAULT)
        matching.matching_backward(call, grad, grad_velocity)
