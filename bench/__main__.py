"""`python -m bench`."""

import sys

from bench import BEGAN
from bench.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], BEGAN))
