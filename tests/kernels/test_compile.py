"""The kernels compile for NVIDIA GPUs, as the backend launches them, without contracted arithmetic. No GPU needed.

`triton.jit` is another thing under TRITON_INTERPRET=1, so these tests want a process without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastflow import _env
from fastflow.backends import triton as backend
from fastflow.backends import triton_losses
from fastflow.compile.variants import PolicyRows
from tests.triton.calls import StepCall, compared, copy, make_call
from tests.triton.test_matching import made as matching_call

pytest.importorskip("triton", reason="triton is not installed")
if _env.triton_interpret():
    pytest.skip("TRITON_INTERPRET is set: kernels are not compiled in this process", allow_module_level=True)

from fastflow.kernels import config, guidance, log_prob_backward, matching, policy, reduce, transition  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

BF16 = torch.bfloat16
N = 4096


class _Driver:
    """Stands in for the CUDA driver of a GPU of one architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels per device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _Compiled:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any, assembly: dict[str, str]) -> None:
        self.kernel, self.assembly = kernel, assembly

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            assert options["enable_fp_fusion"] is False
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.assembly[self.kernel.__name__] = compiled.asm["ptx"]

        return launch


@pytest.fixture(params=[80, 120], ids=lambda arch: f"sm_{arch}")
def assembly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """PTX of every kernel that the test has launched, by name."""
    made: dict[str, str] = {}
    for module in (guidance, log_prob_backward, matching, policy, reduce, transition):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _Compiled(getattr(module, name), made))
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", _Driver(request.param))
    return made


def check(assembly: dict[str, str], names: set[str]) -> None:
    assert set(assembly) == names
    for name, ptx in assembly.items():
        contracted = re.findall(r"\b(?:fma|mad)\.\w*\.?f32\S*", ptx)
        assert not contracted, f"{name}: {contracted[0]}"
        # before Triton 3.6, sqrt and div flush subnormal numbers; nothing else may
        inexact = re.findall(r"\b\w+\.\S*(?:approx|full)\S*|(?<!\S)(?!sqrt|div)\w+\.\S*ftz\S*", ptx)
        if name == "policy_kernel":  # float64 exp compares a word of its argument with its limits, subnormal or not
            inexact = [word for word in inexact if word != "abs.ftz.f32"]
        assert not inexact, f"{name}: {inexact[0]}"


def run(call: StepCall) -> None:
    backend.launch_step(copy(call, "cpu"), config.DEFAULT)


def run_backward(call: StepCall) -> None:
    shape = (call.batch, call.numel) if call.reduce == 2 else (call.batch,)
    uncond = None if call.uncond is None else torch.empty_like(call.velocity)
    grads = (torch.empty_like(call.velocity), uncond)
    backend.launch_backward(copy(call, "cpu"), torch.ones(shape), *grads, config.DEFAULT)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_step(assembly: dict[str, str], dtype: torch.dtype) -> None:
    run(make_call(numel=N, sample=dtype, velocity=dtype, kept=dtype))
    check(assembly, {"step_kernel", "finish_kernel"})
    assert "sqrt.rn." in assembly["step_kernel"]
    assert "div.rn." in assembly["finish_kernel"]
    assert "ld.global.v4" in assembly["step_kernel"], "loads are not vectorised"


def test_one_program_a_row(assembly: dict[str, str]) -> None:
    run(make_call(numel=112, masked=True))
    check(assembly, {"step_kernel"})
    assert "div.rn." in assembly["step_kernel"]


def test_one_element(assembly: dict[str, str]) -> None:
    run(make_call(numel=1))
    check(assembly, {"step_kernel"})


def test_explicit_noise_and_plain_guidance(assembly: dict[str, str]) -> None:
    run(make_call(numel=N, source="noise", guided=True, velocity=BF16, score_rounded=False, masked=True))
    check(assembly, {"step_kernel", "finish_kernel"})


@pytest.mark.parametrize("token", [(64, 64, 1), (1, 16, 256)], ids=["channels last", "channels first"])
def test_token_rescale(assembly: dict[str, str], token: tuple[int, int, int]) -> None:
    call = make_call(numel=N, source="given", guided=True, velocity=BF16, rescale="token", token=token)
    run(call)
    run_backward(call)
    check(assembly, {"token_factor_kernel", "step_kernel", "finish_kernel", "token_backward_kernel"})
    assert "sqrt.rn." in assembly["token_factor_kernel"] and "div.rn." in assembly["token_factor_kernel"]


def test_clamp(assembly: dict[str, str]) -> None:
    call = make_call(numel=N, source="given", guided=True, velocity=BF16, rescale="clamp", masked=True)
    run(call)
    run_backward(call)
    forward = {"sample_square_kernel", "sample_factor_kernel", "step_kernel", "finish_kernel"}
    check(assembly, forward | {"count_kernel", "dot_kernel", "pulls_kernel", "backward_kernel"})


def test_backward_per_element(assembly: dict[str, str]) -> None:
    run_backward(make_call(numel=N, source="given", guided=True, reduce=2))
    check(assembly, {"backward_kernel"})


@pytest.mark.parametrize("rescale", ["none", "token", "clamp"])
def test_a_reference_network_and_old_means(assembly: dict[str, str], rescale: str) -> None:
    form = {"token": (64, 64, 1)} if rescale == "token" else {}
    call = make_call(numel=N, source="given", guided=True, velocity=BF16, rescale=rescale, masked=True, **form)
    run(compared(call))
    run_backward(compared(call))
    own = {
        "none": {"backward_kernel"},
        "token": {"token_factor_kernel", "token_backward_kernel"},
        "clamp": {"sample_square_kernel", "sample_factor_kernel", "dot_kernel", "pulls_kernel", "backward_kernel"},
    }
    check(assembly, {"step_kernel", "finish_kernel", "count_kernel"} | own[rescale])
    assert "div.rn." in assembly["finish_kernel"]


@pytest.mark.parametrize("source", ["seeds", "given"])
@pytest.mark.parametrize("numel", [112, N])
def test_matching(assembly: dict[str, str], numel: int, source: str) -> None:
    call = matching_call(numel, source, velocity=BF16, masked=True)
    triton_losses.launch_matching(call, 0.7, torch.empty(6, 2), config.DEFAULT)
    triton_losses.launch_matching_backward(call, torch.ones(3, 2), torch.empty_like(call.velocity), config.DEFAULT)
    whole = {"matching_kernel", "count_kernel", "matching_backward_kernel"}
    check(assembly, whole if numel < N else whole | {"means_kernel"})
    assert "div.rn." in assembly["matching_backward_kernel"]
    assert numel < N or "ld.global.v4" in assembly["matching_kernel"], "loads are not vectorised"


def test_policy_rows(assembly: dict[str, str]) -> None:
    PolicyRows().launch(config.DEFAULT)
    check(assembly, {"policy_kernel"})
    ptx = assembly["policy_kernel"]
    assert len(re.findall(r"\b(?:div|mul|add)\.rn\.f64", ptx)) > 20, "not float64"
    free = re.findall(
        r"\b(?:div|mul|add|sub)\.(?!rn)\S*f64", ptx
    )  # only what is rounded explicitly is never contracted
    assert not free, free[0]
    assert "bar.sync" in ptx.split("ld.global.b64")[0].rpartition("st.global.b64")[2], (
        "no barrier before rows are added"
    )
