"""`bench instructions`: what the step issues for each element, read from machine code, for any architecture, without a GPU.

A step that draws its noise issues more instructions than a GPU has slots for while it copies as many bytes, so that this number
bounds its share of the copy's bandwidth.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fastflow.kernels import config
from rich.console import Console

from fastflow import doctor
from fastflow.backends import cuda
from fastflow.compile import nvcc_aot, resources, targets, triton_aot
from fastflow.compile.errors import CompileError
from fastflow.compile.sass import Accesses, Code
from fastflow.compile.variants import Variant

from . import gpu_step
from .gpu_step import BF16, FORMS, Form
from .machine import machine
from .report import plain_table

COLUMNS = ("arch", "triton", "git sha", "date", "backend", "case", "instructions an element", "bytes an element")
SOURCES = {"counter": "seeds", "given": "noise", "replay": "given"}
QUADS, ELEMENTS = 2, 8  # of a thread in a tile: csrc/cuda/block.h
_NAMES = {torch.float32: 0, torch.bfloat16: 1}  # dtypes as csrc numbers them


@dataclass(frozen=True)
class Count:
    backend: str
    form: Form
    instructions: float  # an element, on the shortest way that the call can take


def count(arch: str, backends: Sequence[str], forms: Sequence[Form] = FORMS, device: str = "") -> list[Count]:
    """Of each backend ("triton", "cuda") and form. device: the GPU's name, for its launch configuration.

    Raises ValueError for an unknown architecture, CompileError where tools or the CUDA module are missing.
    """
    target = targets.find(arch)
    found: list[Count] = []
    with tempfile.TemporaryDirectory() as work:
        if "triton" in backends:
            found += _triton(target, forms, Path(work), config.for_device(device))
        if "cuda" in backends:
            found += _cuda(target, forms, Path(work))
    return found


def _triton(target: targets.Target, forms: Sequence[Form], work: Path, chosen: config.Config) -> list[Count]:
    """Outputs are compiled in, so the only way through a kernel is the call's, with the fold of its tile."""
    calls = {form: Variant(form.sample, BF16, SOURCES[form.noise], form.outputs, guided=True) for form in forms}
    labels = {call.label: form for form, call in calls.items()}
    entries = triton_aot.build([target], work, calls=list(calls.values()))
    found = []
    for entry in entries:
        if entry["kernel"] != "step_kernel" or entry["block"] != chosen.block or entry["warps"] != chosen.num_warps:
            continue
        binary = work / "triton" / f"sm_{target.number}" / entry["folder"] / "step_kernel.cubin"
        (text,) = resources.disassembled(binary).values()
        fewest = Code.read(text).fewest()
        if fewest is not None:
            found.append(Count("triton", labels[entry["variant"]], fewest * 32 * entry["warps"] / entry["block"]))
    return found


def _cuda(target: targets.Target, forms: Sequence[Form], work: Path) -> list[Count]:
    """Of one round of the loop over a block's tiles; what comes before and after it is shared by up to four of them."""
    path = cuda.module_path()
    if path is None:
        raise CompileError(
            "the CUDA module is not compiled: `FASTFLOW_CUDA=1 python setup.py build_ext --inplace`, or leave it out with "
            "`--backend triton`"
        )
    held = dict(nvcc_aot.binaries(path, work))
    if target.name not in held:
        raise CompileError(f"{path.name} holds code for {', '.join(held)}, and none for {target.name}")
    code = resources.disassembled(held[target.name])
    named = zip(nvcc_aot.names(list(code)), code.values(), strict=True)
    kernels = {variant: text for (kernel, variant), text in named if kernel == "Step"}
    missing = {step_of(form) for form in forms} - set(kernels)
    if missing:
        raise CompileError(
            f"{path.name} names no kernel Step<{missing.pop()}>; c++filt (binutils) is wanted to read the names"
        )
    return [Count("cuda", form, of_step(kernels[step_of(form)], form)) for form in forms]


def step_of(form: Form) -> str:
    """The template arguments of the kernel that serves a form: dtypes of sample and velocity, drawn, guided."""
    return f"{_NAMES[form.sample]}, {_NAMES[BF16]}, {str(form.noise == 'counter').lower()}, true"


def of_step(text: str, form: Form) -> float:
    """Instructions an element of the loop in csrc/cuda/step.h. Raises CompileError where no way has the form's accesses."""
    code = Code.read(text)
    loop = code.longest_loop()
    fewest = code.fewest(accesses(form), loop) if loop is not None else None
    if fewest is None:
        raise CompileError(f"no way through the kernel reads and writes what {form.name!r} does")
    return fewest / ELEMENTS


def accesses(form: Form) -> Accesses:
    """What a thread reads and writes for two quads of a tile, each at once, its sums of squares, and its mark."""
    made = {"STS.128": int("log_prob" in form.outputs), "STS.8": int("flags" in form.outputs)}
    for name, spec in gpu_step.specs(form, (1, ELEMENTS)).items():
        if name not in ("log_prob", "flags"):  # written by row, when the loop is over
            access = f"{'STG' if name in form.outputs else 'LDG'}.{32 * spec.dtype.itemsize}"
            made[access] = made.get(access, 0) + QUADS
    return made


def run(console: Console, arguments: argparse.Namespace) -> None:
    """`bench instructions`."""
    names = (arguments.backend or "triton,cuda").split(",")
    unknown = [name for name in names if name not in ("triton", "cuda")]
    if unknown:
        raise ValueError(f"backend: wanted triton, cuda or both, by comma, got {', '.join(map(repr, unknown))}")
    found = count(arguments.arch, names)
    made = plain_table(f"instructions an element, {arguments.arch}")
    titles = {"cuda": "cuda, its loop", "triton": "triton, whole"}
    for title in ("case", *(titles[name] for name in names), "bytes"):
        made.add_column(title, justify="left" if title == "case" else "right")
    for form in FORMS:
        own = {each.backend: f"{each.instructions:.1f}" for each in found if each.form == form}
        made.add_row(form.name, *(own.get(name, "") for name in names), f"{_bytes(form):.0f}")
    console.print(made)
    if arguments.results is not None:
        path = arguments.results / f"instructions-{arguments.arch.replace('_', '-')}.csv"
        _write(found, arguments.arch, path)
        console.print(f"[dim]written to {path}[/dim]", highlight=False)


def _bytes(form: Form) -> float:
    return gpu_step.traffic(form, (1, 1 << 20)) / (1 << 20)


def _write(found: Sequence[Count], arch: str, path: Path) -> None:
    here = machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for each in found:
            about = (arch, doctor.version("triton") or "", here.git_sha, here.date)
            numbers = (f"{each.instructions:.1f}", f"{_bytes(each.form):.0f}")
            writer.writerow((*about, each.backend, each.form.name, *numbers))
