"""`python -m trainguard` does what the `trainguard` command does."""

import sys

from trainguard.cli import main

if __name__ == "__main__":
    sys.exit(main())
