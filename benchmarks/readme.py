"""Write README's numbers from the committed results: `python -m benchmarks.readme`; `--check` fails if they differ."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import CURVES
from benchmarks.growth import FLAT_AXES, FLAT_FROM, MAY_GROW, growth_of, line_of, slope_of
from benchmarks.methods import OURS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MACHINE = "amd-epyc-avx512-2-threads"  # whose files README quotes
# Whose passes it quotes beside them.
OTHER_MACHINES = (
    "amd-epyc-family-25-model-17-avx512-2-threads",
    "intel-r-xeon-r-processor-avx512-2-threads",
    "amd-epyc-avx2-2-threads",
)
BLOCK = re.compile(r"(<!-- numbers: .*? -->\n).*?(<!-- /numbers -->)", re.DOTALL)
TITLES = {
    "mlp": "MLP 784-400-400-10, N = 256",
    "conv_net": "conv net 3→64→64→128→128, 32×32, N = 32",
    "resnet20": "ResNet-20 with batch norm, 32×32, N = 32",
    "resnet18_32": "ResNet-18, 32×32, N = 16",
    "resnet18_64": "ResNet-18, 64×64, N = 8",
    "vit": "ViT d = 192, 12 layers, T = 65, N = 16",
    "transformer": "GPT-2-shaped LM d = 384, 4 layers, T = 64, N = 16",
    "tied_transformer": "the same with a tied head, V = 2000",
    "lstm": "LSTM 64→128→128, T = 64, N = 32",
}
SHORT_TITLES = {case: re.split(",| d =| with| 3→| 784| 64→", title)[0] for case, title in TITLES.items()} | {
    "resnet18_32": "ResNet-18, 32×32",
    "resnet18_64": "ResNet-18, 64×64",
    "transformer": "GPT-2-shaped LM",
    "tied_transformer": "GPT-2-shaped LM, tied",
}

STEP_TITLES = {"5 large": "5 tensors of 4.2 M entries", "700 small": "700 tensors of 6,144 entries"}

Row = dict[str, Any]


def times(value: float | None) -> str:
    """Return a ratio as a table cell."""
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


# Exact methods beside mas_fast, and what a table calls them.
PEERS = {
    "loop": "loop",
    "authors": "authors' code, batch size 1",
    "vmap": "`vmap(grad)`",
    "opacus": "Opacus",
    "backpack": "BackPACK",
}


def read_results(folder: Path, kind: str) -> list[Row]:
    """Return the rows of a kind, of the machine that README quotes or the only one there is.

    Raises:
        ValueError: There is neither.
    """
    paths = list(folder.glob(f"{kind}-*.json"))
    quoted = folder / f"{kind}-{MACHINE}.json"
    if quoted not in paths and len(paths) != 1:
        raise ValueError(f"{folder} must hold one file {kind}-*.json, got {len(paths)}")
    return json.loads((quoted if quoted in paths else paths[0]).read_text())


def pass_rows(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """Return the rows of whole passes, by case and method."""
    return {(row["case"], row["method"]): row for row in rows if row["num_batches"] > 1}


def best_peer(passes: dict[tuple[str, str], Row], case: str) -> Row | None:
    """Return the fastest exact method on a case that is not ours."""
    known = [passes[case, method] for method in PEERS if (case, method) in passes]
    return min((row for row in known if row["ratio_p50"]), key=lambda row: row["ratio_p50"], default=None)


def times_as_fast(passes: dict[tuple[str, str], Row], case: str) -> float | None:
    """Return how many times as fast as the best peer mas_fast is; None where no peer runs."""
    peer = best_peer(passes, case)
    return None if peer is None else peer["ratio_p50"] / passes[case, OURS]["ratio_p50"]


def kernels_of(row: Row) -> str:
    """Return what ran, as "C++ (avx2)"."""
    return ", ".join(sorted(set(row["implementations"].values())))


def reason(failure: str) -> str:
    """Return in few words why a method has no time."""
    for sign, words in REASONS.items():
        if sign in failure:
            return words
    return failure


REASONS = {
    "ModuleNotFoundError": "not installed",
    "doesn't currently support": "refuses batch norm",
    "being modified inplace": "no in-place operations",
    "grad_batch": "leaves parameters out",
    "only num_layers = 1": "one layer only",
    "is above": "wrong",
    "out of memory": "out of memory",
}


def passes_table(rows: list[Row]) -> list[str]:
    """Return the table of whole passes: cost in units of one ordinary batched forward and backward."""
    passes = pass_rows(rows)
    single = {(row["case"], row["method"]): row for row in rows if row["num_batches"] == 1}
    lines = [
        "| cost, in batched forward+backwards | mas_fast | its first batch alone | Python only | "
        + " | ".join(PEERS.values())
        + " | faster than the best of them | error | peak MiB / backward + Ω |",
        "|---" * (len(PEERS) + 7) + "|",
    ]
    for case, title in TITLES.items():
        ours = passes.get((case, "mas_fast"))
        if ours is None:
            continue
        factor = times_as_fast(passes, case)
        cells = [
            f"**{times(ours['ratio_p50'])}**",
            *(
                times(known[case, method]["ratio_p50"]) if (case, method) in known else "–"
                for known, method in ((single, "mas_fast"), (passes, "mas_fast_python"))
            ),
            *(cell_of(passes.get((case, method))) for method in PEERS),
            "–" if factor is None else f"**{times(factor)}×**",
            f"{ours['error']:.0e}",
            f"{ours['peak_mib']:.0f} / {ours['peak_bar_mib']:.0f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def other_machines_table(machines: list[list[Row]]) -> list[str]:
    """Return what whole passes cost on other machines, a column each, beside the best of the other methods there."""
    columns = [pass_rows(rows) for rows in machines]
    heads = [next(row for row in passes.values() if row["method"] == OURS) for passes in columns]
    said = [f"{head['machine']['cpu']}, {kernels_of(head)}, {head['date'][:10]}" for head in heads]
    lines = [
        f"| cost; times as fast as the best other exact method | {' | '.join(said)} |",
        "|---" * (len(said) + 1) + "|",
    ]
    for case, title in TITLES.items():
        cells = [other_machine_cell(passes, case) for passes in columns]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def other_machine_cell(passes: dict[tuple[str, str], Row], case: str) -> str:
    """Return our cost on a case, and how many times as fast as which best peer that is."""
    ours, peer = passes.get((case, OURS)), best_peer(passes, case)
    if ours is None:
        return "–"
    beside = "" if peer is None else f"; {times(times_as_fast(passes, case))}× {PEERS[peer['method']]}"
    return f"**{times(ours['ratio_p50'])}**{beside}"


def cell_of(row: Row | None) -> str:
    """Return a peer's cost, or in few words why there is none."""
    if row is None:
        return "–"
    return times(row["ratio_p50"]) if row["failure"] is None else reason(row["failure"])


def break_even(rows: list[Row]) -> str:
    """Return from how many batches on mas_fast is ahead of the best peer, where that is not the first.

    A pass of k batches costs a + k·b, known at k = 1 and at another k.
    """
    passes = pass_rows(rows)
    single = {(row["case"], row["method"]): row for row in rows if row["num_batches"] == 1}
    counts: dict[int, list[str]] = {}
    for case in TITLES:
        ours, first, peer = passes.get((case, OURS)), single.get((case, OURS)), best_peer(passes, case)
        if ours is None or first is None or peer is None:
            continue
        k = ours["num_batches"]
        each = (k * ours["ratio_p50"] - first["ratio_p50"]) / (k - 1)
        once = first["ratio_p50"] - each
        if each + once > peer["ratio_p50"] > each:
            counts.setdefault(math.ceil(once / (peer["ratio_p50"] - each)), []).append(SHORT_TITLES[case])
    if not counts:
        return "mas_fast is ahead from the first batch on."
    said = "; ".join(f"{count} for {', '.join(cases)}" for count, cases in sorted(counts.items()))
    return f"mas_fast is ahead of the best peer from the first batch on, or from this many: {said}."


def batch_mode_line(rows: list[Row]) -> str:
    """Return how far |mean of a batch| is from Ω."""
    errors = [row["error"] for row in rows if row["method"] == "batch_mode" and row["num_batches"] > 1]
    return (
        "|Mean of a batch|, which most public code takes (Avalanche, FACIL, the authors' demo), costs one backward and "
        f"is off by {100 * min(errors):.0f} to {100 * max(errors):.0f} % of ‖Ω‖ here."
    )


def summary(machines: list[list[Row]], growth: list[Row]) -> str:
    """Return what the measurements say, in two sentences: passes of all machines, growth of the one quoted."""
    compared = [
        (case, passes[case, OURS], factor)
        for passes in map(pass_rows, machines)
        for case in TITLES
        if (case, OURS) in passes and (factor := times_as_fast(passes, case)) is not None
    ]
    slower = [f"{SHORT_TITLES[case]} ({row['machine']['cpu']})" for case, row, factor in compared if factor < 1]
    fastest = "in every case" if not slower else f"in all cases but {', '.join(slower)}"
    ratios, factors = [row["ratio_p50"] for _, row, _ in compared], [factor for _, _, factor in compared]
    cost, faster = (f"{times(min(values))} to {times(max(values))}" for values in (ratios, factors))
    batches = [row["num_batches"] for _, row, _ in compared]
    first = (
        f"In passes over {min(batches)} to {max(batches)} batches, mas_fast is the fastest exact method {fastest} on "
        f"each of {len(machines)} processors: it costs {cost} ordinary batched backwards, and is {faster} times "
        "as fast as the best other one."
    )
    lines = {
        curve: line_of(growth, curve, OURS)
        for curve in CURVES
        if CURVES[curve].axis in FLAT_AXES and line_of(growth, curve, OURS)
    }
    grown = {curve: growth_of(line) for curve, line in lines.items()}
    most = {
        axis: max(((grown[c] or math.inf) - 1 for c in grown if CURVES[c].axis == axis), default=math.inf)
        for axis in FLAT_AXES
    }
    falls = {
        axis: all((slope_of(lines[c], "ratio_p50") or 0.0) < 0 for c in lines if CURVES[c].axis == axis)
        for axis in FLAT_AXES
    }
    ends = {axis: max((row["value"] for row in growth if row["axis"] == axis), default=None) for axis in FLAT_AXES}
    parts = [
        f"from {axis} = {FLAT_FROM[axis]} to {ends[axis]} "
        + (
            "it falls"
            if most[axis] <= 0 and falls[axis]
            else "it does not grow"
            if most[axis] <= 0
            else f"it grows by at most {100 * most[axis]:.0f} %"
        )
        for axis in FLAT_AXES
        if ends[axis] is not None
    ]
    second = f"Beside the ordinary backward, that cost is flat: {', and '.join(parts)}"
    if max(most.values()) > MAY_GROW - 1:
        second = second.replace("is flat:", "changes with the size of the data:")
    return f"{first} {second}."


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


def numbers(
    rows: list[Row],
    others: list[list[Row]],
    growth: list[Row],
    steps: list[Row],
    state: list[Row],
    demo: Row,
    experiments: dict[str, Row],
) -> str:
    """Return the text between README's markers."""
    row = next(row for row in rows if row["method"] == "mas_fast")
    machine, versions = row["machine"], row["versions"]
    peers = " and ".join(f"{name} {versions[name]}" for name in ("opacus", "backpack-for-pytorch") if name in versions)
    lines = [
        summary([rows, *others], growth),
        "",
        "![Cost of every method by case; cost by N and T; memory by N](benchmarks/figures/performance.png)",
        "",
        *passes_table(rows),
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {row['dtype']}, {kernels_of(row)}, torch {versions['torch']}"
        f"{', ' + peers if peers else ''}, {row['date'][:10]}; medians of interleaved rounds, "
        "[all rows](benchmarks/results), [what they mean](benchmarks/README.md), [where mas_fast is not the fastest]"
        "(benchmarks/README.md#where-we-lose), [how cost grows with N, T and "
        "parameters](benchmarks/figures/growth.png). Error: the largest of any parameter against the float64 loop. The "
        f"first batch bears what is paid once, above all the proof of the layout: {break_even(rows)} A peer takes its "
        "fastest of chunks of 4, 8, 16, 32 and 64 samples; –: not measured here. ResNet-18: errors in float64 "
        "(benchmarks/README.md).",
        "",
        batch_mode_line(rows),
        "",
        "On other processors, with the code of that day (the one above is a Zen 5, family 25 model 17 a Zen 4; "
        "without AVX-512, with chunks of the peers that were chosen less carefully: "
        "[how](benchmarks/README.md#what-a-row-means)):",
        "",
        *other_machines_table(others),
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
    passes, growth, steps, state = (read_results(RESULTS, kind) for kind in ("passes", "growth", "steps", "state"))
    demo = json.loads((RESULTS / "demo.json").read_text())
    experiments = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "continual").glob("*.json"))}
    readme = ROOT / "README.md"
    text = readme.read_text()
    others = [json.loads((RESULTS / f"passes-{machine}.json").read_text()) for machine in OTHER_MACHINES]
    block = numbers(passes, others, growth, steps, state, demo, experiments)
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
