// SPDX-License-Identifier: Apache-2.0
// fastflow._cuda: addresses, strides, sizes and a stream in, nothing of torch.
#include "../reader.h"
#include "kernels.h"

namespace fastflow {
namespace {

struct Request {
  Call call;
  float* scratch;
  Stream stream;
};

// numbers end with the address of the scratch, the device and the stream.
Request parse(const py::tuple& tensors, const py::tuple& numbers) {
  Request request;
  Reader n(numbers, NUMBERS + 3, "numbers");
  read_arguments(request.call, tensors, n);
  request.scratch = reinterpret_cast<float*>(n.address());
  request.stream.device = n.small();
  request.stream.handle = n.address();
  return request;
}

void check(int error, const char* what) {
  if (error) throw std::runtime_error(std::string(what) + " could not be launched: " + error_text(error));
}

void step(const py::tuple& tensors, const py::tuple& numbers) {
  const Request request = parse(tensors, numbers);
  check(step_on(request.call, request.scratch, request.stream), "step");
}

void log_prob_backward(const py::tuple& tensors, const py::tuple& numbers) {
  const Request request = parse(tensors, numbers);
  check(log_prob_backward_on(request.call, request.scratch, request.stream), "log_prob_backward");
}

void matching(const py::tuple& tensors, const py::tuple& numbers) {
  const Request request = parse(tensors, numbers);
  check(matching_on(request.call, request.scratch, request.stream), "matching");
}

void matching_backward(const py::tuple& tensors, const py::tuple& numbers) {
  const Request request = parse(tensors, numbers);
  check(matching_backward_on(request.call, request.scratch, request.stream), "matching_backward");
}

// numbers end with the device and the stream.
void policy_rows(const py::tuple& addresses, const py::tuple& numbers) {
  PolicyCall call;
  Stream stream;
  Reader n(numbers, POLICY_NUMBERS + 2, "numbers");
  read_policy(call, addresses, n);
  stream.device = n.small();
  stream.handle = n.address();
  check(policy_rows_on(call, stream), "policy_rows");
}

// Why a device cannot run the kernels; None if it can.
py::object refusal(int device) {
  const int error = load_on(device);
  return error ? py::object(py::str(error_text(error))) : py::object(py::none());
}

}  // namespace

PYBIND11_MODULE(FASTFLOW_MODULE, module) {
  module.doc() = "Kernels of the cuda backend. Private: fastflow.backends.cuda checks what it passes.";
  module.def("step", &step, py::arg("tensors"), py::arg("numbers"));
  module.def("log_prob_backward", &log_prob_backward, py::arg("tensors"), py::arg("numbers"));
  module.def("matching", &matching, py::arg("tensors"), py::arg("numbers"));
  module.def("matching_backward", &matching_backward, py::arg("tensors"), py::arg("numbers"));
  module.def("policy_rows", &policy_rows, py::arg("addresses"), py::arg("numbers"));
  module.def("scratch_words", &scratch_words_of, py::arg("backward"), py::arg("batch"), py::arg("numel"),
             py::arg("groups"), py::arg("clamp"), py::arg("means"), "Four-byte words of scratch that a call needs.");
  module.def("matching_words", &matching_words_of, py::arg("batch"), py::arg("numel"),
             "Four-byte words of scratch that the means of a matching loss need.");
  module.def("refusal", &refusal, py::arg("device"));
  module.def("architectures", &architectures, "What the module was compiled for.");
  module.attr("TILE") = py::int_(TILE);
  module.attr("WHOLE_TILES") = py::int_(WHOLE_TILES);
}

}  // namespace fastflow
