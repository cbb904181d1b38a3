/*
The Python module fastppo._C: registers every op's schema, tells the facts of this build.

To add an op, for example gae:
  1. fastppo/reference/gae.py   the function in plain torch: its definition.
  2. csrc/schemas.h             its schema. (a!) marks exactly what it writes.
  3. csrc/gae.h                 the formula as templates over float or a vector register, and check_gae().
  4. csrc/cpu/vec/gae.{h,cpp}   the loops on raw pointers (no torch but ATen/cpu/vec); FASTPPO_KERNEL declares them.
  5. csrc/cpu/gae.cpp           check, allocate, split over threads, FASTPPO_PICK the loops, register. "gae" joins
                                CONCEPTS in CMakeLists.txt.
  6. csrc/cuda/gae.{cuh,cu}     kernels; launcher and registration. csrc/cuda/README.md says how.
  7. fastppo/ops/gae.py         the public function with its docstring, the fake, the gradient.
  8. tests/ops/test_gae.py and bench/gae.py.

Threads only ever change who computes a block, never what is in it (cpu/rows.h), so sums keep their order.
*/
#include "cpu/capability.h"
#include "schemas.h"

#include <sstream>
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

STABLE_TORCH_LIBRARY(fastppo, m) { fastppo::define_ops(m); }

namespace {

pybind11::list split(const std::string& text) {
  pybind11::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    parts.append(part);
  }
  return parts;
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

} // namespace

PYBIND11_MODULE(_C, m) {
  if (const auto& error = fastppo::capability_error(); !error.empty()) {
    throw std::runtime_error(error);
  }
  m.doc() = "Registers the ops under torch.ops.fastppo; holds the facts of this build.";
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["torch"] = FASTPPO_TORCH_VERSION;
    facts["compiler"] = compiler();
    facts["instruction_sets"] = split(FASTPPO_INSTRUCTION_SETS);
    facts["cuda"] = FASTPPO_CUDA_CHOICE;
    facts["cuda_archs"] = split(FASTPPO_CUDA_ARCHS);
    return facts;
  });
  m.def("cpu_capability", [] { return fastppo::capability_name(fastppo::active_capability()); });
}
