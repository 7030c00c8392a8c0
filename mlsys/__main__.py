"""`python -m mlsys` is the same command as `mlsys`."""

import sys

from mlsys.cli import main

if __name__ == "__main__":
    sys.exit(main())
