// The Python module mas_fast._C: what was compiled, so that `python -m mas_fast doctor` and a bug report can say it.
// The ops are not here: they live in the library _kernels, which knows nothing of Python. Every MAS_FAST_* value is set
// by CMakeLists.txt.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

namespace py = pybind11;

namespace {

py::tuple split_commas(const std::string& text) {
  py::list items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) items.append(item);
  return py::tuple(items);
}

// "2.10" for 0x020a000000000000: one byte each for major and minor.
std::string torch_version_text(std::uint64_t version) {
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

py::dict build_info() {
  py::dict info;
  info["version"] = MAS_FAST_VERSION;
  const py::tuple cuda_architectures = split_commas(MAS_FAST_CUDA_ARCHITECTURES);
  info["build"] = cuda_architectures.empty() ? "cpu" : "cuda";
  info["compiler"] = MAS_FAST_COMPILER;
  info["build_type"] = MAS_FAST_BUILD_TYPE;
  info["architecture"] = MAS_FAST_ARCHITECTURE;
  info["instruction_sets"] = split_commas(MAS_FAST_INSTRUCTION_SETS);
  info["cuda_compiler"] = MAS_FAST_CUDA_COMPILER;
  info["cuda_architectures"] = cuda_architectures;
  info["torch"] = MAS_FAST_TORCH_VERSION;
  info["oldest_torch"] = torch_version_text(MAS_FAST_TORCH_TARGET_VERSION);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the compiled part of mas_fast was built from.";
  m.def("build_info", &build_info,
        "Return how the compiled library was built: version, build (cpu or cuda), compiler, build_type,\n"
        "architecture, instruction_sets, cuda_compiler and cuda_architectures (empty without CUDA), torch (built\n"
        "against) and oldest_torch (it runs on).");
}
