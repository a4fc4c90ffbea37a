"""The build switch MAS_FAST_BUILD: what each value builds, what it says is missing, and nothing stale."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mas_fast
from mas_fast.kernels import ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_DIR = Path(mas_fast.__file__).resolve().parent

spec = importlib.util.spec_from_file_location("mas_fast_setup", ROOT / "setup.py")
setup_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_script)

MISSING = setup_script.missing_for_kernels(os.environ)
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"compiles: {'; '.join(MISSING)}")
MISSING_FOR_CUDA = [*MISSING, *setup_script.missing_for_cuda(os.environ)]
needs_cuda_tools = pytest.mark.skipif(bool(MISSING_FOR_CUDA), reason=f"compiles: {'; '.join(MISSING_FOR_CUDA)}")

# One op is enough to see a library built, packed and loaded; its arithmetic is not the subject here.
OP_SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
namespace {
int64_t count(torch::stable::Tensor t) { return t.numel(); }
}  // namespace
STABLE_TORCH_LIBRARY(build_probe, m) { m.def("count(Tensor t) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(build_probe, CPU, m) { m.impl("count", TORCH_BOX(&count)); }
"""
CUDA_SOURCE = """
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
namespace {
__global__ void nothing_kernel() {}
int64_t count(torch::stable::Tensor t) {
  nothing_kernel<<<1, 1>>>();
  return cudaGetLastError() == cudaSuccess ? t.numel() : -1;
}
}  // namespace
STABLE_TORCH_LIBRARY_IMPL(build_probe, CUDA, m) { m.impl("count", TORCH_BOX(&count)); }
"""
LOAD_OP = """
import sys, torch
torch.ops.load_library(sys.argv[1])
assert torch.ops.build_probe.count(torch.zeros(2, 3)) == 6
assert torch._C._dispatch_has_kernel_for_dispatch_key("build_probe::count", "CUDA") == (sys.argv[2] == "cuda")
"""

PYTHON_FILES = {"mas_fast/__init__.py", "mas_fast/py.typed"}


@pytest.fixture
def tree(tmp_path):
    """A small project with the real build files, one op, for GPUs as well, and two files that only x86-64 compiles."""
    root = tmp_path / "tree"
    (root / "csrc/cuda").mkdir(parents=True)
    (root / "csrc/cpu").mkdir(parents=True)
    (root / "mas_fast").mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "csrc/module.cpp"):
        shutil.copy(ROOT / name, root / name)
    (root / "README.md").write_text("")
    (root / "mas_fast/__init__.py").write_text('__version__ = "1.2.3"\n')
    (root / "mas_fast/py.typed").touch()
    (root / "csrc/cpu/op.cpp").write_text(OP_SOURCE)
    (root / "csrc/cuda/op.cu").write_text(CUDA_SOURCE)
    (root / "csrc/cpu/op_avx2.cpp").write_text("")
    (root / "csrc/cpu/op_avx512.cpp").write_text("")
    return root


def run_backend(tree, hook, mode):
    """Run a PEP 517 hook as pip does, in a process of its own, and return that process."""
    script = f"from setuptools import build_meta; build_meta.{hook}({str(tree / 'wheels')!r})"
    (tree / "wheels").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=tree,
        env={**os.environ, "MAS_FAST_BUILD": mode},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def build_wheel(tree, mode):
    """Build a wheel and return (its path, the names in it outside of the metadata, what the build printed)."""
    shutil.rmtree(tree / "wheels", ignore_errors=True)
    done = run_backend(tree, "build_wheel", mode)
    assert done.returncode == 0, done.stdout
    (wheel,) = (tree / "wheels").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    return wheel, names, done.stdout


def unpacked(wheel, folder):
    """Unpack a wheel; return its library of ops, and what its _C says."""
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (library,) = (folder / "site/mas_fast").glob("_kernels.*")
    print_info = "import json, mas_fast._C; print(json.dumps(mas_fast._C.build_info()))"
    environ = {**os.environ, "PYTHONPATH": str(folder / "site")}
    output = subprocess.run(
        [sys.executable, "-c", print_info], cwd=folder, env=environ, check=True, stdout=subprocess.PIPE
    )
    return library, json.loads(output.stdout)


def plant_libraries(tree):
    """Put into the source tree what an earlier editable build with kernels leaves there."""
    planted = [
        tree / "mas_fast" / name for name in ("_kernels.so", "_kernels.dylib", "_C.cpython-310-x86_64-linux-gnu.so")
    ]
    for path in planted:
        path.write_text("stale")
    return planted


def test_the_package_under_test_is_the_one_asked_for():
    expected = Path(os.environ.get("MAS_FAST_TEST_SITE", ROOT)).resolve()
    assert PACKAGE_DIR == expected / "mas_fast"


def test_the_package_tells_type_checkers_that_it_is_annotated():
    assert (PACKAGE_DIR / "py.typed").is_file()


def test_the_build_under_test_runs_what_it_should():
    # `make test` says which build it tests; a bare `pytest` takes what it finds.
    build = os.environ.get("MAS_FAST_TEST_BUILD", "cpu" if ops.LIBRARY_PATH.exists() else "python")
    compiled = build in ("cpu", "cuda") or (build == "auto" and not MISSING)
    assert ops.LIBRARY_PATH.exists() == compiled
    if os.environ.get("MAS_FAST_KERNELS") != "reference":
        chosen = {row.implementation for row in ops.implementations() if row.device == "cpu"}
        assert all(name.startswith("C++") for name in chosen) if compiled else chosen == {"reference"}
        on_gpus = {row.implementation for row in ops.implementations() if row.device == "cuda"}
        assert "CUDA" in on_gpus if build == "cuda" else build == "auto" or "CUDA" not in on_gpus


@pytest.mark.parametrize("mode", ["auto", "python", "cpu", "cuda"])
def test_build_mode_is_taken_from_the_environment(mode):
    assert setup_script.build_mode({"MAS_FAST_BUILD": mode}) == mode


def test_build_mode_is_auto_unless_set():
    assert setup_script.build_mode({}) == "auto"


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("gpu", "MAS_FAST_BUILD must be one of auto, python, cpu, cuda, got 'gpu'"),
        ("", "MAS_FAST_BUILD must be one of auto, python, cpu, cuda, got ''"),
    ],
)
def test_build_mode_refuses(mode, message):
    with pytest.raises(SystemExit, match=message):
        setup_script.build_mode({"MAS_FAST_BUILD": mode})


@pytest.mark.parametrize(
    ("mode", "missing", "compiled"),
    [("auto", [], True), ("auto", ["ninja"], False), ("python", [], False), ("cpu", [], True), ("cuda", [], True)],
)
def test_what_is_missing_decides_only_in_auto_mode(mode, missing, compiled):
    assert setup_script.builds_kernels(mode, missing) is compiled


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_everything_that_is_missing_is_named(mode):
    message = rf"MAS_FAST_BUILD={mode} needs what was not found:\n  - ninja\n  - pybind11$"
    with pytest.raises(SystemExit, match=message):
        setup_script.builds_kernels(mode, ["ninja", "pybind11"])


@pytest.mark.parametrize(
    ("mode", "missing", "cuda_torch", "compiled"),
    [
        ("auto", [], True, True),
        ("auto", [], False, False),
        ("auto", ["nvcc"], True, False),
        ("cpu", [], True, False),
        ("cuda", [], False, True),
    ],
)
def test_cuda_is_compiled_where_it_is_asked_for_or_of_use(monkeypatch, mode, missing, cuda_torch, compiled):
    monkeypatch.setattr(setup_script, "torch_has_cuda", lambda: cuda_torch)
    assert setup_script.builds_cuda(mode, missing) is compiled


def test_a_cuda_build_of_torch_is_told_by_its_library(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_script, "find_torch_dir", lambda: tmp_path)
    assert not setup_script.torch_has_cuda()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libtorch_cuda.so").touch()
    assert setup_script.torch_has_cuda()


def test_nvcc_is_found_where_the_environment_says(tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Copyright 2005-2021; Cuda compilation tools, release 11.5, V11.5.119'\n")
    nvcc.chmod(0o755)
    assert setup_script.find_nvcc({"CUDA_HOME": str(tmp_path)}) == str(nvcc)
    assert setup_script.find_nvcc({"PATH": str(nvcc.parent)}) == str(nvcc)
    assert setup_script.find_nvcc({"CUDACXX": str(nvcc)}) == str(nvcc)
    assert setup_script.find_nvcc({"CUDACXX": str(tmp_path / "absent"), "PATH": str(nvcc.parent)}) is None
    assert setup_script.missing_for_cuda({"CUDACXX": str(nvcc)}) == [
        f"nvcc >= 12.0: {nvcc} is 11.5; set CUDACXX to another"
    ]


def test_cuda_kernels_need_linux_and_nvcc(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(setup_script, "find_nvcc", lambda environ: None)
    assert setup_script.missing_for_cuda({}) == [
        "Linux: the CUDA kernels are not built on darwin",
        "nvcc >= 12.0: install the CUDA toolkit, or set CUDACXX or CUDA_HOME to where it is",
    ]


@pytest.fixture
def complete_machine(monkeypatch):
    """A machine on which every probe of setup.py succeeds; tests take one thing away."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(setup_script, "find_compiler", lambda environ: "c++")
    monkeypatch.setattr(setup_script, "find_tool", lambda name: f"/bin/{name}")
    monkeypatch.setattr(setup_script, "tool_version", lambda command: (3, 25))
    monkeypatch.setattr(setup_script, "find_pybind11_dir", lambda: "/pybind11")
    monkeypatch.setattr(setup_script, "has_python_headers", lambda: True)
    monkeypatch.setattr(setup_script, "torch_version", lambda: "2.10.0+cpu")
    monkeypatch.setattr(setup_script, "find_torch_dir", lambda: Path("/torch"))


def test_nothing_is_missing_on_a_complete_machine(complete_machine):
    assert setup_script.missing_for_kernels({}) == []


@pytest.mark.parametrize(
    ("name", "replacement", "line"),
    [
        (
            "find_compiler",
            lambda environ: None,
            r"a C\+\+20 compiler: tried c\+\+, g\+\+, clang\+\+; install .* or set CXX",
        ),
        ("find_tool", lambda name: None if name == "cmake" else "/bin/ninja", "cmake >= 3.25: pip install cmake"),
        ("tool_version", lambda command: (3, 9), "cmake >= 3.25: /bin/cmake is 3.9"),
        ("find_tool", lambda name: None if name == "ninja" else "/bin/cmake", "ninja: pip install ninja"),
        ("find_pybind11_dir", lambda: None, "pybind11: pip install pybind11"),
        ("has_python_headers", lambda: False, "Python.h: install"),
        (
            "torch_version",
            lambda: "2.9.1",
            "torch >= 2.10 with its headers: pip install torch, .* --no-build-isolation",
        ),
        ("find_torch_dir", lambda: None, "torch >= 2.10 with its headers: pip install torch, .* --no-build-isolation"),
    ],
)
def test_each_missing_thing_is_one_line_with_the_way_out(complete_machine, monkeypatch, name, replacement, line):
    monkeypatch.setattr(setup_script, name, replacement)
    (missing,) = setup_script.missing_for_kernels({})
    with pytest.raises(SystemExit, match=line):
        setup_script.builds_kernels("cpu", [missing])


def test_an_unsupported_platform_is_missing(complete_machine, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert setup_script.missing_for_kernels({}) == ["Linux or macOS: the kernels are not built on win32"]


def test_a_compiler_is_tried_not_trusted(tmp_path):
    too_old = tmp_path / "g++"
    too_old.write_text("#!/bin/sh\nexit 1\n")
    too_old.chmod(0o755)
    assert setup_script.find_compiler({"CXX": str(too_old)}) is None
    assert setup_script.find_compiler({"CXX": str(tmp_path / "absent")}) is None


@needs_tools
def test_a_real_compiler_is_found():
    assert setup_script.find_compiler(os.environ) is not None


@pytest.mark.parametrize(
    ("text", "version"), [("2.13.0+cpu", (2, 13)), ("cmake version 3.25.1", (3, 25)), ("4.4.4", (4, 4)), ("", (0, 0))]
)
def test_version_of(text, version):
    assert setup_script.version_of(text) == version


@pytest.mark.slow
def test_a_python_wheel_holds_no_library_and_no_removed_module(tree):
    planted = plant_libraries(tree)
    removed = tree / "build/lib/mas_fast/removed.py"
    removed.parent.mkdir(parents=True)
    removed.write_text("")
    wheel, names, output = build_wheel(tree, "python")
    assert wheel.name == "mas_fast-1.2.3-py3-none-any.whl"
    assert names == PYTHON_FILES
    assert "Python-only build, as MAS_FAST_BUILD=python asks" in output
    # A wheel is built for somebody else: the tree's own editable build stays usable.
    assert all(path.exists() for path in planted)


@pytest.mark.slow
def test_an_editable_python_build_removes_stale_libraries(tree):
    planted = plant_libraries(tree)
    done = run_backend(tree, "build_editable", "python")
    assert done.returncode == 0, done.stdout
    assert not any(path.exists() for path in planted)


@pytest.mark.slow
def test_auto_mode_without_a_compiler_builds_for_python_and_says_why(tree, monkeypatch):
    monkeypatch.setenv("CXX", "absent-compiler")
    wheel, names, output = build_wheel(tree, "auto")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert names == PYTHON_FILES
    assert "Python-only build; the compiled kernels need what was not found:" in output
    assert "  - a C++20 compiler: tried absent-compiler;" in output


@pytest.mark.slow
def test_cpu_mode_without_a_compiler_is_an_error(tree, monkeypatch):
    monkeypatch.setenv("CXX", "absent-compiler")
    done = run_backend(tree, "build_wheel", "cpu")
    assert done.returncode != 0
    assert "MAS_FAST_BUILD=cpu needs what was not found:\n  - a C++20 compiler: tried absent-compiler" in done.stdout


@pytest.mark.slow
def test_cuda_mode_without_nvcc_is_an_error(tree, monkeypatch):
    monkeypatch.setenv("CUDACXX", "absent-nvcc")
    done = run_backend(tree, "build_wheel", "cuda")
    assert done.returncode != 0
    assert "MAS_FAST_BUILD=cuda needs what was not found:\n" in done.stdout
    assert "  - nvcc >= 12.0: install the CUDA toolkit" in done.stdout


@needs_cuda_tools
@pytest.mark.slow
def test_a_cuda_wheel_loads_without_a_gpu(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDAARCHS", "90")
    wheel, _, output = build_wheel(tree, "cuda")
    assert "mas_fast: compiling the CPU and CUDA kernels" in output
    library, info = unpacked(wheel, tmp_path)
    subprocess.run([sys.executable, "-c", LOAD_OP, str(library), "cuda"], check=True)
    assert info["build"] == "cuda"
    assert info["cuda_architectures"] == ["90"]
    assert info["cuda_compiler"].startswith("nvcc ")


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_a_failing_compile_is_an_error_with_the_way_out(tree, mode):
    (tree / "csrc/cpu/op.cpp").write_text("#error broken on purpose\n")
    done = run_backend(tree, "build_wheel", mode)
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout
    assert "MAS_FAST_BUILD=python installs the package without compiled kernels" in done.stdout


@needs_tools
@pytest.mark.slow
def test_switching_modes_back_and_forth_leaves_nothing_behind(tree, tmp_path):
    wheel, names, _ = build_wheel(tree, "auto")
    libraries = sorted(names - PYTHON_FILES)
    assert [Path(name).name.split(".")[0] for name in libraries] == ["_C", "_kernels"]
    assert wheel.name.startswith(f"mas_fast-1.2.3-cp{sys.version_info[0]}{sys.version_info[1]}-")
    assert build_wheel(tree, "python")[1] == PYTHON_FILES
    wheel, again, _ = build_wheel(tree, "cpu")
    assert again == names

    # The library of the last wheel works, and _C says what is in it.
    library, info = unpacked(wheel, tmp_path)
    subprocess.run([sys.executable, "-c", LOAD_OP, str(library), "cpu"], check=True)
    assert info["version"] == "1.2.3"
    assert info["build"] == "cpu"
    assert info["cuda_architectures"] == []
    assert info["oldest_torch"] == "2.10"
    assert info["torch"] == setup_script.torch_version()
    is_x86 = info["architecture"] in ("x86_64", "AMD64")
    assert info["instruction_sets"] == (["baseline", "avx2", "avx512"] if is_x86 else ["baseline"])


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "variants"), [("x86_64", {"op_avx2.cpp", "op_avx512.cpp"}), ("aarch64", set())])
def test_the_architecture_decides_which_files_are_compiled(tree, arch, variants):
    configure = [setup_script.find_tool("cmake"), "-S", tree, "-B", tree / "build", "-G", "Ninja"]
    configure += [
        f"-DCMAKE_MAKE_PROGRAM={setup_script.find_tool('ninja')}",
        f"-DMAS_FAST_ARCH={arch}",
        f"-DMAS_FAST_TORCH_DIR={setup_script.find_torch_dir()}",
        f"-Dpybind11_DIR={setup_script.find_pybind11_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    commands = json.loads((tree / "build/compile_commands.json").read_text())
    command_of = {Path(entry["file"]).name: entry["command"] for entry in commands}
    assert set(command_of) == {"op.cpp", "module.cpp"} | variants
    assert "TORCH_TARGET_VERSION=0x020a000000000000" in command_of["op.cpp"]
    assert " -mavx" not in command_of["op.cpp"]
    assert " -march" not in " ".join(command_of.values())
    for variant in variants:
        flag = "-mavx512f" if "512" in variant else "-mavx2"
        assert flag in command_of[variant].split()
