"""What the package needs of the operating system, looked at before anything compiled is loaded.

The floor is Linux 5.3, because of pidfds: pidfd_send_signal came with 5.1, pidfd_open and poll on a
pidfd with 5.3. All else is older: memfd_create and its seals (3.17), O_TMPFILE (3.11),
/proc/<pid>/task/<tid>/children (3.5), subreapers (3.4); for MADV_WIPEONFORK (4.14) there is another way.

A version says nothing about a sandbox, and a vendor may have brought a call to an older kernel. So
`runtime doctor` tries the calls, and ANY_KERNEL=1 in the environment lets an old version pass.
"""

from __future__ import annotations

import os
import sys
from typing import Final

__all__ = ["ANY_KERNEL", "FLOOR", "check", "problem", "version"]

FLOOR: Final = (5, 3)
ANY_KERNEL: Final = "RUNTIME_ANY_KERNEL"


def check() -> None:
    """Raises: ImportError, with what was found, what is needed and what to do. Takes microseconds."""
    found = problem()
    if found is not None:
        raise ImportError(found)


def problem() -> str | None:
    """Why this machine cannot run the package, in one sentence, as far as names and numbers tell."""
    system = sys.platform
    if system != "linux":
        return (
            f"runtime needs Linux {_dotted(FLOOR)} or later, and this is {system}: use it on a Linux machine,"
            " in a virtual machine or in a container."
        )
    release = os.uname().release
    found = version(release)
    if found is None or found >= FLOOR or os.environ.get(ANY_KERNEL) == "1":
        return None
    return (
        f"runtime needs Linux {_dotted(FLOOR)} or later, for pidfd_open, and this kernel is {release}: use a"
        " newer one; if this one has it all the same, from its vendor or in a sandbox, set"
        f" {ANY_KERNEL}=1 and let `runtime doctor` try."
    )


def version(release: str) -> tuple[int, int] | None:
    """The two numbers at the start of a kernel's release: (6, 1) of "6.1.0-rc1+". None: there are none."""
    numbers = []
    for part in f"{release}.0".split(".")[:2]:
        rest = part.lstrip("0123456789")
        if rest == part:
            break
        numbers.append(int(part[: len(part) - len(rest)]))
        if rest:  # "6-rc1.2": what follows is no second number
            break
    if not numbers:
        return None
    return numbers[0], numbers[1] if len(numbers) > 1 else 0


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
