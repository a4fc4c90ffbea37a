"""Drive CMake, the only build recipe of the compiled kernels; everything else about the package is in pyproject.toml.

The environment variable MAS_FAST_BUILD chooses what is built:

- ``auto`` (default): the CPU kernels if everything they need is found, otherwise Python only, saying what is missing;
  the CUDA kernels too, if nvcc is found and the installed torch is a CUDA build.
- ``python``: nothing is compiled; every op runs on its plain-torch reference.
- ``cpu``: the CPU kernels; anything missing is an error.
- ``cuda``: the CPU and CUDA kernels; anything missing is an error. Neither a GPU nor a CUDA build of torch is needed.

A compile that fails is an error in every mode: it would otherwise hide behind a slower package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "python", "cpu", "cuda")
OLDEST_TORCH = (2, 10)
OLDEST_CMAKE = (3, 25)
OLDEST_SETUPTOOLS = (77, 0)
OLDEST_NVCC = (12, 0)
KERNELS = "mas_fast._kernels"

# <bit> with std::bit_cast is the youngest part of C++20 that the kernels rely on: g++ 11, clang 14.
CXX20_PROBE = """
#include <bit>
#include <concepts>
#include <cstdint>
#include <span>
static_assert(std::bit_cast<std::uint32_t>(1.0f) == 0x3f800000u);
"""


def build_mode(environ: Mapping[str, str]) -> str:
    """Return the value of MAS_FAST_BUILD, or exit with an error that names the allowed ones."""
    mode = environ.get("MAS_FAST_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"MAS_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def find_tool(name: str) -> str | None:
    """Return the path of a command, preferring the one installed beside this Python (pip install cmake ninja)."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def cxx_candidates(environ: Mapping[str, str]) -> list[str]:
    """Return the compiler commands to try: CXX alone if it is set, as in CMake."""
    return [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]


def compiles_cxx20(command: str) -> bool:
    """Try the compiler on a few lines, because its name and version say little about its standard library."""
    try:
        probe = [*shlex.split(command), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        return subprocess.run(probe, input=CXX20_PROBE, text=True, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """Return the first compiler command that handles C++20, or None."""
    return next((command for command in cxx_candidates(environ) if compiles_cxx20(command)), None)


def find_torch_dir() -> Path | None:
    """Return torch's folder if its stable-ABI headers and its library are there; looked up without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    has_headers = (folder / "include/torch/csrc/stable/library.h").is_file()
    return folder if has_headers and any((folder / "lib").glob("libtorch_cpu.*")) else None


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Return the path of the CUDA compiler: CUDACXX as in CMake, on the path, or where CUDA is usually installed."""
    if environ.get("CUDACXX"):
        return shutil.which(environ["CUDACXX"])
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    folders = [environ.get("PATH", ""), *(os.path.join(home, "bin") for home in [*homes, "/usr/local/cuda"])]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def torch_has_cuda() -> bool:
    """Return whether the installed torch is a CUDA build; whether this machine has a GPU is not asked."""
    folder = find_torch_dir()
    return folder is not None and any((folder / "lib").glob("libtorch_cuda.*"))


def find_pybind11_dir() -> str | None:
    """Return the folder of pybind11's CMake configuration, or None."""
    if importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    return pybind11.get_cmake_dir()


def version_of(text: str) -> tuple[int, int]:
    """Return (major, minor) of the first version number in a text; (0, 0) without one."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def torch_version() -> str:
    """Return the version of the torch installed for this Python, or '0.0'."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "0.0"


def tool_version(command: str) -> tuple[int, int]:
    """Return (major, minor) of what `command --version` prints; of nvcc, of its release, which is not named first."""
    text = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    return version_of(text.split("release", 1)[-1])


def has_python_headers() -> bool:
    """Return whether this Python came with the headers that an extension module needs."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def missing_for_kernels(environ: Mapping[str, str]) -> list[str]:
    """Return one line for each thing that the CPU kernels need and this machine does not have."""
    missing = []
    if not sys.platform.startswith(("linux", "darwin")):
        missing.append(f"Linux or macOS: the kernels are not built on {sys.platform}")
    if find_compiler(environ) is None:
        tried = ", ".join(cxx_candidates(environ))
        missing.append(f"a C++20 compiler: tried {tried}; install g++ >= 11 or clang >= 14, or set CXX")
    cmake = find_tool("cmake")
    if cmake is None:
        missing.append("cmake >= 3.25: pip install cmake")
    elif tool_version(cmake) < OLDEST_CMAKE:
        missing.append(f"cmake >= 3.25: {cmake} is {'.'.join(map(str, tool_version(cmake)))}; pip install cmake")
    if find_tool("ninja") is None:
        missing.append("ninja: pip install ninja")
    if find_pybind11_dir() is None:
        missing.append("pybind11: pip install pybind11")
    if not has_python_headers():
        missing.append("Python.h: install your system's python3-dev or python3-devel package")
    if version_of(torch_version()) < OLDEST_TORCH or find_torch_dir() is None:
        missing.append(
            "torch >= 2.10 with its headers: pip install torch, then build mas_fast with --no-build-isolation "
            "(pip's isolated build does not see the installed torch)"
        )
    return missing


def missing_for_cuda(environ: Mapping[str, str]) -> list[str]:
    """Return one line for each thing that the CUDA kernels need beyond the CPU kernels and this machine lacks."""
    missing = []
    if not sys.platform.startswith("linux"):
        missing.append(f"Linux: the CUDA kernels are not built on {sys.platform}")
    nvcc = find_nvcc(environ)
    if nvcc is None:
        missing.append("nvcc >= 12.0: install the CUDA toolkit, or set CUDACXX or CUDA_HOME to where it is")
    elif tool_version(nvcc) < OLDEST_NVCC:
        missing.append(f"nvcc >= 12.0: {nvcc} is {'.'.join(map(str, tool_version(nvcc)))}; set CUDACXX to another")
    return missing


def builds_kernels(mode: str, missing: list[str]) -> bool:
    """Return whether this build compiles the kernels; exit with an error if they were asked for and cannot be had."""
    if mode in ("cpu", "cuda") and missing:
        raise SystemExit(f"MAS_FAST_BUILD={mode} needs what was not found:\n" + as_lines(missing))
    return mode != "python" and not missing


def builds_cuda(mode: str, missing_cuda: list[str]) -> bool:
    """Return whether a build that compiles the CPU kernels compiles the CUDA kernels as well."""
    return mode == "cuda" or (mode == "auto" and not missing_cuda and torch_has_cuda())


def as_lines(items: list[str]) -> str:
    """Return the items as an indented list, one a line."""
    return "\n".join(f"  - {item}" for item in items)


def remove_compiled(package_dir: Path) -> None:
    """Remove the compiled libraries that an earlier editable build left in the source tree."""
    for pattern in ("_kernels.so", "_kernels.dylib", "_C.*.so"):
        for path in package_dir.glob(pattern):
            path.unlink()


class Build(build):
    """Run build_ext in Python-only builds too: it says what is missing and removes what must not be there."""

    sub_commands = [(name, None if name == "build_ext" else test) for name, test in build.sub_commands]

    def run(self) -> None:
        # setuptools never removes from its staging folder a module that the sources no longer have.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Build both extensions with one CMake run."""

    def run(self) -> None:
        if self.editable_mode:
            remove_compiled(ROOT / "mas_fast")
        if self.extensions:
            print(f"mas_fast: compiling the {KERNELS_TEXT} kernels", flush=True)
        elif MISSING:
            print(
                f"mas_fast: Python-only build; the compiled kernels need what was not found:\n{as_lines(MISSING)}",
                flush=True,
            )
        else:
            print("mas_fast: Python-only build, as MAS_FAST_BUILD=python asks", flush=True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        # The op library is loaded by torch, not imported, and serves every Python version: no tag in its name.
        if fullname.endswith("_kernels"):
            return str(Path(*fullname.split("."))) + (".dylib" if sys.platform == "darwin" else ".so")
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        cmake, ninja, compiler = find_tool("cmake"), find_tool("ninja"), find_compiler(os.environ)
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "MAS_FAST_VERSION": self.distribution.get_version(),
            "MAS_FAST_TORCH_DIR": find_torch_dir(),
            "MAS_FAST_TORCH_VERSION": torch_version(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": find_pybind11_dir(),
        }
        if WITH_CUDA:
            settings |= {"MAS_FAST_CUDA": "ON", "CMAKE_CUDA_COMPILER": find_nvcc(os.environ)}
        # --fresh forgets another environment's settings; ninja still rebuilds only what changed.
        configure = [cmake, "--fresh", "-S", ROOT, "-B", folder, "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        destination = Path(self.build_lib, "mas_fast").resolve()
        environ = {**os.environ, "CXX": compiler}
        for command in (configure, [cmake, "--build", folder], [cmake, "--install", folder, "--prefix", destination]):
            done = subprocess.run([str(word) for word in command], env=environ, check=False)
            if done.returncode != 0:
                failed = shlex.join(str(word) for word in command[:3])
                raise SystemExit(
                    f"mas_fast: the {KERNELS_TEXT} kernels failed to build: '{failed} …' "
                    f"exited with {done.returncode}; its output is above (pip shows it with -v). "
                    + ("MAS_FAST_BUILD=cpu leaves out the CUDA kernels. " if WITH_CUDA else "")
                    + "MAS_FAST_BUILD=python installs the package without compiled kernels."
                )


MISSING: list[str] = []
WITH_CUDA = False
KERNELS_TEXT = "CPU"

if __name__ == "__main__":
    if version_of(setuptools.__version__) < OLDEST_SETUPTOOLS:
        # Without build isolation pip does not look at build-system.requires, and a new environment may hold an old one.
        raise SystemExit(f"setuptools must be >= 77, got {setuptools.__version__}: pip install --upgrade setuptools")
    mode = build_mode(os.environ)
    MISSING = [] if mode == "python" else missing_for_kernels(os.environ)
    missing_cuda = missing_for_cuda(os.environ) if mode in ("auto", "cuda") else []
    compiled = builds_kernels(mode, MISSING + (missing_cuda if mode == "cuda" else []))
    WITH_CUDA = compiled and builds_cuda(mode, missing_cuda)
    KERNELS_TEXT = "CPU and CUDA" if WITH_CUDA else "CPU"
    setup(
        cmdclass={"build": Build, "build_ext": CMakeBuild},
        ext_modules=[Extension(KERNELS, []), Extension("mas_fast._C", [])] if compiled else [],
    )
