"""The report: everything that results hold is on the page, and what is no result is said."""

import base64
import json
import re

import pytest

from mas_fast.__main__ import main

CELL = {"mean": 97.25, "standard_error": 0.5}
RESULT = {
    "experiment": "pairs",
    "title": "Two <tasks>",
    "seeds": [7, 8],
    "settings": {"training": {"lr": 0.05}},
    "chosen": {"MAS": {"strength": 0.1, "scores": {"0.1": 0.5, "1.0": None}, "edge": True}},
    "tables": [
        {
            "title": "a → b",
            "columns": ["average accuracy", "forgetting"],
            "rows": [{"name": "MAS", "cells": [CELL, None]}, {"name": "another & more", "cells": [CELL, CELL]}],
        }
    ],
    "matrices": [{"title": "MAS", "tasks": ["a", "b"], "mean": [[0.9], [0.8, 0.95]]}],
    "curves": [
        {
            "title": "the first task",
            "x_label": "tasks",
            "y_label": "%",
            "x": [1, 2],
            "series": {"MAS": [CELL, {"mean": 90.0, "standard_error": None}]},
        }
    ],
    "heatmaps": [{"title": "Ω", "rows": ["c"], "columns": ["x", "y"], "values": [[0.001, 1.0]]}],
    "claims": [
        {
            "claim": "MAS forgets less",
            "verdict": "does not hold",
            "difference_points": -1.25,
            "interval_95_points": [-2.0, -0.5],
            "margin_points": 0.0,
        },
        {"claim": "λ stays", "verdict": "holds", "measured": "a factor of 1"},
    ],
    "notes": ["As expected."],
    "machine": {"cpu": "some CPU"},
    "versions": {"torch": "2.13"},
    "commit": "abc",
}
KINDS = ("tables", "curves", "matrices", "heatmaps")


def written(folder, **changes):
    content = {**RESULT, **changes}
    (folder / f"{content['experiment']}.json").write_text(json.dumps(content))


def test_page_holds_all(tmp_path, capsys):
    written(tmp_path)
    written(tmp_path, experiment="zzz", title="Another")
    (tmp_path / "pairs-seed-7.json").write_text('{"seed": 7}')
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 experiments, 8 figures" in capsys.readouterr().out
    for part in (
        "Two &lt;tasks&gt;",
        "another &amp; more",
        "97.2 ± 0.5",
        "does not hold",
        "-1.2 points, 95 % interval -2.0 to -0.5",
        "a factor of 1",
        "As expected.",
        "0.1 (at the edge of the grid)",
        "1: diverged",
        "some CPU",
        "abc",
        "seeds 7, 8",
    ):
        assert part in page, part
    assert page.index("Two &lt;tasks&gt;") < page.index("Another")
    # Nothing is loaded from elsewhere; the pictures on the page are those beside it.
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    files = [tmp_path / f"{name}-{kind}.png" for name in ("pairs", "zzz") for kind in KINDS]
    assert pictures == [path.read_bytes() for path in files]


def test_out_is_another_folder(tmp_path):
    written(tmp_path)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "new" / "page")]) == 0
    assert (tmp_path / "new" / "page" / "report.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "pairs.json"]


def missing(folder):
    return folder / "none"


def empty(folder):
    return folder


def broken(folder):
    (folder / "pairs.json").write_text('{"experiment": ')
    return folder


def other(folder):
    (folder / "pairs.json").write_text('{"experiment": "pairs"}')
    return folder


def seeds_only(folder):
    (folder / "pairs-seed-7.json").write_text('{"seed": 7}')
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "which is none"),
        (empty, "got none in 0 JSON files"),
        (seeds_only, "got none in 1 JSON files"),
        (broken, "pairs.json must be JSON"),
        (other, "it lacks title, seeds, claims"),
    ],
)
def test_no_results(tmp_path, make, message, capsys):
    assert main(["report", str(make(tmp_path))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_committed_results_make_a_page(tmp_path, request):
    folder = request.config.rootpath / "benchmarks" / "results" / "continual"
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for path in folder.glob("*.json"):
        assert f'id="{path.stem}"' in page
