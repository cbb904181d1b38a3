/*
What happens between the matrix products of linear_logprobs: csrc/linear_logprobs.h has the formulas, linear_logprobs.cu
the products and their order, cuda/softmax.cuh the row loop.

  fold_kernel         a tile of products: a block per row folds its logits into the row's sums; after the last tile the
                      row's results. One read of the tile.
  tile_grad_kernel    a tile of products becomes, in place, its gradient. One read, one write; rows without gradient
                      are written as zeros and not read.
  accumulate_kernel   a product, element by element, into a float32 sum; the last one gives the sum in the dtype asked.
  column_sums_kernel  the gradient of the bias: the sums of a tile's columns.
  active_rows_kernel  the rows of hidden that have a gradient, zeros for the others.

Products of rows without gradient are computed all the same: how many there are is known on the device alone, and cuBLAS
takes its shapes from the host. Their rows of hidden are replaced by zeros (0 * NaN would show in the gradient of the
weight) and their own gradients by exact zeros, so the result is as if they had been left out; the time is not.
*/
#pragma once

#include "csrc/linear_logprobs.h"
#include "cuda/logprobs.cuh"

namespace fastppo::cuda {

// A tile of products: rows x columns, contiguous, the tile's first row and column in the whole.
template <class T>
struct Tile {
  Span<T> products;
  int64_t rows, columns;
  int64_t first_row, first_column;

  __device__ __forceinline__ Span<T> operator[](int64_t row) const { return products.part(row * columns, columns); }
};

template <class T>
struct HeadRows {
  Head head;
  Span<const T> bias; // or null

  // cap(logit_scale * (product + bias)), or without a cap. A column past the end is one whose result is thrown away.
  __device__ __forceinline__ float operator()(float product, int64_t column) const {
    const float biased = column < bias.size ? product + to_float(bias[column]) : product;
    return head.softcap == 0 ? biased * head.logit_scale
                             : head.softcap * tanhf(biased * (head.logit_scale / head.softcap));
  }

  // A batch of products that begins at `first` of a part of a row, whose biases are `part` (null: there are none).
  template <int N>
  __device__ __forceinline__ void to_logits(float (&x)[N], int64_t first, const Span<const T>& part) const {
    if (part) {
      float biases[N];
      load_batch(part, first, biases, 0.0f);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] += biases[i];
      }
    }
    if (head.softcap != 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = head.softcap * tanhf(x[i] * (head.logit_scale / head.softcap));
      }
    } else if (head.logit_scale != 1) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] *= head.logit_scale;
      }
    }
  }

  // Biases of the columns [first, first + size).
  __device__ __forceinline__ Span<const T> biases(int64_t first, int64_t size) const {
    return bias ? bias.part(first, size) : Span<const T>();
  }

  // A batch of a tile whose columns begin at first_column; the places past its end hold -inf and keep it.
  template <int N>
  __device__ __forceinline__ void map(float (&x)[N], int64_t first, int64_t columns, int64_t first_column) const {
    constexpr int kPer = kPerVector<T>;
    to_logits(x, first, biases(first_column, columns));
    const int64_t left = columns - first; // a cap and a scale below 0 leave nothing at -inf
    if (left < (N / kPer - 1) * int64_t{kRowThreads * kPer} + kPer) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = i / kPer * (kRowThreads * kPer) + i % kPer < left ? x[i] : -kInfinity;
      }
    }
  }

  // The gradient of a product from that of its logit. Without a cap the logit is not looked at: it may be -inf.
  __device__ __forceinline__ float through(float logit, float dlogit) const {
    const float y = logit / head.softcap;
    return head.softcap == 0 ? head.logit_scale * dlogit : head.logit_scale * dlogit * (1 - y * y);
  }
};

template <class T>
struct FoldArgs {
  Tile<T> tile;
  HeadRows<T> head;
  PerRow<int64_t> ids;
  int64_t vocabulary;
  double inv_temperature;
  float scale; // base_2_scale()
  Span<SoftmaxSums> sums;
  Span<float> picked; // the picked logit
  Span<float> logprobs, entropy, reference, log_sum;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksPerMultiprocessor) fold_kernel(const FoldArgs<T> args) {
  const Tile<T>& tile = args.tile;
  for (int64_t i = blockIdx.x; i < tile.rows; i += gridDim.x) {
    const Span<T> products = tile[i];
    const SoftmaxSums part = softmax_sums<kHalfBatch<T>>(
        products, args.scale, args.inv_temperature,
        [&](auto& x, int64_t first) { args.head.map(x, first, tile.columns, tile.first_column); });
    if (threadIdx.x == 0) {
      const int64_t row = tile.first_row + i, id = args.ids[row];
      SoftmaxSums sums;
      float picked = std::numeric_limits<float>::quiet_NaN(); // of an id that is in no tile
      if (tile.first_column > 0) {
        sums = args.sums[row];
        picked = args.picked[row];
      }
      sums.merge(part, args.inv_temperature);
      if (id >= tile.first_column && id < tile.first_column + tile.columns) {
        picked = args.head(to_float(products[id - tile.first_column]), id);
      }
      if (tile.first_column + tile.columns < args.vocabulary) {
        args.sums[row] = sums;
        args.picked[row] = picked;
      } else {
        args.logprobs[row] = static_cast<float>(sums.logprob(picked, args.inv_temperature));
        args.entropy[row] = static_cast<float>(sums.entropy());
        args.reference[row] = static_cast<float>(sums.reference);
        args.log_sum[row] = static_cast<float>(sums.log_sum_of_rounded(args.inv_temperature));
      }
    }
  }
}

// --- backward
// -------------------------------------------------------------------------------------------------------------

// Which rows have a gradient; NaN counts as one.
struct RowGrads {
  PerRow<float> logprobs, entropy;

  __device__ __forceinline__ bool active(int64_t row) const { return logprobs[row] != 0 || entropy[row] != 0; }
};

template <class T>
struct TileGradArgs {
  Tile<T> tile;
  HeadRows<T> head;
  RowGrads grads;
  PerRow<int64_t> ids;
  PerRow<float> entropy, reference, log_sum;
  double inv_temperature;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksPerMultiprocessor - 1) // a bias and a cap: 80 registers
    tile_grad_kernel(const TileGradArgs<T> args) {
  const Tile<T>& tile = args.tile;
  for (int64_t i = blockIdx.x; i < tile.rows; i += gridDim.x) {
    const int64_t row = tile.first_row + i;
    const Span<T> products = tile[i];
    if (!args.grads.active(row)) {
      write_zeros(products);
      continue;
    }
    const float grad_logprob = args.grads.logprobs[row];
    const SoftmaxGrad grad(
        grad_logprob, args.grads.entropy[row], args.entropy[row], args.reference[row], args.log_sum[row],
        args.inv_temperature);
    const int64_t picked = args.ids[row] - tile.first_column;
    const bool has_picked = picked >= 0 && picked < tile.columns; // the same for all threads
    float picked_logit = 0;
    if (has_picked) {
      if (threadIdx.x == 0) {
        picked_logit = args.head(to_float(products[picked]), tile.first_column + picked);
      }
      __syncthreads(); // before another thread overwrites it
    }
    const Base2Grad in_base_2(grad);
    map_batches(
        products, products,
        [&](float product, int64_t column) {
          const float logit = args.head(product, tile.first_column + column);
          return args.head.through(logit, in_base_2(logit));
        },
        [&](float (&x)[kHalfBatch<T>], int64_t first, int64_t rest) {
          args.head.to_logits(x, first, args.head.biases(tile.first_column + rest, tile.columns - rest));
          if (args.head.head.softcap == 0) { // not in through(), which would divide by the cap in any case
#pragma unroll
            for (float& one : x) {
              one = args.head.head.logit_scale * in_base_2(one);
            }
          } else {
#pragma unroll
            for (float& one : x) {
              one = args.head.through(one, in_base_2(one));
            }
          }
        });
    if (has_picked) {
      __syncthreads();
      if (threadIdx.x == 0) {
        const auto dlogit = static_cast<float>(grad.picked(picked_logit, grad_logprob));
        products[picked] = from_float<T>(args.head.through(picked_logit, dlogit));
      }
    }
  }
}

template <class T>
struct AccumulateArgs {
  Span<const T> product; // rows x width
  Span<float> sum;       // the same; null where this product is the first and the last
  Span<T> out;           // null: this product is not the last
  bool is_first;
  int64_t width, first_row;
  bool zero_inactive; // rows of out without gradient are 0
  RowGrads grads;
};

constexpr int kElements = 8; // per thread and step

// A block per row: whether a row has a gradient is asked once.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 5) accumulate_kernel(const AccumulateArgs<T> args) {
  const int64_t width = args.width, rows = args.product.size / width;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Span<const T> product = args.product.part(row * width, width);
    const Span<float> sum = args.sum ? args.sum.part(row * width, width) : Span<float>();
    const Span<T> out = args.out ? args.out.part(row * width, width) : Span<T>();
    const bool is_zero = static_cast<bool>(out) && args.zero_inactive && !args.grads.active(args.first_row + row);
    for (int64_t first = threadIdx.x * kElements; first < width; first += kRowThreads * kElements) {
      float x[kElements];
      load_floats(product, first, x, 0.0f);
      if (!args.is_first) {
        float before[kElements];
        load_floats(sum, first, before, 0.0f);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          x[i] += before[i];
        }
      }
      if (!out) {
        store_floats(sum, first, x);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        x[i] = is_zero ? 0.0f : x[i];
      }
      store_floats(out, first, x);
    }
  }
}

template <class T>
struct ColumnSumsArgs {
  Tile<T> tile;
  Span<float> sum; // V
  Span<T> out;     // V; null: further blocks of rows come
};

// A warp takes 256 columns and every eighth row of them, then the eight warps' sums are added up.
constexpr int64_t kColumnsPerBlock = 32 * kElements;

template <class T>
__global__ void __launch_bounds__(kRowThreads) column_sums_kernel(const ColumnSumsArgs<T> args) {
  constexpr int kWarps = kRowThreads / 32;
  FASTPPO_SHARED(float, parts, kWarps* kColumnsPerBlock);
  const Tile<T>& tile = args.tile;
  for (int64_t block = blockIdx.x; block * kColumnsPerBlock < tile.columns; block += gridDim.x) {
    const int64_t first = block * kColumnsPerBlock + lane_id() * kElements;
    float sums[kElements] = {};
    for (int64_t row = warp_id(); row < tile.rows; row += kWarps) {
      float x[kElements];
      load_floats(tile[row], first, x, 0.0f);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        sums[i] += x[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      parts[warp_id() * kColumnsPerBlock + lane_id() * kElements + i] = sums[i];
    }
    __syncthreads();
    const int64_t column = block * kColumnsPerBlock + threadIdx.x;
    if (column < tile.columns) {
      const int64_t place = tile.first_column + column;
      float sum = 0;
      if (tile.first_row > 0) {
        sum = args.sum[place];
      }
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float part = parts[warp * kColumnsPerBlock + threadIdx.x];
        sum += part;
      }
      if (args.out) {
        args.out[place] = from_float<T>(sum);
      } else {
        args.sum[place] = sum;
      }
    }
    __syncthreads();
  }
}

template <class T>
struct ActiveRowsArgs {
  LogitRows<T> hidden;
  RowGrads grads;
  Span<T> out;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) active_rows_kernel(const ActiveRowsArgs<T> args) {
  for (int64_t row = blockIdx.x; row < args.hidden.rows; row += gridDim.x) {
    const Span<T> out = args.out.part(row * args.hidden.vocabulary, args.hidden.vocabulary);
    if (args.grads.active(row)) {
      map_row(args.hidden[row], out, [](float x, int64_t) { return x; });
    } else {
      write_zeros(out);
    }
  }
}

} // namespace fastppo::cuda
