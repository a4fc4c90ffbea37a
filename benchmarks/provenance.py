"""Where a row comes from: machine, versions, commit and date."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mas_fast
from benchmarks import peers
from mas_fast.machine import cpuinfo


def describe_run(num_threads: int) -> dict[str, Any]:
    """Return the columns that every row of one run shares."""
    return {
        "implementations": describe_implementations("cpu"),
        "versions": {
            "mas_fast": mas_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **peers.versions(),
        },
        "machine": {
            "cpu": cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": num_threads,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe_implementations(device: str) -> dict[str, str]:
    """Return which implementation every op of mas_fast runs on `device`."""
    return {row.op: row.implementation for row in mas_fast.implementations() if row.device == device}


def cpu_model() -> str:
    """Return the processor's name as the system gives it.

    A virtual machine may hide which one of a line it is: then with the family and model that it reports, for an
    "AMD EPYC" with AVX-512 may run it at full width or at half of it.
    """
    name = cpuinfo("model name")
    if name is not None:
        family, model = cpuinfo("cpu family"), cpuinfo("model")
        hidden = family and model and not re.search(r"\d", name.partition("@")[0])
        return f"{name}, family {family} model {model}" if hidden else name
    if platform.system() == "Darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit that is measured, marked `-dirty` if the tree differs from it; None outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        # Result files change with every run and are not what is measured.
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
