"""Throw-away environments that see the dependencies of this one, but not the fastflow that is installed here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.packaging.repository import ROOT, tracked

BUILT = (".so", ".o", ".pyc")
PROBE = Path(__file__).with_name("probe.py")
PIP = ("-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation")


def run(*command: str | Path, cwd: Path, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """The finished process, without the PYTHONPATH and pip variables of this one; a failure shows both streams."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("PIP_")}
    process = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert process.returncode == expect, f"{command} left with {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process


def copy_checkout(target: Path) -> Path:
    """What a clone of the working tree would hold: tracked files, nothing that was built."""
    for name in tracked(ROOT):
        if name.suffix not in BUILT and name.name != "_build.json":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@dataclass(frozen=True)
class Environment:
    """A virtual environment in a folder of its own, which is also where its programs run: no checkout in sight."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Environment:
        folder.mkdir(parents=True)
        run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
        packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
        # A folder that a .pth file names is searched, but the .pth files inside it (editable installs) are not read.
        outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
        return cls(folder)

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def install(self, *what: str | Path, **environment: str) -> str:
        """pip's output."""
        process = run(self.python, *PIP, "install", *OFFLINE, "--verbose", *what, cwd=self.folder, **environment)
        return process.stdout + process.stderr

    def fastflow(self, *arguments: str, expect: int = 0) -> str:
        """What the console script prints."""
        script = self.folder / "venv" / "bin" / "fastflow"
        process = run(script, *arguments, cwd=self.folder, expect=expect, COLUMNS="200")
        return process.stdout + process.stderr

    def probe(self, **environment: str) -> dict[str, Any]:
        """What `import fastflow` gives here: see probe.py."""
        script = shutil.copy(PROBE, self.folder / "probe.py")
        result: dict[str, Any] = json.loads(run(self.python, script, cwd=self.folder, **environment).stdout)
        return result
