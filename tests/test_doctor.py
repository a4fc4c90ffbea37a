"""`python -m mas_fast doctor`: it reports what runs, and fails exactly when something that was built cannot be used."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mas_fast
from mas_fast import __main__ as command_line
from mas_fast import doctor
from mas_fast.kernels import ops


def run_doctor(*words, cwd=None, **environ):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mas_fast", *words],
        cwd=cwd,
        env={**os.environ, **environ},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.fixture
def broken_package(tmp_path):
    """A copy of the package with a library that is none."""
    package = tmp_path / "mas_fast"
    shutil.copytree(doctor.PACKAGE_DIR, package, ignore=shutil.ignore_patterns("*.so", "*.dylib", "__pycache__"))
    (package / ops.LIBRARY_PATH.name).write_text("not a library")
    return tmp_path


def test_a_healthy_installation_exits_with_zero(capsys):
    assert doctor.main() == 0
    assert "PROBLEM" not in capsys.readouterr().out


def test_the_report_says_versions_machine_build_and_the_whole_table():
    report = doctor.report()
    for fact in (mas_fast.__version__, torch.__version__, platform.python_version(), platform.platform()):
        assert fact in report
    assert f"{torch.get_num_threads()} threads" in report
    assert (ops.cpu_capability() or "reference kernels only") in report
    for row in ops.implementations():
        line = next(line for line in report.splitlines() if line.split()[:2] == [row.op, row.device])
        assert row.implementation in line
        assert row.reason in line


@pytest.mark.parametrize(
    ("architectures", "cuda"),
    [((), "no CUDA kernels"), (("80", "90"), "CUDA kernels for compute capability 80, 90 by nvcc 13.0.88")],
)
def test_a_build_is_described_with_everything_that_build_info_says(architectures, cuda):
    info = {
        "architecture": "x86_64",
        "instruction_sets": ("baseline", "avx2"),
        "compiler": "GNU 12.2.0",
        "cuda_compiler": "nvcc 13.0.88",
        "cuda_architectures": architectures,
        "torch": "2.13.0",
        "oldest_torch": "2.10",
    }
    expected = f"C++ kernels for x86_64 (baseline, avx2) by GNU 12.2.0, {cuda}, with torch 2.13.0; needs torch >= 2.10"
    assert doctor.build_text(info) == expected


STEP_OPS = {"penalty_grad_", "sgd_step_", "adamw_step_", "encode_omega", "decode_omega"}


@pytest.mark.parametrize("there", [True, False])
def test_a_kernel_for_gpus_is_claimed_exactly_where_the_library_has_one(monkeypatch, there):
    monkeypatch.setattr(ops, "_reference_reason", None)
    monkeypatch.setattr(ops, "cpu_capability", lambda: "avx2")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: there and key == "CUDA")
    rows = {row.op: row for row in ops.implementations() if row.device == "cuda"}
    assert {op for op, row in rows.items() if row.implementation == "CUDA"} == (STEP_OPS if there else set())
    assert all(row.reason for row in rows.values() if row.implementation == "reference")
    assert "MAS_FAST_BUILD=cuda compiles it" in rows["sgd_step_"].reason or there


def test_chosen_reference_kernels_are_what_runs_on_gpus(monkeypatch):
    monkeypatch.setattr(ops, "_reference_reason", "MAS_FAST_KERNELS=reference")
    (row,) = [row for row in ops.implementations() if row.device == "cuda" and row.op == "sgd_step_"]
    assert row[2:] == ("reference", "MAS_FAST_KERNELS=reference")


def test_a_python_only_build_says_how_to_get_the_kernels():
    assert "Python only" in doctor.build_text(None)
    assert "MAS_FAST_BUILD=cpu pip install --no-build-isolation" in doctor.build_text(None)


def test_the_command_line_reaches_the_doctor():
    done = run_doctor("doctor")
    assert done.returncode == 0, done.stderr
    assert doctor.report() in done.stdout


@pytest.mark.parametrize("words", [[], ["cure"], ["doctor", "--cure"]])
def test_the_command_line_wants_a_known_command(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main(words)
    assert exit_.value.code == 2
    assert "usage: python -m mas_fast" in capsys.readouterr().err


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_library_that_cannot_be_loaded_is_a_problem(broken_package, kernels):
    done = run_doctor("doctor", cwd=broken_package, PYTHONPATH=str(broken_package), MAS_FAST_KERNELS=kernels)
    assert done.returncode == 1
    library = Path(broken_package, "mas_fast", ops.LIBRARY_PATH.name)
    assert f"PROBLEM  {library} cannot be loaded: " in done.stdout
    assert "reinstall mas_fast" in done.stdout
    # Who only imports the package is told too.
    assert ("was built but cannot be loaded" in done.stderr) == (kernels == "auto")


def healthy(monkeypatch):
    """Pretend that everything was built and works; a test breaks one thing."""
    monkeypatch.setattr(doctor, "built_files", lambda: (ops.LIBRARY_PATH, [Path("_C.cpython-310.so")]))
    monkeypatch.setattr(doctor, "load_error", lambda library: None)
    monkeypatch.setattr(doctor, "build_info", lambda: {"version": mas_fast.__version__})


@pytest.mark.parametrize(
    ("name", "replacement", "problem"),
    [
        ("load_error", lambda library: "undefined symbol: x", "cannot be loaded: undefined symbol: x; reinstall"),
        ("built_files", lambda: (None, [Path("_C.so")]), "is missing although _C.so is there; reinstall"),
        ("build_info", lambda: None, r"_C cannot be imported by Python .*: found _C\.cpython-310\.so; reinstall"),
        ("build_info", lambda: {"version": "0.0.1"}, "built from version 0.0.1, the package is .*; reinstall"),
    ],
)
def test_each_problem_is_one_line_with_the_way_out(monkeypatch, name, replacement, problem):
    healthy(monkeypatch)
    assert doctor.problems() == []
    monkeypatch.setattr(doctor, name, replacement)
    (found,) = doctor.problems()
    assert re.search(problem, found)


def test_nothing_built_is_no_problem(monkeypatch):
    monkeypatch.setattr(doctor, "built_files", lambda: (None, []))
    assert doctor.problems() == []


def test_first_calls_are_timed():
    heading, *lines = doctor.first_call_lines(torch.device("cpu"))
    assert heading.startswith("first call")
    accumulating = [op for op in ops.OPS if op.startswith("accumulate_")]
    assert [line.split()[0] for line in lines] == accumulating
    assert all(float(line.split()[column]) > 0 for line in lines for column in (1, 3))
