"""What a result must say about where it was measured."""

import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The commit measured, marked where the tree differed from it; without a checkout, what KVFERRY_COMMIT says."""
    if given := os.environ.get("KVFERRY_COMMIT"):
        return given
    try:
        head = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() or "unknown"


def describe() -> dict[str, str | int]:
    """Machine and versions, without names of hosts or paths."""
    facts: dict[str, str | int] = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.machine(),
    }
    if torch.cuda.is_available():
        from cuda.bindings import driver

        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or "",
            "driver_api": int(driver.cuDriverGetVersion()[1]),
        }
    return facts
