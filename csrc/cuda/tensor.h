/*
From torch::stable::Tensor to what kernels take, and what a launcher needs around a launch. For csrc/cuda/<concept>.cu.

  const OnDevice on(tensor);            makes its device the current one for the scope; on.stream is torch's stream
  HeldRows, HeldMask                    a tensor as Rows or MaskRows, held (it may be a copy) for the scope
  HeldNumber, number(x)                 a 0-d tensor, or a number of the host, as a Number
  HeldLogits<T>, HeldPerRow<T>          rows of logits, one number per row: for cuda/softmax.cuh
  with_element(dtype, body)             body(std::type_identity<T>()) for the T of a dtype
  counters_at_zero(tensor, n, on)       for is_last_block
  floats(tensor)                        a contiguous float32 tensor as a Span
  FASTPPO_CUDA_IMPL(m) { m.impl(...) }  registers for CUDA tensors; in the emulated library, for its CPU tensors

A tensor that a kernel still reads after its holder is gone stays safe: torch's allocator reuses memory in stream order.
*/
#pragma once

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/softmax.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#if defined(FASTPPO_EMULATED)
#define FASTPPO_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastppo_emulated, CPU, m)
#else
#define FASTPPO_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastppo, CUDA, m)
// In libtorch_cuda, which a CPU build of torch does not have. Weak, so that the same library loads there; without CUDA
// tensors it is never called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastppo::cuda {

struct OnDevice {
#if defined(FASTPPO_EMULATED)
  explicit OnDevice(const Tensor&) {}
  Stream stream = nullptr;
#else
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<Stream>(current);
  }
  Stream stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A tensor of any shape as rows x columns: the last dimension is the columns; one dimension is one row.
struct Shape2d {
  int64_t rows, columns;

  explicit Shape2d(const Tensor& x) : rows(1), columns(x.dim() == 0 ? 1 : x.size(x.dim() - 1)) {
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      rows *= x.size(i);
    }
  }
  int64_t count() const { return rows * columns; }
};

// x itself where its rows can be walked as they lie (any distance between rows), else a contiguous copy.
inline Tensor with_unit_inner_stride(const Tensor& x) {
  const int64_t dim = x.dim();
  if (x.is_contiguous() || (dim > 0 && dim <= 2 && x.stride(dim - 1) == 1)) {
    return x;
  }
  return torch::stable::contiguous(x);
}

inline int64_t row_stride(const Tensor& x) { return x.dim() == 2 ? x.stride(0) : Shape2d(x).columns; }

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

struct HeldRows : Rows {
  Tensor held;

  explicit HeldRows(const Tensor& x) : held(with_unit_inner_stride(x)) {
    const Shape2d shape(held);
    data = held.const_data_ptr();
    rows = shape.rows;
    columns = shape.columns;
    stride = row_stride(held);
    dtype = dtype_of(held);
  }

  // One number for each of many rows: a column, at any stride.
  static HeldRows per_row(const Tensor& x) {
    HeldRows out;
    out.held = x;
    out.data = x.const_data_ptr();
    out.rows = x.size(0);
    out.columns = 1;
    out.stride = x.stride(0);
    out.dtype = dtype_of(x);
    return out;
  }

  static HeldRows per_row(const OptionalTensor& x) { return x ? per_row(*x) : HeldRows(); }

 private:
  HeldRows() = default;
};

struct HeldMask : MaskRows {
  Tensor held;

  explicit HeldMask(const Tensor& x) : held(with_unit_inner_stride(x)) {
    const Shape2d shape(held);
    data = static_cast<const bool*>(held.const_data_ptr());
    rows = shape.rows;
    columns = shape.columns;
    stride = row_stride(held);
  }
};

// A 0-d tensor as a Number. A dtype that kernels do not know is converted, on the device too.
struct HeldNumber : Number {
  Tensor held;

  explicit HeldNumber(const Tensor& x) : held(is_known(x) ? x : wide(x)) {
    data = held.const_data_ptr();
    const auto dtype = held.scalar_type();
    type = dtype == ScalarType::Float  ? NumberType::kFloat
           : dtype == ScalarType::Long ? NumberType::kLong
                                       : NumberType::kDouble;
  }

 private:
  static Tensor wide(const Tensor& x) { return torch::stable::to(x, std::make_optional(ScalarType::Double)); }
  static bool is_known(const Tensor& x) {
    const auto dtype = x.scalar_type();
    return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Long;
  }
};

inline Number number(double x) { return {nullptr, NumberType::kGiven, x}; }

// --- rows of logits: cuda/softmax.cuh
// ----------------------------------------------------------------------------------

// The first `count` dimensions; nothing where they are too scattered to be described.
inline std::optional<Leading> leading(const Tensor& x, int64_t count) {
  Leading out;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = x.size(i), stride = x.stride(i);
    if (size == 1) {
      continue;
    }
    if (out.dims > 0 && out.strides[out.dims - 1] == size * stride) { // one walk with the dimension before
      out.sizes[out.dims - 1] *= size;
      out.strides[out.dims - 1] = stride;
    } else if (out.dims == kMostLeading) {
      return std::nullopt;
    } else {
      out.sizes[out.dims] = size;
      out.strides[out.dims++] = stride;
    }
  }
  return out;
}

// A tensor and its leading dimensions: x itself, or a contiguous copy where those are too scattered.
struct HeldLeading {
  Tensor held;
  Leading places;

  HeldLeading(const Tensor& x, int64_t count) : held(x) {
    std::optional<Leading> found = leading(x, count);
    if (!found) {
      held = torch::stable::contiguous(x);
      found = leading(held, count);
    }
    places = *found;
  }
};

template <class T>
struct HeldLogits : HeldLeading, LogitRows<T> {
  explicit HeldLogits(const Tensor& x) : HeldLeading(x, x.dim() - 1), LogitRows<T>() {
    this->vocabulary = x.size(x.dim() - 1);
    this->rows = x.numel() / this->vocabulary;
    this->data = static_cast<const T*>(held.const_data_ptr());
    this->leading = places;
  }
};

template <class T>
struct HeldPerRow : PerRow<T> {
  explicit HeldPerRow(const OptionalTensor& x) {
    if (x) {
      held_.emplace(*x, x->dim());
      this->data = static_cast<const T*>(held_->held.const_data_ptr());
      this->rows = x->numel();
      this->leading = held_->places;
    }
  }

 private:
  std::optional<HeldLeading> held_;
};

template <class Body>
void with_element(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(std::type_identity<__nv_bfloat16>());
    case ScalarType::Half:
      return body(std::type_identity<__half>());
    default:
      return body(std::type_identity<float>());
  }
}

// Memory for n objects of T, which torch knows as bytes.
template <class T>
Tensor scratch(const Tensor& like, int64_t n) {
  const int64_t bytes[] = {n * static_cast<int64_t>(sizeof(T))};
  return torch::stable::new_empty(like, Sizes(bytes, 1), std::make_optional(ScalarType::Byte));
}

template <class T>
Span<T> span_of(const Tensor& scratch) {
  return {static_cast<T*>(scratch.mutable_data_ptr()), scratch.numel() / static_cast<int64_t>(sizeof(T))};
}

inline Tensor counters_at_zero(const Tensor& like, int64_t n, const OnDevice& on) {
  const Tensor counters = scratch<unsigned>(like, n);
#if defined(FASTPPO_EMULATED)
  std::memset(counters.mutable_data_ptr(), 0, n * sizeof(unsigned));
#else
  check_cuda(cudaMemsetAsync(counters.mutable_data_ptr(), 0, n * sizeof(unsigned), on.stream), "cudaMemsetAsync");
#endif
  return counters;
}

// Where the parts of split rows meet: merge_parts(). Nothing where no row is split.
template <class Sums>
struct HeldParts {
  std::optional<Tensor> held, held_counters;
  Span<Sums> parts;
  unsigned* counters = nullptr;

  HeldParts(const Tensor& like, const RowSplit& split, const OnDevice& on) {
    if (split.parts > 1) {
      held = scratch<Sums>(like, split.rows * split.parts);
      held_counters = counters_at_zero(like, split.rows, on);
      parts = span_of<Sums>(*held);
      counters = span_of<unsigned>(*held_counters).data;
    }
  }
};

inline Tensor empty_float(const Tensor& like, Sizes sizes) {
  return torch::stable::new_empty(like, sizes, std::make_optional(ScalarType::Float));
}

inline Tensor empty_float(const Tensor& like) { return empty_float(like, like.sizes()); }

// A gradient like x, or, where nobody asked for it, an empty tensor.
inline Tensor empty_if(bool needed, const Tensor& x) {
  const int64_t none[] = {0};
  return torch::stable::new_empty(x, needed ? x.sizes() : Sizes(none, 1));
}

template <class T>
Span<T> elements(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.numel()};
}

inline Span<float> floats(const Tensor& x) { return {static_cast<float*>(x.mutable_data_ptr()), x.numel()}; }

} // namespace fastppo::cuda
