"""The benchmark's commands: what grows, what a comparison says, what README is given."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

# Last, so that mas_fast is the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import cases, compare, growth, measure, memory, methods, plot, provenance, readme, run, steps  # noqa: E402
from benchmarks.cases import CASES, CURVES, find_case  # noqa: E402


def row(case="mlp", method="mas_fast", ratio=1.2, batches=4, **columns):
    percentiles = {f"{name}_p{p}": ratio for name in ("ratio", "time_ms") for p in (20, 50, 80)}
    return {
        "case": case,
        "method": method,
        "device": "cpu",
        "dtype": "float32",
        "num_batches": batches,
        "failure": None,
        **percentiles,
        **columns,
    }


def written(folder, rows, name="passes-x-2-threads.json"):
    folder.mkdir(exist_ok=True)
    run.write_rows(folder / name, rows)
    return folder


@pytest.mark.parametrize(("now", "code"), [(1.3, 0), (1.37, 0), (1.39, 1), (0.5, 0)])
def test_a_ratio_of_ours_that_grew_is_told(tmp_path, capsys, now, code):
    before = written(tmp_path / "before", [row(), row(method="vmap", ratio=5.0)])
    after = written(tmp_path / "after", [row(ratio=now), row(method="vmap", ratio=9.0)])
    assert compare.main([str(before), str(after)]) == code
    said = capsys.readouterr().out
    assert ("GREW" in said) == bool(code)
    # A peer that became slower is shown, and is no failure of ours.
    assert "+80 %  differs" in said


def test_a_row_of_ours_without_a_time_any_more_is_told(tmp_path, capsys):
    before = written(tmp_path / "before", [row(), row(method="vmap", ratio=5.0), row(method="loop", ratio=7.0)])
    lost = row(ratio=None, failure="error 3e-02 is above 1e-05")
    after = written(tmp_path / "after", [lost, row(method="vmap", ratio=None, failure="out of memory")])
    assert compare.main([str(before), str(after)]) == 1
    said = capsys.readouterr().out
    assert "error 3e-02 is above" in said and "out of memory" in said and "0 of 1 ratios" in said
    # The other way round: it had none, and has one.
    assert compare.main([str(after), str(before)]) == 0


def test_of_two_machines_the_same_is_compared_or_the_latest(tmp_path, capsys):
    before = written(tmp_path / "before", [row(ratio=1.0, date="2026-01-02")])
    written(before, [row(ratio=9.0, date="2026-01-01")], "passes-y-2-threads.json")
    for name, then, code in (("x", "1.00", 1), ("y", "9.00", 0), ("z", "1.00", 0)):
        after = written(tmp_path / name, [row(ratio=2.0)], f"passes-{name}-2-threads.json")
        assert compare.main([str(before), str(after)]) == code
        said = capsys.readouterr().out
        assert f"{then} →     2.00" in said and f"→ passes-{name}-2-threads.json" in said
        assert ("another machine" in said) == (name == "z") == ("on the same machine" not in said)


def test_a_row_without_a_time_any_more_counts_on_another_machine_too(tmp_path):
    before = written(tmp_path / "before", [row(), row(case="lstm")])
    lost = [row(ratio=5.0), row(case="lstm", ratio=None, failure="error 3e-02 is above 1e-05")]
    assert compare.main([str(before), str(written(tmp_path / "a", lost[:1], "passes-z-2-threads.json"))]) == 0
    assert compare.main([str(before), str(written(tmp_path / "b", lost, "passes-z-2-threads.json"))]) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD EPYC", "AMD EPYC, family 25 model 17"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel(R) Xeon(R) CPU @ 2.20GHz, family 25 model 17"),
        ("AMD EPYC 9354P 32-Core Processor", "AMD EPYC 9354P 32-Core Processor"),
    ],
)
def test_a_processor_that_hides_its_model_goes_by_what_it_reports(monkeypatch, name, expected):
    monkeypatch.setattr(provenance, "cpuinfo", {"model name": name, "cpu family": "25", "model": "17"}.get)
    assert provenance.cpu_model() == expected
    monkeypatch.setattr(provenance, "cpuinfo", {"model name": name}.get)
    assert provenance.cpu_model() == name


@pytest.mark.parametrize("tolerance", ["nan", "-0.1"])
def test_a_tolerance_that_says_nothing_is_an_error(tmp_path, capsys, tolerance):
    folder = str(written(tmp_path / "one", [row()]))
    with pytest.raises(SystemExit):
        compare.main([folder, folder, "--tolerance", tolerance])
    assert "must not be negative" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '[{"case": "mlp"}]'])
def test_a_file_that_rows_cannot_be_added_to_is_an_error_before_measuring(tmp_path, content):
    path = tmp_path / "passes-x-2-threads.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"passes-x-2-threads\.json must hold"):
        run.writable(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", ["", "{", "[]", "[1, 2]", '{"case": "mlp"}'])
def test_a_folder_without_results_is_an_error(tmp_path, capsys, content):
    good = written(tmp_path / "good", [row()])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "passes.json").write_text(content)
    for folder in (tmp_path / "bad", tmp_path / "none"):
        with pytest.raises(SystemExit):
            compare.main([str(good), str(folder)])
        assert str(folder) in capsys.readouterr().err


def test_a_kind_without_a_row_in_common_is_left_out(tmp_path, capsys):
    folders = [written(tmp_path / name, [row()]) for name in ("a", "b")]
    for folder, case in zip(folders, ("5 large", "700 small"), strict=True):
        written(folder, [row(case=case)], "steps-x-2-threads.json")
    assert compare.main([str(folder) for folder in folders]) == 0
    assert "steps" not in capsys.readouterr().out


def test_runs_without_a_row_in_common_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([str(written(tmp_path / "a", [row()])), str(written(tmp_path / "b", [row(case="lstm")]))])
    assert "in common" in capsys.readouterr().err


def line(ratios, values=(4, 16, 64, 256), **columns):
    return [
        row(f"mlp-N={v}", ratio=r, curve="mlp-N", axis="N", value=v, **columns)
        for v, r in zip(values, ratios, strict=True)
    ]


def test_growth_is_measured_from_where_cost_should_be_flat():
    assert growth.growth_of(line([9.0, 2.0, 2.2, 1.8])) == pytest.approx(1.1)
    assert growth.growth_of(line([1.0, 2.0, None, 1.8])) is None
    assert growth.growth_of(line([1.0], values=(4,))) is None


def test_slopes_are_exponents():
    rows = [{**own, "time_ms_p50": 3.0 * own["value"] ** 1.5} for own in line([1.0] * 4)]
    assert growth.slope_of(rows, "time_ms_p50") == pytest.approx(1.5)
    assert growth.slope_of(rows[:2], "time_ms_p50") is None


@pytest.mark.parametrize("name", ["mlp-N", "mlp-N=", "mlp-N=x", "mlp=3", "none", "mlp-N=-1"])
def test_unknown_cases_are_errors_that_list_the_known(name):
    with pytest.raises(ValueError, match="must be one of mlp"):
        find_case(name)


@pytest.mark.parametrize("curve", CURVES)
def test_points_of_curves_are_cases(curve):
    value = CURVES[curve].values[0]
    workload = find_case(f"{curve}={value}").build(1)
    assert workload.model(workload.batches[0]).shape[0] == workload.batch_size
    if CURVES[curve].axis == "parameters":
        count = sum(p.numel() for p in workload.model.parameters())
        assert abs(count / value - 1) < 0.05


@pytest.mark.parametrize("name", ["vit", "resnet18_32"])
def test_large_cases_are_exact(name):
    workload = CASES[name].build(1).head(2)
    workload = measure.in_float64(workload)
    truth = measure.true_importance(workload)
    error = measure.max_relative_error(methods.mas_fast_pass(workload), truth)
    assert error < 1e-11


def test_the_truth_is_that_of_the_reference():
    from mas_fast.reference import importance_loop

    torch.manual_seed(0)
    workload = CASES["mlp"].build(1).head(3)
    truth = measure.true_importance(workload)
    for name, omega in importance_loop(workload.model, workload.batches[0]).items():
        torch.testing.assert_close(truth[name], omega)


def test_the_authors_procedure_is_exact_and_leaves_no_gradients():
    torch.manual_seed(0)
    workload = CASES["mlp"].build(2).head(5)
    contender = measure.prepare("authors", workload, measure.true_importance(workload), 1e-5)
    assert contender.failure is None and contender.error < 1e-5
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_a_pass_that_takes_too_long_is_not_timed():
    torch.manual_seed(0)
    workload = CASES["mlp"].build(1).head(4)
    contender = measure.prepare("loop", workload, measure.true_importance(workload), 1e-5, slowest_s=0.0)
    assert contender.failure == "slower than 0 s a pass"


def test_a_choice_that_fails_leaves_the_others(monkeypatch):
    torch.manual_seed(0)
    workload = CASES["mlp"].build(1).head(8)

    def fails_on_large_chunks(workload, chunk):
        if chunk > 4:
            raise RuntimeError("too large")
        return methods.vmap(workload, chunk)

    monkeypatch.setitem(methods.METHODS, "vmap", methods.Method(fails_on_large_chunks, options=methods.CHUNKS))
    contender = measure.prepare("vmap", workload, measure.true_importance(workload), 1e-5)
    assert contender.failure is None and contender.options == {"chunk": 4}


@pytest.mark.parametrize(("fail", "chosen"), [((), 4), ((4,), 8), ((4, 8), None)])
def test_the_choice_is_what_is_fastest_beside_the_unit(monkeypatch, fail, chosen):
    torch.manual_seed(0)
    workload = CASES["mlp"].build(1).head(8)
    seconds = {4: {"alone": 3.0, "beside": 3.0}, 8: {"alone": 2.0, "beside": 5.0}}
    ran = []

    def time_pass_s(contender):
        where, chunk = "beside" if ran[-1:] == ["unit"] else "alone", contender.options["chunk"]
        ran.append("own")
        if where == "beside" and chunk in fail:
            raise RuntimeError("too much")
        return seconds[chunk][where]

    monkeypatch.setitem(methods.METHODS, methods.UNIT, methods.Method(lambda workload: ran.append("unit")))
    monkeypatch.setattr(measure.Contender, "time_pass_s", time_pass_s)
    contender = measure.prepare("vmap", workload, measure.true_importance(workload), 1e-5)
    assert contender.failure == (None if chosen else "RuntimeError: too much")
    if chosen:
        assert contender.options == {"chunk": chosen}


@pytest.mark.parametrize(("limit", "size", "batches"), [(8, 4, [4, 4]), (8, 32, [8]), (8, 5, [5]), (None, 4, [4] * 3)])
def test_peers_are_timed_on_whole_batches_or_a_part_of_one(limit, size, batches):
    workload = cases.replace(CASES["mlp"], batch_size=size).build(3)
    timed = methods.Method(methods.loop, sample_limit=limit).timed_workload(workload)
    assert [len(batch) for batch in timed.batches] == batches


def test_what_is_timed_is_checked_where_float32_decides_branches(monkeypatch):
    workload = cases.replace(CASES["mlp"], decided=False).build(1).head(4)
    truth = measure.true_importance(workload)
    contender = measure.prepare("mas_fast", workload, truth, 1e-11)
    assert contender.failure is None and contender.error < 1e-11 < contender.error_as_timed < 1e-5

    def wrong_in_float32(workload):
        omega = methods.loop(workload)
        return {name: 1.1 * own if own.dtype == torch.float32 else own for name, own in omega.items()}

    monkeypatch.setitem(methods.METHODS, "loop", methods.Method(wrong_in_float32))
    contender = measure.prepare("loop", workload, truth, 1e-11)
    assert contender.error < 1e-11 and contender.failure == "error 1.0e-01 is above 2e-02"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_what_needs_more_memory_than_it_may_have_says_so():
    with pytest.raises(memory.OutOfMemoryError, match=r"more than 0\.0625 GiB"):
        memory.peak_mib("mlp-N=256", "vmap_whole", 1, "float32", 1, {}, runs=1, limit_gib=0.0625)
    assert memory.peak_mib("mlp-N=16", "mas_fast", 1, "float32", 1, {}, runs=1, limit_gib=0.0625) < 64


@pytest.mark.slow
def test_a_step_is_measured_in_several_processes(tmp_path):
    arguments = ["--out", str(tmp_path), "--cases", "700 small", "--operations", "penalty", "--methods", "mas_fast"]
    assert steps.main([*arguments, "--rounds", "2", "--threads", "1"]) == 0
    (path,) = tmp_path.glob("steps-*.json")
    unit, ours = json.loads(path.read_text())
    assert unit["ratio_p50"] == 1.0 and unit["method"] == f"penalty: {ours['unit']}"
    assert ours["ratio_p20"] > 0 and ours["error"] < ours["error_bar"]
    assert (ours["processes"], ours["rounds"]) == (2, 2)


def test_an_error_of_a_step_that_is_no_number_is_one():
    ones, lost = [torch.ones(3)], [torch.tensor([1.0, math.nan, 1.0])]
    assert steps.relative_error(ones, ones) == 0.0
    assert steps.relative_error(lost, ones) == math.inf


@pytest.mark.slow
def test_a_point_is_measured_with_peers_that_fail_beside_it(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--curves", "language_model-T", "--values", "8", "--rounds", "1"]
    assert growth.main([*arguments, "--threads", "1", "--methods", "mas_fast", "backpack"]) == 0
    (path,) = tmp_path.glob("growth-*.json")
    rows = {own["method"]: own for own in json.loads(path.read_text())}
    assert rows["mas_fast"]["ratio_p50"] > 0 and rows["mas_fast"]["peak_mib"] > 0
    # Not installed here, or cannot run it.
    assert rows["backpack"]["failure"] and rows["backpack"]["time_ms_p50"] is None
    assert "language model" in capsys.readouterr().out


@pytest.mark.slow
def test_the_python_only_build_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--cases", "mlp", "--batches", "2", "--rounds", "1", "--no-memory"]
    assert run.main([*arguments, "--threads", "1", "--methods", "mas_fast_python"]) == 0
    (path,) = tmp_path.glob("passes-*.json")
    rows = {own["method"]: own for own in json.loads(path.read_text())}
    assert set(rows["mas_fast_python"]["implementations"].values()) == {"reference"}
    assert rows["mas_fast_python"]["error"] < 1e-5
    capsys.readouterr()


def test_readme_is_written_from_the_committed_results(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_committed_results_can_be_drawn(tmp_path):
    assert plot.main(["--out", str(tmp_path)]) == 0
    for name in ("performance.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
