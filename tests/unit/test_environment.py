"""What a process says of the machine and of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

SAYS = "from accord.training.environment import resident_peak_mb; print(resident_peak_mb())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a child has no peak of its parent's")
def test_the_peak_is_the_processs_own_and_not_its_parents() -> None:
    """A parent that held 400 MB more than it needs hands that on as its child's `ru_maxrss`."""
    alone = float(subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True).stdout)
    fat = f"held = b'x' * 400_000_000; import subprocess, sys; subprocess.run([sys.executable, '-c', {SAYS!r}])"
    child = float(subprocess.run([sys.executable, "-c", fat], capture_output=True, text=True, check=True).stdout)
    assert 5 < alone < 300
    assert child == pytest.approx(alone, rel=0.2)
