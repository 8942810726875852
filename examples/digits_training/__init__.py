"""The parts of `examples/train_digits.py`. Where packages that they need are missing, importing them ends with a command."""

import sys
from importlib.util import find_spec

# As they are imported, some of them late in a run, and as pip knows them.
NEEDED = {"diffusers": "diffusers", "matplotlib": "matplotlib", "peft": "peft", "sklearn": "scikit-learn"}

missing = [package for name, package in NEEDED.items() if find_spec(name) is None]
if missing:
    sys.exit(
        f"train_digits.py: wanted the packages {', '.join(NEEDED.values())}; not installed: {', '.join(missing)}; "
        'from a clone: pip install ".[demo,train]"'
    )
