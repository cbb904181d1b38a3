/*
Checks that name the op, the tensor, what was expected and what arrived:

  gae: values must have shape (4, 128) like rewards, got (4, 129)

Each op has one check_<op>() in csrc/<concept>.h, and every backend calls it first. Failures are thrown as
std::invalid_argument, which Python sees as a ValueError.
*/
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace fastppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Throws "<op>: <parts...>".
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// The same unless the condition holds. Parts are made in any case: where that takes time, as a shape's text does (a
// quarter of a microsecond, twice per tensor), ask first and fail() then.
template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    fail(op, parts...);
  }
}

// As Python prints a tuple: (), (4,), (4, 128).
inline std::string shape_text(Sizes sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) {
    text << (i ? ", " : "") << sizes[i];
  }
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline bool same_sizes(Sizes a, Sizes b) {
  if (a.size() != b.size()) {
    return false;
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) {
      return false;
    }
  }
  return true;
}

inline std::string device_text(const Tensor& x) {
  const auto device = x.device();
  std::ostringstream text;
  text << (device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device");
  if (!device.is_cpu()) {
    text << ':' << device.index();
  }
  return text.str();
}

// x has the number of dimensions of the described shape, for example 2 for "(B, T)".
inline void check_dim(const char* op, const char* name, const Tensor& x, int64_t dim, const char* described) {
  if (x.dim() != dim) [[unlikely]] {
    fail(op, name, " must have shape ", described, ", got ", shape_text(x.sizes()));
  }
}

inline void check_shape(const char* op, const char* name, const Tensor& x, Sizes expected, const char* like) {
  if (!same_sizes(x.sizes(), expected)) [[unlikely]] {
    fail(op, name, " must have shape ", shape_text(expected), " like ", like, ", got ", shape_text(x.sizes()));
  }
}

inline void check_floating(const char* op, const char* name, const Tensor& x) {
  const auto dtype = x.scalar_type();
  check(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, name,
      " must be float32, bfloat16 or float16, got ", dtype_text(dtype));
}

inline void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType expected) {
  check(
      x.scalar_type() == expected, op, name, " must be ", dtype_text(expected), ", got ", dtype_text(x.scalar_type()));
}

inline void check_device(const char* op, const char* name, const Tensor& x, const Tensor& other, const char* like) {
  if (x.device() != other.device()) [[unlikely]] {
    fail(op, name, " must be on ", device_text(other), " like ", like, ", got ", device_text(x));
  }
}

// A floating tensor with the shape and device of another.
inline void check_like(const char* op, const char* name, const Tensor& x, const Tensor& other, const char* like) {
  check_floating(op, name, x);
  check_shape(op, name, x, other.sizes(), like);
  check_device(op, name, x, other, like);
}

inline void check_mask(
    const char* op, const Tensor& mask, const Tensor& other, const char* like, const char* name = "response_mask") {
  check_dtype(op, name, mask, ScalarType::Bool);
  check_shape(op, name, mask, other.sizes(), like);
  check_device(op, name, mask, other, like);
}

// expected says the condition in words, for example "at least 0".
inline void check_number(const char* op, const char* name, double value, bool condition, const char* expected) {
  check(condition, op, name, " must be ", expected, ", got ", value);
}

} // namespace fastppo
