"""Rules on the repository as a whole that no linter knows: file sizes, file lengths, paths of somebody's machine.

`python tests/packaging/repository.py` prints what breaks them and leaves with 1 if anything does.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 400
MOST_BYTES = 1_500_000
CODE = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
TEXT = CODE | {".md", ".toml", ".yaml", ".yml", ".json", ".csv", ".in", ".html", ".txt", ""}
# A place on one machine: a path from the root into a home, a temporary or a mounted folder.
MACHINE = re.compile(r"(?<![\w.~:/}\])-])/(?:home|root|tmp|Users|mnt|opt|work|data)/[\w.-]")


def tracked(root: Path) -> list[Path]:
    """The files under version control; without git, all but what is built or hidden."""
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        skipped = {"build", "dist", "out", "__pycache__"}
        found = [path for path in root.rglob("*") if path.is_file()]
        names = [path.relative_to(root) for path in found]
        return [name for name in names if not any(part in skipped or part.startswith(".") for part in name.parts[:-1])]
    return [Path(name) for name in listing.split("\0") if name and (root / name).is_file()]


def problems(root: Path, files: list[Path]) -> list[str]:
    """What breaks the rules, one line each. `files` are relative to `root`."""
    found = []
    for name in files:
        size = (root / name).stat().st_size
        if size > MOST_BYTES:
            found.append(f"{name}: {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.1f}")
            continue
        if name.suffix not in TEXT:
            continue
        lines = (root / name).read_text(encoding="utf-8", errors="replace").splitlines()
        if name.suffix in CODE and len(lines) > MOST_LINES:
            found.append(f"{name}: {len(lines)} lines, more than {MOST_LINES}; split it")
        for number, line in enumerate(lines, 1):
            place = MACHINE.search(line)
            if place:
                found.append(f"{name}:{number}: a path of one machine: {line[place.start() : place.start() + 40]}")
    if Path("kernels/__init__.py") in files:
        found.append("kernels/__init__.py: must not be there; CONTRIBUTING.md says why")
    return found


if __name__ == "__main__":
    report = problems(ROOT, tracked(ROOT))
    print("\n".join(report), end="\n" if report else "")
    sys.exit(bool(report))
