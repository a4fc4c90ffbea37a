"""Experiments on continual learning: a killed one goes on, and what is concluded follows from the rows."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

# Last, so that mas_fast is the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.continual import __main__ as command  # noqa: E402
from benchmarks.continual import batch_size, fact_learning, methods, recognition  # noqa: E402
from benchmarks.continual.problem import Training  # noqa: E402
from benchmarks.continual.seeds import run_seeds  # noqa: E402


def test_a_killed_run_goes_on_from_the_seeds_that_are_done(tmp_path):
    done = []

    def run(seed):
        if seed == 2:
            raise KeyboardInterrupt
        done.append(seed)
        return {"value": 10 * seed}

    with pytest.raises(KeyboardInterrupt):
        run_seeds(tmp_path, "any", {"a": 1}, [0, 1, 2], run)
    results = run_seeds(tmp_path, "any", {"a": 1}, [0, 1], run)
    assert done == [0, 1]
    assert [result["value"] for result in results] == [0, 10]
    run_seeds(tmp_path, "any", {"a": 2}, [0], run)
    assert done == [0, 1, 0]  # other settings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["any-seed-0.json", "any-seed-1.json"]


def test_best_lam_is_that_of_the_highest_mean():
    settings = {"sizes": [1, 8], "lams": [0.1, 1.0]}

    def result(seed, shift):
        rows = [
            {"per": per, "size": size, "lam": lam, "accuracy": accuracy + shift, "forgetting": 0.0}
            for per, size, lam, accuracy in (
                [("sample", size, lam, 0.9 - lam / 10) for size in (1, 8) for lam in (0.1, 1.0)]
                + [("batch", 1, lam, 0.9 - lam / 10) for lam in (0.1, 1.0)]
                + [("batch", 8, lam, 0.8 + lam / 10) for lam in (0.1, 1.0)]
            )
        ]
        layers = [{"layer": "w", "size": size, "ratio": 1 / size, "correlation": 0.5} for size in (1, 8)]
        return {"seed": seed, "settings": settings, "sweep": rows, "scales": layers}

    summary = batch_size.summarise([result(0, 0.0), result(1, 0.01)])
    assert batch_size.best_lams(summary, "sample") == [0.1, 0.1]
    assert batch_size.best_lams(summary, "batch") == [0.1, 1.0]
    assert summary["layers"]["w"]["8"] == {"ratio": 0.125, "correlation": 0.5}
    point = summary["sweep"][0]["points"][0]["accuracy"]
    assert point["mean"] == pytest.approx(0.895) and point["standard_error"] == pytest.approx(0.005)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch_size, "SMALL", {"seeds": [7], "sizes": [1, 256], "lams": [0.1]})
    monkeypatch.setattr(batch_size, "Settings", partial(batch_size.Settings, epochs=3))
    assert batch_size.main(["--out", str(tmp_path), "--small"]) == 0
    summary = json.loads((tmp_path / "batch_size.json").read_text())
    assert summary["seeds"] == [7]
    assert (tmp_path / "batch_size.png").stat().st_size > 10_000
    for layer, found in summary["layers"].items():
        # Batches of one are the paper's; larger ones lose what cancels.
        assert found["1"]["ratio"] == pytest.approx(1, abs=1e-4), layer
        assert found["256"]["ratio"] < 1
    exact = [c["points"][0]["accuracy"]["mean"] for c in summary["sweep"] if c["per"] == "sample"]
    assert exact[0] == pytest.approx(exact[1], abs=0.02)  # the same Ω up to rounding
    assert "best λ by batch size" in capsys.readouterr().out
    assert [c["verdict"] for c in summary["claims"]][0] == "holds"


@pytest.fixture
def quick(monkeypatch):
    """Few methods and strengths, and one epoch."""
    few = {name: methods.METHODS[name] for name in ("fine-tuning", "EWC", "MAS", "l-MAS", "joint")}
    training = Training(lr=0.05, epochs=1, batch_size=64)
    for module in (recognition, fact_learning):
        monkeypatch.setattr(module, "METHODS", few)
        monkeypatch.setattr(module, "TRAINING", training)
    monkeypatch.setattr(fact_learning, "SMALL_TRAINING", training)
    for method in few.values():
        if method.strengths:
            monkeypatch.setattr(method, "strengths", (0.0, 0.1, 1.0))  # of which the small setting takes the second
    monkeypatch.setattr(fact_learning.Retrieval, "fisher_stride", 200)


EXPERIMENTS = {
    "pairs": ["mean over all", "0–4 → 5–9", "5–9 → 0–4"],
    "omega_data": ["mean over all", "0–4 → 5–9", "5–9 → 0–4"],
    "sequence": ["8 tasks in a row"],
    "facts": ["halves by left digit", "halves of all facts"],
    "fact_subsets": ["subsets by relation", "subsets by left digit"],
    "fact_sequence": ["four disjoint tasks"],
    "fact_adaptation": [
        "Accuracy on facts of “above” after the last task",
        "Accuracy on all other facts after the last task",
    ],
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name, tmp_path, quick, capsys, monkeypatch):
    assert command.main([name, "--out", str(tmp_path), "--small", "--seeds", "1", "2"]) == 0
    summary = json.loads((tmp_path / f"{name}.json").read_text())
    assert [table["title"] for table in summary["tables"]] == EXPERIMENTS[name]
    assert summary["seeds"] == [1, 2] and summary["small"]
    assert all(found["strength"] == 0.1 for found in summary["chosen"].values())
    for table in summary["tables"]:
        for row in table["rows"]:
            assert len(row["cells"]) == len(table["columns"])
            assert all(cell is None or -100 <= cell["mean"] <= 100 for cell in row["cells"])
    assert summary["claims"] and all(found["verdict"] for found in summary["claims"])
    assert summary["title"] in capsys.readouterr().out

    # All seeds are kept: nothing is learned again.
    def fail(*arguments):
        raise AssertionError("a seed was run again")

    monkeypatch.setattr(methods.FineTuning, "learn", fail)
    monkeypatch.setattr(recognition, "omega_by_class", lambda problem, seed: [])
    assert command.main([name, "--out", str(tmp_path), "--small", "--seeds", "1", "2"]) == 0


def test_omega_follows_the_images_that_it_is_given(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(recognition, "TRAINING", Training(lr=0.05, epochs=4, batch_size=16))
    assert command.main(["omega_data", "--out", str(tmp_path), "--small", "--seeds", "1"]) == 0
    (_, table, _) = json.loads((tmp_path / "omega_data.json").read_text())["tables"]
    means = {row["name"]: [cell["mean"] for cell in row["cells"]] for row in table["rows"]}
    assert len(means) == 3
    assert len({tuple(own) for own in means.values()}) > 1


def test_all_runs_every_experiment(tmp_path, monkeypatch, capsys):
    called = []

    def run(arguments, stdout, **options):
        called.append(arguments[3:])
        stdout.write("seen\n")
        return type("Done", (), {"returncode": int("facts" in arguments)})

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main(["all", "--out", str(tmp_path), "--small"]) == 1  # one of them failed
    assert sorted(own[0] for own in called) == sorted([*EXPERIMENTS, "batch_size"])
    assert all(own[1:] == ["--out", str(tmp_path), "--small"] for own in called)
    called.clear()
    command.main(["all", "--out", str(tmp_path), "--seeds", "4", "5", "--mnist", "there"])
    for own in called:
        data = ["--mnist", "there"] if own[0] in command.RECOGNITION else []
        assert own[1:] == ["--out", str(tmp_path), "--seeds", "4", "5", *data]
    assert (tmp_path / "pairs.log").read_text() == "seen\n"
    assert "facts: exit 1" in capsys.readouterr().out


def test_bad_input_is_an_error(tmp_path, quick, capsys):
    file = tmp_path / "file"
    file.touch()
    assert command.main(["pairs", "--out", str(file)]) == 2
    assert "must be a folder that can be written to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["facts", "--out", str(tmp_path), "--mnist", str(tmp_path)])
    assert "leave --mnist and --folders out" in capsys.readouterr().err
    (tmp_path / "pairs-choice-seed-100.json").write_text('{"half')
    assert command.main(["pairs", "--out", str(tmp_path), "--small"]) == 2
    assert "pairs-choice-seed-100.json must be the result of a seed" in capsys.readouterr().err


def test_an_interrupted_experiment_says_how_to_go_on(tmp_path, quick, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods.FineTuning, "learn", interrupt)
    assert command.main(["pairs", "--out", str(tmp_path), "--small"]) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
