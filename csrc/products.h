/*
Matrix products of a stable-ABI unit, by torch itself through the dispatcher (oneDNN or MKL on the CPU, cuBLAS on CUDA,
with torch's settings for reduced precision), and the views that they are made of.
*/
#pragma once

#include "check.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>

namespace fastppo {

// out = a @ b.
inline void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]); // takes back the reference that the call returns
}

inline Tensor rows_of(const Tensor& x, int64_t begin, int64_t count) {
  Tensor whole = x;
  return torch::stable::narrow(whole, 0, begin, count);
}

inline Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

// The first rows * columns elements of a buffer, as a contiguous matrix.
inline Tensor matrix(const Tensor& buffer, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns};
  return torch::stable::view(rows_of(buffer, 0, rows * columns), Sizes(sizes, 2));
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, Sizes(sizes.begin(), sizes.size()));
}

// body(first row, rows, first column, columns) for each tile: all row blocks of one slice of the vocabulary, then on.
template <class Body>
void for_each_product(int64_t rows, int64_t row_block, int64_t vocabulary, int64_t columns, const Body& body) {
  for (int64_t column = 0; column < vocabulary; column += columns) {
    for (int64_t row = 0; row < rows; row += row_block) {
      body(row, std::min(row_block, rows - row), column, std::min(columns, vocabulary - column));
    }
  }
}

} // namespace fastppo
