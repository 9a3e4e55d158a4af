"""What a run ran on: the versions and the hardware, and which of them decide the last bits of a result."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accord

__all__ = ["environment", "environment_changes", "peak_memory_mb", "resident_peak_mb"]

# Reductions are split by thread and vectorised by CPU capability, and every version may sum in another order.
DECIDES_BITS = (
    "accord", "torch", "transformers", "peft", "tokenizers", "numpy", "cpu", "cpu_capability", "threads", "device",
    "gpus",
)  # fmt: skip


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions and hardware as a flat JSON object; `threads` is what torch uses now, `device` where models are."""
    import torch

    return {
        "accord": accord.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between two environments that can change the last bits of a result, as "name: old -> new". What an
    older version did not record, nobody knows."""
    return [
        f"{name}: {before[name]} -> {now.get(name)}"
        for name in DECIDES_BITS
        if name in before and before[name] != now.get(name)
    ]


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in 10^6 bytes: of the GPU that held most, once it uses one, else of
    the machine."""
    import torch

    if torch.cuda.is_initialized():
        return max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())) / 1e6
    return resident_peak_mb()


def resident_peak_mb() -> float:
    """The most of the machine's memory that this process has held so far, in 10^6 bytes."""
    status = Path("/proc/self/status")
    # Not getrusage where it can be helped: Linux hands the peak of the program that started this one on to it.
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found is not None:
        return int(found[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
