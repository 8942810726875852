"""Says as JSON what `import fastflow` gives in the environment that runs this."""

import hashlib
import json
import pkgutil
import sys
from pathlib import Path

import torch

before = set(sys.modules)
import fastflow as ff  # noqa: E402

loaded = {name.split(".")[0] for name in set(sys.modules) - before} | {
    name for name in set(sys.modules) - before if name.startswith("fastflow._")
}

import fastflow.kernels  # noqa: E402

from fastflow import backends  # noqa: E402

at = ff.FlowSDE(0.7).transitions(ff.sigma_schedule(4)).at(1)
sample, velocity = torch.linspace(-2, 2, 2 * 96).reshape(2, 96), torch.linspace(1, -1, 2 * 96).reshape(2, 96)
out = ff.step(sample, velocity, at, noise=ff.Noise([1, 2], step=1))

json.dump(
    {
        "folder": str(Path(ff.__file__).parent),
        "version": ff.__version__,
        "names": sorted(ff.__all__),
        "loaded": sorted(loaded),
        "kernels": sorted(module.name for module in pkgutil.iter_modules(fastflow.kernels.__path__)),
        "kernels_folder": str(Path(next(iter(fastflow.kernels.__path__)))),
        "cpu": backends.unavailable("cpu"),
        "step": hashlib.sha256(out.next_sample.numpy().tobytes()).hexdigest(),
    },
    sys.stdout,
)
