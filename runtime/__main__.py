"""`python -m runtime`: the same as the command `runtime`."""

import sys

from runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
