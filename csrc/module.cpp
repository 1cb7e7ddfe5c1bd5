// torchops._C: introspection only. No tensor passes here: a pybind call breaks torch.compile.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/build_info.h"

namespace {

using torchops::Isa;

constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx};

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (torchops::isa_supported(isa)) names.emplace_back(torchops::isa_name(isa));
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == torchops::isa_name(isa) && torchops::set_isa(isa)) return;
  }
  std::string known;
  for (const std::string& isa : supported_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw pybind11::value_error("torchops: CPU ISA '" + name +
                              "' is not available here; expected one of: " + known);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the compiled library";
  m.attr("TORCH_TARGET") = TORCHOPS_TORCH_TARGET;
  m.attr("TORCH_BUILT_AGAINST") = TORCHOPS_TORCH_BUILT_AGAINST;
  m.attr("CUDA_ARCHS") = TORCHOPS_CUDA_ARCHS;
  m.attr("ISAS") = TORCHOPS_ISAS;
  m.attr("COMPILER") = TORCHOPS_COMPILER;
  m.attr("BUILD_TYPE") = TORCHOPS_BUILD_TYPE;
  m.def(
      "cpu_isa", [] { return std::string(torchops::isa_name(torchops::active_isa())); },
      "Name of the ISA whose kernels run");
  m.def("cpu_isas", &supported_isas, "ISAs compiled in that this CPU has");
  m.def("set_cpu_isa", &set_cpu_isa, "Run the kernels of another ISA from now on");
}
