// The extension module arfast._C: an empty Python module whose loading registers the ops, and the namespace's build
// facts.
#include <Python.h>

#include "binding/tensor.h"
#include "core/cpu_target.h"
#include "core/parallel.h"

namespace arfast {
namespace {

#ifndef ARFAST_CUDA_ARCHITECTURES
#define ARFAST_CUDA_ARCHITECTURES ""
#endif

void torch_parallel_for_adapter(int64_t begin, int64_t end, int64_t grain, RangeFunction f, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, f, context));
}

const bool parallel_for_installed = [] {
  set_parallel_for(torch_parallel_for_adapter);
  return true;
}();

// "cpu target;cuda architectures": what `arfast info` prints of the build.
std::string build_info() { return std::string(cpu_target_name()) + ";" + ARFAST_CUDA_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY(arfast, m) { m.def("build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

}  // namespace arfast

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
