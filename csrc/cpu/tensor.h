/*
From torch::stable::Tensor to the plain views of cpu/rows.h, for the registration units.
*/
#pragma once

#include "check.h"
#include "cpu/capability.h"
#include "cpu/rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <vector>

namespace fastppo {

// A tensor of any shape seen as rows x columns: the last dimension is the columns; one dimension is one row.
struct Shape2d {
  int64_t rows;
  int64_t columns;
};

inline Shape2d shape_2d(const Tensor& x) {
  const auto sizes = x.sizes();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) {
    rows *= sizes[i];
  }
  return {rows, sizes.size() == 0 ? 1 : sizes[sizes.size() - 1]};
}

// x itself where its rows can be walked as they lie (any row stride), else a contiguous copy.
inline Tensor with_unit_inner_stride(const Tensor& x) {
  const int64_t dim = x.dim();
  if (x.is_contiguous() || (dim <= 2 && dim > 0 && x.stride(dim - 1) == 1)) {
    return x;
  }
  return torch::stable::contiguous(x);
}

// The same for the heads of a tensor (N, heads, D), of which only D must be in one piece.
inline Tensor with_unit_last_stride(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) <= 1 ? x : torch::stable::contiguous(x);
}

inline int64_t row_stride(const Tensor& x) { return x.dim() == 2 ? x.stride(0) : shape_2d(x).columns; }

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

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A tensor held for the length of a call (it may be a copy) and its rows.
struct HeldRows : Rows {
  Tensor held;

  explicit HeldRows(const Tensor& x) : held(with_unit_inner_stride(x)) {
    data = held.const_data_ptr();
    stride = row_stride(held);
    dtype = dtype_of(held);
  }
};

struct HeldMask : MaskRows {
  Tensor held;

  explicit HeldMask(const Tensor& x) : held(with_unit_inner_stride(x)) {
    data = static_cast<const bool*>(held.const_data_ptr());
    stride = row_stride(held);
  }
};

// One float32 per row, in one piece: the tensor's own memory where it is that already. Null where no tensor was given.
struct RowFloats {
  const float* data = nullptr;

  explicit RowFloats(const OptionalTensor& x) {
    if (!x) {
      return;
    }
    held_ = x;
    if (x->scalar_type() != ScalarType::Float) {
      held_ = torch::stable::to(*held_, std::make_optional(ScalarType::Float));
    }
    if (!held_->is_contiguous()) {
      held_ = torch::stable::contiguous(*held_);
    }
    data = static_cast<const float*>(held_->const_data_ptr());
  }

 private:
  OptionalTensor held_;
};

// Optional inputs: a view only where the tensor was given.
using OptionalRows = std::optional<HeldRows>;

inline OptionalRows optional_rows(const OptionalTensor& x) {
  return x ? OptionalRows(std::in_place, *x) : std::nullopt;
}

inline Rows rows_or_none(const OptionalRows& x) { return x ? static_cast<Rows>(*x) : Rows{}; }

// A contiguous tensor of this backend. torch::stable::new_empty looks its op up by name at every call, which takes
// longer than the allocation; an op on a few tokens is mostly allocations.
inline Tensor empty_tensor(Sizes sizes, ScalarType dtype) {
  std::array<int64_t, 16> strides;
  check(sizes.size() <= strides.size(), "empty_tensor", "at most 16 dimensions are supported, got ", sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(dtype),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_float(Sizes sizes) { return empty_tensor(sizes, ScalarType::Float); }

inline Tensor empty_float(const Tensor& like) { return empty_float(like.sizes()); }

inline float* float_data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline int64_t blocks_of(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

// The number in a 0-d tensor of any dtype.
inline double number_in(const Tensor& x) {
  const void* data = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(data);
    case ScalarType::Float:
      return *static_cast<const float*>(data);
    case ScalarType::Long:
      return static_cast<double>(*static_cast<const int64_t*>(data));
    default:
      const Tensor wide = torch::stable::to(x, std::make_optional(ScalarType::Double));
      return *static_cast<const double*>(wide.const_data_ptr());
  }
}

constexpr int64_t kGrain = 4096; // tokens a thread should have before a second one is worth waking

// Runs f(row, first column, columns, index of the block) for every block, on as many threads as pay off.
template <class Function>
void for_each_block(Shape2d shape, const Function& f) {
  const int64_t per_row = blocks_of(shape.columns);
  torch::stable::parallel_for(0, shape.rows * per_row, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % per_row * kBlock;
      f(block / per_row, first, std::min(kBlock, shape.columns - first), block);
    }
  });
}

// Runs f(first row, last row + 1), for ops whose rows cannot be cut.
template <class Function>
void for_rows(Shape2d shape, const Function& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.columns));
  torch::stable::parallel_for(0, shape.rows, grain, f);
}

// Runs f(row) for every row.
template <class Function>
void for_each_whole_row(Shape2d shape, const Function& f) {
  for_rows(shape, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      f(row);
    }
  });
}

} // namespace fastppo
