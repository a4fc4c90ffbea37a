"""Measure all that the README's performance section says: `python -m benchmarks --out DIR [--small]`.

Whole passes against what else there is, how cost grows, and the training step. `--small` leaves out what takes long:
minutes on two cores, in fewer rounds and without peaks of memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import compare, growth, run, steps

# Case -> rounds: of short passes more, for their cost differs more from one to the next.
SMALL_CASES = {"mlp": 9, "conv_net": 5, "transformer": 3, "lstm": 9}
# Without Opacus, BackPACK and the authors' procedure: where one of them is the fastest peer, one of these is within
# 5 % of it.
SMALL_METHODS = ("mas_fast", "loop", "vmap")
SMALL_CURVES = {"mlp-N": (16, 1024), "language_model-T": (512,)}
SMALL_GROWTH_METHODS = ("mas_fast",)
# What compiles for more than a minute.
NOT_SMALL_STEP = "foreach, compiled"


def measure(out: Path, small: bool) -> int:
    """Run all benchmarks; return 1 if a row of mas_fast is wrong."""
    common = ["--out", str(out)]
    if not small:
        return max(run.main(common), growth.main(common), steps.main([*common, "--rounds", "25"]))
    failed = 0
    for case, rounds in SMALL_CASES.items():
        options = ["--cases", case, "--methods", *SMALL_METHODS, "--batches", "0", "--rounds", str(rounds)]
        failed |= run.main([*common, *options, "--no-memory"])
    for curve, values in SMALL_CURVES.items():
        points = [str(value) for value in values]
        options = ["--curves", curve, "--values", *points, "--methods", *SMALL_GROWTH_METHODS, "--rounds", "5"]
        failed |= growth.main([*common, *options])
    names = {name for methods in steps.OPERATIONS.values() for name in methods} - {NOT_SMALL_STEP}
    return failed | steps.main([*common, "--methods", *sorted(names), "--rounds", "9"])


def main(argv: list[str] | None = None) -> int:
    """Measure, and compare where asked to.

    Return 1 if a row of mas_fast is wrong, or its ratio grew on the same machine.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results files")
    parser.add_argument("--small", action="store_true", help="in minutes")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="results to print the ratios beside")
    arguments = parser.parse_args(argv)
    if arguments.compare is not None:
        try:
            compare.read_folder(arguments.compare)
        except ValueError as error:
            parser.error(str(error))
    start = time.monotonic()
    failed = measure(arguments.out, arguments.small)
    print(f"\nmeasured in {(time.monotonic() - start) / 60:.1f} minutes")
    if arguments.compare is not None:
        print(f"\nratios in {arguments.compare} → now")
        failed |= compare.main([str(arguments.compare), str(arguments.out)])
    return failed


if __name__ == "__main__":
    sys.exit(main())
