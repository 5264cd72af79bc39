"""What a result must say about where it was measured."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import kvferry
from kvferry.device.driver import driver, is_cuda_memcpy_available

_CHECKOUT = Path(__file__).parents[3]
_SMI_FIELDS = {"driver": "driver_version", "pcie_generation": "pcie.link.gen.max", "pcie_width": "pcie.link.width.max"}


def commit() -> str:
    """The commit measured, marked where the tree differed from it; without a checkout what KVFERRY_COMMIT says, else
    the version that is installed."""
    if given := os.environ.get("KVFERRY_COMMIT"):
        return given
    head = ""
    if (_CHECKOUT / ".git").exists():
        head = _output(["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty"])
    return head or f"version {kvferry.__version__}"


def describe(device: int = 0) -> dict[str, str | int]:
    """Machine and versions, with the CUDA device of that index where there is one; no names of hosts or paths."""
    facts: dict[str, str | int] = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.machine(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or "",
        }
        if is_cuda_memcpy_available():
            facts["driver_api"] = int(driver().cuDriverGetVersion()[1])
        query = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(_SMI_FIELDS.values())}"]
        found = _output([*query, "--format=csv,noheader"]).split(", ")
        if len(found) == len(_SMI_FIELDS):
            facts |= dict(zip(_SMI_FIELDS, found, strict=True))
    return facts


def _output(command: list[str]) -> str:
    """What a command prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
