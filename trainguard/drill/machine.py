r"""What a measurement ran on, and how much memory it took."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torchvision

import trainguard.versions

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def versions() -> dict[str, str]:
    r"""Versions of trainguard, Python and the packages that figures depend on; the commit, in a git checkout."""
    packages = {"torchvision": torchvision.__version__, "timm": timm.__version__}
    ours = commit()
    return trainguard.versions.versions() | packages | ({"commit": ours} if ours else {})


def commit() -> str:
    r"""The checkout's commit, with a + where files differ from it; empty outside a checkout."""
    folder = Path(trainguard.__file__).parent

    def git(*command: str) -> str:
        return subprocess.run(("git", "-C", str(folder), *command), capture_output=True, text=True, check=True).stdout

    try:
        if not git("ls-files", "__init__.py").strip():  # installed inside another project's checkout
            return ""
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    r"""Processor, cores, threads, memory and accelerator."""
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    r"""Start a new measurement of peak memory, where the system can (Linux; CUDA)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _CLEAR.write_text("5")  # proc(5): resets the high-water mark of the resident set
    except OSError:
        pass  # elsewhere the mark is that of the whole process


def peak_memory(device: torch.device | str = "cpu") -> int:
    r"""Largest memory since the last reset in MiB: of the accelerator if there is one, else of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) >> 10
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak >> (20 if sys.platform == "darwin" else 10)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
