"""What a small state costs in accuracy: `python -m benchmarks.small_state --out DIR`.

The relative L2 error of Ω in 8 bits and in bfloat16, on importances of real runs: the demo's network, trained on
handwritten digits, and the conv net and the transformer of cases.py. Then the demo's sequence of tasks with each state.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.provenance import describe_run
from benchmarks.run import Row, results_path, write_rows
from mas_fast import estimate_importance
from mas_fast.demo.data import Task, load_tasks
from mas_fast.demo.metrics import average_accuracy, forgetting, mean_and_error
from mas_fast.demo.settings import Settings
from mas_fast.demo.train import run_mas, single_thread
from mas_fast.kernels.steps import decode_omega, encode_omega

ERROR_BAR = 0.005

STATES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"omega_dtype": torch.bfloat16, "anchor_dtype": torch.bfloat16},
    "8-bit Ω, bfloat16 θ*": {"omega_dtype": torch.uint8, "anchor_dtype": torch.bfloat16},
}

CODECS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda omega: omega.bfloat16().float(),
    "8-bit Ω, bfloat16 θ*": lambda omega: decode_omega(*encode_omega(omega)).view(omega.shape),
}


def error_of(omegas: Mapping[str, Tensor], codec: Callable[[Tensor], Tensor]) -> float:
    """Return ‖decoded − Ω‖ / ‖Ω‖ over all parameters."""
    lost = math.fsum(float((codec(omega) - omega).double().square().sum()) for omega in omegas.values())
    return math.sqrt(lost / math.fsum(float(omega.double().square().sum()) for omega in omegas.values()))


def error_rows(importances: Mapping[str, Mapping[str, Tensor]]) -> list[Row]:
    """Return a row of error for each importance and codec."""
    return [
        {
            "case": f"Ω of {name}",
            "method": codec,
            "error": error_of(omegas, CODECS[codec]),
            "worst_parameter": max(error_of({"": o}, CODECS[codec]) for o in omegas.values() if bool(o.any())),
            "error_bar": ERROR_BAR,
        }
        for name, omegas in importances.items()
        for codec in CODECS
    ]


def demo_rows(tasks: list[Task], seeds: int) -> tuple[list[Row], Mapping[str, Tensor]]:
    """Run the demo's sequence with each state; also return Ω of the first seed in float32."""
    rows, omegas = [], {}
    for name, state in STATES.items():
        runs = [run_mas(tasks, Settings(), seed, lambda done: None, **state) for seed in range(seeds)]
        if name == "float32":
            omegas = runs[0].omega
        rows.append(
            {
                "case": "demo",
                "method": name,
                "seeds": seeds,
                "accuracy": mean_and_error([average_accuracy(run.accuracy) for run in runs]),
                "forgetting": mean_and_error([forgetting(run.accuracy) for run in runs]),
            }
        )
    return rows, omegas


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print; return 1 if an error is above its bar."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_state", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args(argv)
    with single_thread():
        rows, omegas = demo_rows(load_tasks(), arguments.seeds)
    importances: dict[str, Mapping[str, Tensor]] = {"the demo's network": omegas}
    for case in ("conv_net", "transformer"):
        workload = CASES[case].build(2)
        importances[case] = estimate_importance(workload.model, workload.batches, objective=workload.objective)
    rows += error_rows(importances)
    run = describe_run(torch.get_num_threads())
    shared = {"device": "cpu", "dtype": "float32", "num_batches": 1}
    write_rows(results_path(arguments.out, run, "state"), [{**row, **shared, **run} for row in rows])
    for row in rows:
        if "error" in row:
            print(f"{row['case']:24} {row['method']:22} error {row['error']:.4f}, worst {row['worst_parameter']:.4f}")
        else:
            shown = (
                f"{key} {100 * row[key]['mean']:.2f} ± {100 * row[key]['standard_error']:.2f} %"
                for key in ("accuracy", "forgetting")
            )
            print(f"{row['case']:24} {row['method']:22} {', '.join(shown)}")
    return int(any(row["method"].startswith("8") and row.get("error", 0) > ERROR_BAR for row in rows))


if __name__ == "__main__":
    sys.exit(main())
