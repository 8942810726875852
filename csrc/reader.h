// SPDX-License-Identifier: Apache-2.0
// What the binding files of the modules share: a call as tuples of Python numbers, read from left to right.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "arguments.h"
#include "policy.h"

namespace fastflow {

namespace py = pybind11;

class Reader {
 public:
  Reader(const py::tuple& values, Py_ssize_t expected, const char* name) : values_(values.ptr()) {
    if (PyTuple_GET_SIZE(values_) != expected)
      throw py::type_error(std::string(name) + ": wanted " + std::to_string(expected) + " entries, got " +
                           std::to_string(PyTuple_GET_SIZE(values_)));
  }
  PyObject* object() { return PyTuple_GET_ITEM(values_, next_++); }
  int64_t integer() {
    const long long value = PyLong_AsLongLong(object());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  double real() {
    const double value = PyFloat_AsDouble(object());
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  int small() { return static_cast<int>(integer()); }
  char* address() { return reinterpret_cast<char*>(integer()); }

 private:
  PyObject* values_;
  Py_ssize_t next_ = 0;
};

// None, or (address, row stride in elements, dtype).
inline Tensor read_tensor(PyObject* entry) {
  Tensor out;
  if (entry == Py_None) return out;
  Reader reader(py::reinterpret_borrow<py::tuple>(entry), 3, "tensor");
  out.data = reader.address();
  out.stride = reader.integer();
  out.dtype = reader.small();
  return out;
}

constexpr Py_ssize_t TENSORS = 29, NUMBERS = 14;

// The tensors of a call, and the first NUMBERS of its numbers.
inline void read_arguments(Arguments& call, const py::tuple& tensors, Reader& n) {
  Reader t(tensors, TENSORS, "tensors");
  for (Tensor* slot : {&call.sample, &call.velocity, &call.uncond, &call.coef, &call.scale, &call.noise, &call.seeds,
                       &call.step, &call.given, &call.mask, &call.ref_velocity, &call.ref_uncond, &call.old_mean,
                       &call.rows, &call.next_sample, &call.log_prob, &call.clean, &call.ode_next, &call.mean,
                       &call.flags, &call.shift, &call.drift, &call.grad, &call.grad_shift, &call.grad_drift,
                       &call.grad_velocity, &call.grad_uncond, &call.means, &call.grad_means})
    *slot = read_tensor(t.object());
  call.batch = n.integer();
  call.numel = n.integer();
  call.sources = n.integer();
  call.rescale = n.small();
  call.outer = n.integer();
  call.channels = n.integer();
  call.inner = n.integer();
  call.stream = static_cast<uint32_t>(n.integer());
  call.offset = n.integer();
  call.score = n.small();
  call.reduce = n.small();
  call.score_rounded = n.small();
  call.next_dtype = n.small();
  call.beta = static_cast<float>(n.real());
}

constexpr Py_ssize_t POLICY_TENSORS = 9, POLICY_NUMBERS = 9;

// The tensors of a policy loss, addresses or 0, and the first POLICY_NUMBERS of its numbers.
inline void read_policy(PolicyCall& call, const py::tuple& addresses, Reader& n) {
  Reader a(addresses, POLICY_TENSORS, "addresses");
  for (const float** slot : {&call.log_prob, &call.shift, &call.drift, &call.old_log_prob, &call.advantage,
                             &call.weight, &call.coef})
    *slot = reinterpret_cast<const float*>(a.address());
  for (float** slot : {&call.info, &call.rows}) *slot = reinterpret_cast<float*>(a.address());
  call.batch = n.integer();
  call.coef_stride = n.integer();
  call.gaussian = n.small();
  for (double* term : {&call.terms.below, &call.terms.above, &call.terms.kl_weight, &call.terms.divergence})
    *term = n.real();
  call.terms.objective = n.small();
  call.terms.kl = n.small();
}

}  // namespace fastflow
