"""Peak memory of one method on one case, each in a fresh process."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import find_case
from benchmarks.methods import METHODS, OURS

MIB = 2**20
# What torch says when it gets no memory.
OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
# The first batch meets every one-time cost, the others what the first leaves behind; more of them add data, not peaks.
MAX_BATCHES = 3
# From 16 batches on mas_fast may join small ones.
MAX_BATCHES_OF_OURS = 32
# By default glibc keeps freed blocks of up to 32 MiB, depending on their order: resident memory then moves by tens of
# MiB between equal runs, and what making the model left behind hides the pass. With a fixed threshold they go back.
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}


class OutOfMemoryError(RuntimeError):
    """A process needed more memory than it may have."""


def peak_mib(
    case: str,
    method: str,
    num_batches: int,
    dtype: str,
    num_threads: int,
    options: dict[str, int],
    runs: int | None = None,
    limit_gib: float | None = None,
) -> float:
    """Measure the peak of a method over what stood in memory once model and data were made, in MiB.

    Args:
        case: Name of the workload.
        method: Name of the method.
        num_batches: Batches of the pass.
        dtype: Name of the model's dtype.
        num_threads: Threads that torch uses.
        options: Keyword arguments of the method.
        runs: Processes, whose median is returned; by default three, and one for a peer, which no bar hangs on.
        limit_gib: What a process may take beyond model and data.

    Raises:
        OutOfMemoryError: It takes more.
        RuntimeError: The process fails.
    """
    num_batches = min(num_batches, MAX_BATCHES_OF_OURS if method == OURS else MAX_BATCHES)
    command = [sys.executable, "-m", "benchmarks.memory", case, method, str(num_batches), dtype]
    command += [str(num_threads), json.dumps(options), *([] if limit_gib is None else [str(limit_gib)])]
    peaks = []
    for _ in range(runs or (3 if METHODS[method].is_ours else 1)):
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **RETURN_FREED_BLOCKS, **METHODS[method].environment},
            text=True,
            capture_output=True,
        )
        if limit_gib is not None and OUT_OF_MEMORY in done.stderr:
            raise OutOfMemoryError(out_of_memory(limit_gib))
        if done.returncode != 0:
            raise RuntimeError(f"peak memory of {method} on {case} could not be measured:\n{done.stderr}")
        peaks.append(float(done.stdout.splitlines()[-1]))
    return statistics.median(peaks)


def limit_memory(gib: float) -> None:
    """Let this process take `gib` more than it has; where the system does not count that, nothing is limited."""
    try:
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_DATA, (held + int(gib * 2**30), resource.RLIM_INFINITY))


def out_of_memory(limit_gib: float) -> str:
    """Return what a row says of a method that needs more."""
    return f"out of memory: more than {limit_gib:g} GiB"


def start_of_peak() -> int:
    """Forget the peak so far where the system can, and return the bytes that are resident now.

    Linux counts a process's peak from its parent's (`ru_maxrss` outlives exec), and making model and data leaves a peak
    of its own; a measurement that starts from either hides the pass beneath it.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """Return the most bytes that have been resident at once."""
    try:
        return _status_bytes("VmHWM")
    except OSError:
        # Kibibytes on Linux and the BSDs, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status must have {field}, got none")


def main() -> None:
    """Run one pass in this process and print its peak in MiB."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("case")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("num_batches", type=int)
    parser.add_argument("dtype")
    parser.add_argument("num_threads", type=int)
    parser.add_argument("options", type=json.loads)
    parser.add_argument("limit_gib", type=float, nargs="?")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.num_threads)
    method = METHODS[arguments.method]
    workload = find_case(arguments.case).build(arguments.num_batches, getattr(torch, arguments.dtype))
    workload = method.timed_workload(workload)
    # Library code is resident from its first use on: a cost of the process, not of the pass.
    method.run(workload.head(2), **arguments.options)
    if arguments.limit_gib is not None:
        limit_memory(arguments.limit_gib)
    start = start_of_peak()
    omega = method.run(workload, **arguments.options)
    peak = peak_bytes()
    del omega
    print((peak - start) / MIB)


if __name__ == "__main__":
    main()
