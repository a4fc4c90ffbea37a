"""The page: HTML with everything inside, so that it can be sent as one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Json = Mapping[str, Any]

STYLE = """
:root { --ink: #1d2733; --soft: #5c6b7a; --line: #dfe5ea; --back: #f6f8fa; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 1.5rem; }
header h1 { margin: 1rem 0 .25rem; font-size: 2rem; }
header p, footer, .seeds { color: var(--soft); }
nav a { display: inline-block; margin: .2rem .9rem .2rem 0; color: var(--blue); text-decoration: none; }
section { background: white; border: 1px solid var(--line); border-radius: 12px; }
section { padding: 1.2rem 1.6rem; margin: 1.4rem 0; }
section h2 { margin: 0 0 .2rem; font-size: 1.35rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem auto; }
ul.claims { list-style: none; padding: 0; }
ul.claims li { margin: .35rem 0; padding-left: 8.2rem; position: relative; }
.verdict { position: absolute; left: 0; width: 7.4rem; padding: .1rem; border-radius: 99px; }
.verdict { text-align: center; font-size: .8rem; }
.holds { background: #d8f0e3; color: #0b6b3d; } .ties { background: #dcebf7; color: #0b4f80; }
.does-not-hold { background: #fbdfd3; color: #9c3600; } .cannot-be-told { background: #ececec; color: #444; }
.interval { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--blue); }
.scroll { overflow-x: auto; }
"""

CAPTIONS = {
    "tables": "Accuracy and forgetting in %, mean over the seeds; bars are standard errors.",
    "curves": "Bands are standard errors over the seeds.",
    "matrices": "Accuracy in % on each task (to the right) after learning each task (downwards), mean over the seeds.",
    "heatmaps": "",
}


def format_page(results: Sequence[Json], figures: Mapping[str, Mapping[str, bytes]]) -> str:
    """Return the page.

    Args:
        results: In the order of the page.
        figures: Of each experiment, PNG by file name.
    """
    links = "".join(f'<a href="#{escape(r["experiment"])}">{escape(r["title"])}</a>' for r in results)
    sections = "".join(_section(result, figures[result["experiment"]]) for result in results)
    first = results[0]
    machine, versions = first.get("machine", {}), first.get("versions", {})
    source = ", ".join(
        escape(str(part))
        for part in (machine.get("cpu"), *(f"{name} {own}" for name, own in versions.items()), first.get("commit"))
        if part
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Memory Aware Synapses: what experiments show</title><style>{STYLE}</style></head><body>"
        "<header><h1>Memory Aware Synapses on real data</h1><p>What the paper claims, tested over seeds: a claim holds "
        "if the 95 % interval of its difference over the seeds lies on its side of zero.</p>"
        f"<nav>{links}</nav></header><main>{sections}</main><footer>{source}</footer></body></html>\n"
    )


def _section(result: Json, figures: Mapping[str, bytes]) -> str:
    parts = [f'<section id="{escape(result["experiment"])}"><h2>{escape(result["title"])}</h2>', _seeds(result)]
    parts += [f"<p>{escape(note)}</p>" for note in result.get("notes", ())]
    if result["claims"]:
        parts.append(f'<ul class="claims">{"".join(map(_claim, result["claims"]))}</ul>')
    for name, png in figures.items():
        caption = CAPTIONS[name.removesuffix(".png").rpartition("-")[2]]
        data = base64.b64encode(png).decode()
        parts.append(f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{data}">')
        parts.append(f"<figcaption>{escape(caption)}</figcaption></figure>")
    if result.get("tables"):
        tables = "".join(map(_table, result["tables"]))
        parts.append(f"<details><summary>The numbers</summary>{tables}</details>")
    if result.get("chosen"):
        parts.append(f"<details><summary>How strengths were chosen</summary>{_chosen(result['chosen'])}</details>")
    return "".join([*parts, "</section>"])


def _seeds(result: Json) -> str:
    training = result.get("settings", {}).get("training", {})
    listed = ", ".join(f"{name} {value}" for name, value in training.items())
    seeds = ", ".join(map(str, result["seeds"]))
    small = "; the small setting, which shows that everything runs" if result.get("small") else ""
    return f'<p class="seeds">seeds {escape(seeds)}{"; " if listed else ""}{escape(listed)}{small}</p>'


def _claim(claim: Json) -> str:
    bounds = claim.get("interval_95_points")
    interval = "" if bounds is None else f", 95 % interval {bounds[0]:+.1f} to {bounds[1]:+.1f}"
    margin = f", within {claim['margin_points']:g} points" if claim.get("margin_points") else ""
    measured = claim.get("measured") or f"{claim['difference_points']:+.1f} points{interval}{margin}"
    verdict = claim["verdict"]
    return (
        f'<li><span class="verdict {escape(verdict.replace(" ", "-"))}">{escape(verdict)}</span>'
        f'{escape(claim["claim"])} <span class="interval">{escape(measured)}</span></li>'
    )


def _table(table: Json) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table["columns"])
    rows = "".join(
        f"<tr><td>{escape(row['name'])}</td>{''.join(map(_cell, row['cells']))}</tr>" for row in table["rows"]
    )
    return f'<div class="scroll"><table><tr><th>{escape(table["title"])}</th>{head}</tr>{rows}</table></div>'


def _cell(cell: Json | None) -> str:
    if cell is None:
        return "<td>–</td>"
    error = cell["standard_error"]
    return f"<td>{cell['mean']:.1f}{'' if error is None else f' ± {error:.1f}'}</td>"


def _chosen(chosen: Mapping[str, Json]) -> str:
    rows = []
    for method, found in chosen.items():
        scores = "  ".join(
            f"{float(strength):g}: {'diverged' if score is None else f'{100 * score:.1f}'}"
            for strength, score in found["scores"].items()
        )
        edge = " (at the edge of the grid)" if found["edge"] else ""
        cells = (method, f"{found['strength']:g}{edge}", scores)
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return (
        "<p>The strength of the highest average accuracy after the last task, on validation images, with seeds of "
        "their own.</p>"
        '<div class="scroll"><table><tr><th>method</th><th>strength</th><th>average accuracy in % by strength</th></tr>'
        f"{''.join(rows)}</table></div>"
    )
