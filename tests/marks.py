"""Marks that several modules bear."""

from __future__ import annotations

import pytest

# Children that fork() makes touch nothing of the other threads; Python 3.12 and later warn anyway.
FORKS_BESIDE_THREADS = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
