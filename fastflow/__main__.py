"""`python -m fastflow`: the `fastflow` command where no console script is installed, as in a bare checkout."""

from fastflow.cli import main

if __name__ == "__main__":
    main()
