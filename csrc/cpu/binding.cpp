// SPDX-License-Identifier: Apache-2.0
// fastflow._cpu: addresses, strides and sizes in, nothing of torch.
#include "../reader.h"
#include "dispatch.h"
#include "policy.h"

namespace fastflow {
namespace {

const Kernels* active = nullptr;

Call parse(const py::tuple& tensors, const py::tuple& numbers) {
  Call call;
  Reader n(numbers, NUMBERS + 1, "numbers");
  read_arguments(call, tensors, n);
  call.threads = n.small();
  return call;
}

void step(const py::tuple& tensors, const py::tuple& numbers) {
  const Call call = parse(tensors, numbers);
  const py::gil_scoped_release release;
  active->step(call);
}

void log_prob_backward(const py::tuple& tensors, const py::tuple& numbers) {
  const Call call = parse(tensors, numbers);
  const py::gil_scoped_release release;
  active->log_prob_backward(call);
}

void policy_rows(const py::tuple& addresses, const py::tuple& numbers) {
  PolicyCall call;
  Reader n(numbers, POLICY_NUMBERS, "numbers");
  read_policy(call, addresses, n);
  policy(call);
}

void matching(const py::tuple& tensors, const py::tuple& numbers) {
  const Call call = parse(tensors, numbers);
  const py::gil_scoped_release release;
  active->matching(call);
}

void matching_backward(const py::tuple& tensors, const py::tuple& numbers) {
  const Call call = parse(tensors, numbers);
  const py::gil_scoped_release release;
  active->matching_backward(call);
}

py::tuple isas() {
  py::list names;
  for (const Kernels* kernels : supported_kernels()) names.append(kernels->name);
  return py::tuple(names);
}

void set_isa(const std::string& name) {
  for (const Kernels* kernels : supported_kernels())
    if (name == kernels->name) {
      active = kernels;
      return;
    }
  throw py::value_error("name: wanted one of isas(), got " + name);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  active = supported_kernels().front();
  module.doc() = "Kernels of the cpu backend. Private: fastflow.backends.cpu checks what it passes.";
  module.def("step", &step, py::arg("tensors"), py::arg("numbers"));
  module.def("log_prob_backward", &log_prob_backward, py::arg("tensors"), py::arg("numbers"));
  module.def("matching", &matching);
  module.def("matching_backward", &matching_backward);
  module.def("policy_rows", &policy_rows, py::arg("addresses"), py::arg("numbers"));
  module.def("isas", &isas, "Instruction sets that this machine supports, best first.");
  module.def("isa", [] { return active->name; });
  module.def("set_isa", &set_isa, py::arg("name"), "For tests: every set gives the same bits.");
}

}  // namespace fastflow
