"""Write README's numbers from the committed results: `python -m benchmarks.readme`; `--check` fails if they differ."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- numbers: .*? -->\n).*?(<!-- /numbers -->)", re.DOTALL)
TITLES = {
    "mlp": "MLP 784-400-400-10, N = 256",
    "conv_net": "conv net 3→64→64→128→128, 32×32, N = 32",
    "resnet20": "ResNet-20 with batch norm, N = 32",
    "transformer": "transformer d = 384, 4 layers, T = 64, N = 16",
    "tied_transformer": "the same with a tied head, V = 2000",
    "lstm": "LSTM 64→128→128, T = 64, N = 32",
}

STEP_TITLES = {"5 large": "5 tensors of 4.2 M entries", "700 small": "700 tensors of 6,144 entries"}

Row = dict[str, Any]


def times(value: float | None) -> str:
    """Return a ratio as a table cell."""
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def passes_table(rows: list[Row]) -> list[str]:
    """Return the table of whole passes: cost in units of one ordinary batched forward and backward."""
    by_key = {(row["case"], row["method"], row["num_batches"]): row for row in rows}
    many = max(row["num_batches"] for row in rows)
    lines = [
        f"| cost, in batched forward+backwards | pass over {many} batches | over 1 batch | loop | `vmap(grad)` "
        "| error | peak MiB, pass / backward + Ω |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, title in TITLES.items():
        ours = by_key[case, "mas_fast", many]
        cells = [
            f"**{times(ours['ratio_p50'])}**",
            times(by_key[case, "mas_fast", 1]["ratio_p50"]),
            times(by_key[case, "loop", many]["ratio_p50"]),
            times(by_key[case, "vmap", many]["ratio_p50"]),
            f"{ours['error']:.0e}",
            f"{ours['peak_mib']:.0f} / {ours['peak_bar_mib']:.0f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def steps_table(rows: list[Row]) -> list[str]:
    """Return the table of the training step: the penalty in copies of its bytes, AdamW in steps without a penalty."""
    by_key = {(row["case"], row["method"]): row for row in rows}
    lines = [
        "| the training step | penalty, in copies of its bytes | usual autograd form | `torch._foreach` "
        "| AdamW with the penalty, in torch's fused steps without | with 8-bit Ω and bf16 θ* |",
        "|---|---|---|---|---|---|",
    ]
    for case, title in STEP_TITLES.items():
        ours = by_key[case, "penalty: mas_fast"]
        slower = [
            times(by_key[case, f"penalty: {name}"]["time_ms_p50"] / ours["time_ms_p50"]) + "× as long"
            for name in ("autograd", "foreach")
        ]
        adamw = [
            times(by_key[case, f"AdamW: {name}"]["ratio_p50"]) for name in ("mas_fast", "mas_fast, 8-bit Ω, bf16 θ*")
        ]
        cells = [f"**{times(ours['ratio_p50'])}**", *slower, f"**{adamw[0]}**", f"**{adamw[1]}**"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def state_line(rows: list[Row]) -> str:
    """Return what a small state costs."""
    errors = [row["error"] for row in rows if "error" in row and row["method"].startswith("8")]
    demo = {row["method"]: row for row in rows if row["case"] == "demo"}
    shown = ", ".join(
        f"{100 * row['accuracy']['mean']:.1f} ± {100 * row['accuracy']['standard_error']:.1f} % with {name}"
        for name, row in demo.items()
    )
    return (
        f"Ω in 8 bits is off by at most {100 * max(errors):.2f} % (relative L2, three networks); "
        f"accuracy of the demo: {shown}."
    )


# Experiment -> which of its tables, and what the README calls it.
EXPERIMENTS = {
    "pairs": ("mean over all", "two tasks of digits, four pairings"),
    "sequence": ("8 tasks in a row", "eight tasks of digits in a row"),
    "facts": ("halves by left digit", "facts as vectors, two tasks"),
    "fact_sequence": ("four disjoint tasks", "facts as vectors, four tasks"),
}


def experiments_table(results: dict[str, Row]) -> list[str]:
    """Return average accuracy and forgetting after the last task, by method and experiment."""
    tables = {
        name: next(own for own in results[name]["tables"] if own["title"] == title)
        for name, (title, _) in EXPERIMENTS.items()
    }
    cells: dict[str, dict[str, str]] = {}
    for name, table in tables.items():
        for row in table["rows"]:
            accuracy, forgetting = row["cells"][:2]
            lost = "" if forgetting is None else f" ({forgetting['mean']:.1f})"
            own = f"{accuracy['mean']:.1f} ± {accuracy['standard_error']:.1f}{lost}"
            cells.setdefault(row["name"], {})[name] = own
    titles = " | ".join(title for _, title in EXPERIMENTS.values())
    lines = [f"| average accuracy (forgetting) at the end, % | {titles} |", "|---" * (len(EXPERIMENTS) + 1) + "|"]
    return lines + [f"| {m} | {' | '.join(own.get(name, '–') for name in EXPERIMENTS)} |" for m, own in cells.items()]


def verdicts_line(results: dict[str, Row]) -> str:
    """Return how many of the claims hold, and those that do not."""
    claims = [claim for result in results.values() for claim in result["claims"]]
    counts = {words: sum(own["verdict"] == verdict for own in claims) for verdict, words in VERDICTS.items()}
    against = [
        f"“{own['claim']}” ({result['title']})"
        for result in results.values()
        for own in result["claims"]
        if own["verdict"] == "does not hold"
    ]
    listed = ", ".join(f"{count} {words}" for words, count in counts.items())
    return f"Of {len(claims)} claims tested: {listed}." + (f" Against: {'; '.join(against)}." if against else "")


VERDICTS = {"holds": "hold", "ties": "tie", "cannot be told": "cannot be told", "does not hold": "do not hold"}


def numbers(rows: list[Row], steps: list[Row], state: list[Row], demo: Row, experiments: dict[str, Row]) -> str:
    """Return the text between README's markers."""
    row = next(row for row in rows if row["method"] == "mas_fast")
    machine, versions = row["machine"], row["versions"]
    kernels = ", ".join(sorted(set(row["implementations"].values())))
    lines = [
        *passes_table(rows),
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {row['dtype']}, {kernels}, torch {versions['torch']}, "
        f"{row['date'][:10]}; medians of interleaved rounds, "
        "[all rows](benchmarks/results), [what they mean](benchmarks/README.md). Error: the largest of any parameter "
        "against the float64 loop. One batch alone bears what is paid once, above all the proof of the layout.",
        "",
        *steps_table(steps),
        "",
        state_line(state),
        "",
        f"The demo: {demo['conclusion']}",
        "",
        *experiments_table(experiments),
        "",
        f"{len(experiments['pairs']['seeds'])} seeds, mean ± standard error; strengths chosen on validation images. "
        f"{verdicts_line(experiments)} [All results](benchmarks/results/continual), [their page]"
        "(benchmarks/figures/continual/report.html), [what was run](benchmarks/README.md).",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write README.md, or with --check say whether it is as it would be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    passes, steps, state = (
        json.loads(path.read_text()) for kind in ("passes", "steps", "state") for path in RESULTS.glob(f"{kind}-*.json")
    )
    demo = json.loads((RESULTS / "demo.json").read_text())
    experiments = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "continual").glob("*.json"))}
    readme = ROOT / "README.md"
    text = readme.read_text()
    block = numbers(passes, steps, state, demo, experiments)
    written, count = BLOCK.subn(lambda found: found[1] + block + found[2], text)
    if count != 1:
        print("README.md must have one block of numbers between its markers", file=sys.stderr)
        return 1
    if check:
        print("README.md is as written" if written == text else "README.md differs: run python -m benchmarks.readme")
        return int(written != text)
    readme.write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
