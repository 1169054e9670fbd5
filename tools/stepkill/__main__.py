"""python -m tools.stepkill, or python tools/stepkill: see cli.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    from tools.stepkill.cli import main

    sys.exit(main())
