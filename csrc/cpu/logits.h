/*
Logits as rows of any leading shape and strides, and the way rows are cut into tasks. For the registration units.
*/
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/tensor.h"

namespace fastppo {

// Elements of a row per task: a large vocabulary is enough work for several cores even when there is one row. Borders
// depend on V alone, never on the thread count.
constexpr int64_t kTile = 8192;
constexpr int64_t kTilesPerThread = 4; // below this many, waking another thread costs more than it saves

inline int64_t tiles_of(int64_t vocabulary) { return (vocabulary + kTile - 1) / kTile; }

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline void set_float(void* row, DType dtype, int64_t column, double value) {
  const auto x = static_cast<float>(value);
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<torch::headeronly::BFloat16*>(row)[column] = x;
      break;
    case DType::kFloat16:
      static_cast<torch::headeronly::Half*>(row)[column] = x;
      break;
    case DType::kFloat32:
      static_cast<float*>(row)[column] = x;
      break;
  }
}

struct LogitRows {
  Tensor logits;
  char* data;
  DType dtype;
  int64_t rows = 1;
  int64_t vocabulary;

  explicit LogitRows(const Tensor& x)
      : logits(x),
        data(static_cast<char*>(x.data_ptr())),
        dtype(dtype_of(x)),
        vocabulary(x.size(x.dim() - 1)),
        sizes_(x.sizes()),
        strides_(x.strides()) {
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      rows *= sizes_[i];
    }
  }

  // Where element `column` of row `row` lies, rows counted in the order of the leading dimensions.
  char* at(int64_t row, int64_t column) const {
    int64_t offset = column;
    for (size_t i = sizes_.size() - 1; i-- > 0; row /= sizes_[i]) {
      offset += row % sizes_[i] * strides_[i];
    }
    return data + offset * bytes_of(dtype);
  }

  double value(int64_t row, int64_t column) const {
    const void* x = at(row, column);
    switch (dtype) {
      case DType::kBFloat16:
        return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(x));
      case DType::kFloat16:
        return static_cast<float>(*static_cast<const torch::headeronly::Half*>(x));
      default:
        return *static_cast<const float*>(x);
    }
  }

  void set_value(int64_t row, int64_t column, double value) const { set_float(at(row, column), dtype, 0, value); }

 private:
  Sizes sizes_, strides_;
};

// One float per row, in the order of the rows; 0 where the tensor was not given.
struct RowValues {
  explicit RowValues(const OptionalTensor& x) {
    if (x) {
      held_ = x->is_contiguous() ? x : torch::stable::contiguous(*x);
      data_ = static_cast<const float*>(held_->const_data_ptr());
    }
  }

  double operator[](int64_t row) const { return data_ == nullptr ? 0.0 : data_[row]; }

 private:
  OptionalTensor held_;
  const float* data_ = nullptr;
};

// body(row, tile, first column, columns) for every tile of every row, in parallel.
template <class Body>
void for_each_tile(int64_t rows, int64_t vocabulary, const Body& body) {
  const int64_t tiles = tiles_of(vocabulary);
  torch::stable::parallel_for(0, rows * tiles, kTilesPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tiles, tile = task % tiles, column = tile * kTile;
      body(row, tile, column, std::min(kTile, vocabulary - column));
    }
  });
}

// body(row) for every row, in parallel: what is left to do after its tiles.
template <class Body>
void for_each_row(int64_t rows, int64_t tiles, const Body& body) {
  constexpr int64_t kTilesMergedPerThread = 2048;
  torch::stable::parallel_for(0, rows, kTilesMergedPerThread / tiles + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      body(row);
    }
  });
}

// A gradient like x, or, where nobody asked for it, an empty tensor.
inline Tensor empty_if(bool needed, const Tensor& x) {
  const int64_t none[] = {0};
  return empty_tensor(needed ? x.sizes() : Sizes(none, 1), x.scalar_type());
}

/*
A new tensor whose memory Linux is asked to clear and map 2 MiB at a time. 4 KiB at a time, the first touch takes longer
than computing a gradient of logits and writing it. A wish: results do not depend on it. From 32 MiB on, glibc gives
every block a mapping of its own, so the advice goes when the tensor goes.

On a 2-core AMD EPYC (Zen 4), bfloat16 [2048, 49152]: a backward takes 28 ms instead of 76. The same virtual machine
reports large blocks that stay free for 2 s to its host (free_page_reporting) and gets them back slowly: with pauses of
3 s it is 240 ms, where small pages take 78. So this is for gradients of logits, not for weights once per micro-batch.
*/
inline Tensor on_large_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kOwnMapping = 32 << 20, kLargePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t bytes = x.numel() * bytes_of(dtype_of(x));
  if (bytes >= kOwnMapping) {
    const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage,
                    last = (begin + bytes) / kLargePage * kLargePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return x;
}

inline Tensor contiguous_ids(const Tensor& ids) { return ids.is_contiguous() ? ids : torch::stable::contiguous(ids); }

inline const int64_t* id_data(const Tensor& ids) { return static_cast<const int64_t*>(ids.const_data_ptr()); }

} // namespace fastppo
