"""The Triton source is Triton alone: nothing of one vendor's, nothing that searches at run time, no variant by value."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fastflow import _env, kernels

FILES = sorted(Path(kernels.__path__[0]).glob("*.py"))
FOREIGN = {"inline_asm_elementwise", "libdevice", "extra", "gluon", "experimental", "autotune", "heuristics"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_of_one_vendor_and_no_search(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
    assert not names & FOREIGN
    assert not names & {"cuda", "nvidia", "hip", "amd"}


@pytest.mark.skipif(_env.triton_interpret(), reason="TRITON_INTERPRET is set: there are no kernels to look at")
def test_no_kernel_has_variants_by_value() -> None:
    pytest.importorskip("triton", reason="needs triton")
    from fastflow.kernels import guidance, log_prob_backward, matching, policy, reduce, transition

    found = 0
    for module in (guidance, log_prob_backward, matching, policy, reduce, transition):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                found += 1
                special = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
                assert not special, f"{name} has variants by the value of {', '.join(special)}"
    assert found == 14
