/*
decode_attention: csrc/decode_attention.h says what it computes. query, key, value, out: contiguous; caches: any strides
but that of their last dimension.

A block takes one row, one key head and up to kDecodeHeads of the query heads that share it, and walks over the cache in
tiles of kDecodeThreads tokens:
  scores   a thread has one token's key, 64 bytes at a time, and one sum per head; the queries lie in shared memory
  softmax  a warp has one head: maximum and sum so far, the tile's weights, and the factor that makes older sums
           relative to the new maximum
  values   a thread has 8 columns of every groups-th token, 64 bytes of them at a time, and keeps their weighted sums,
           one per head, in registers
At the end the threads' sums are added up in order. The new token is read from key and value, never from the cache, to
which the block of the first heads writes it: no block reads what another writes, and no barrier is needed in between.
With 16 bytes at a time an H200 took 2.2 times what the bytes take: 8 KB under way in a multiprocessor, where some 22
keep the memory busy. One launch. Splitting a long row over blocks is left out: few rows of many tokens leave most
multiprocessors idle.
*/
#pragma once

#include "cuda/memory.cuh"
#include "cuda/reduce.cuh"

namespace fastppo::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeHeads = kDecodeThreads / 32; // a warp each
constexpr int kDecodeColumns = 8;                 // of a thread: one 16-byte load of bfloat16, two of float32
constexpr int kDecodeLoads = 4;                   // of 16 bytes, that a thread has under way
constexpr int64_t kDecodeWidth = int64_t{kDecodeThreads} * kDecodeColumns; // at most

template <class T>
constexpr int kDecodePiece = kDecodeLoads * kPerVector<T>; // columns of a key at a time
template <class T>
constexpr int kDecodeTokens = kDecodePiece<T> / kDecodeColumns; // values at a time

template <class T>
struct DecodeCache {
  Span<T> data;
  int64_t slot, head, place; // strides
};

template <class T>
struct DecodeAttentionArgs {
  Span<const T> query, key, value;
  DecodeCache<T> keys, values;
  Span<const int64_t> slots, lengths;
  Span<T> out;
  int64_t rows, heads, group, width; // heads: of keys
  int64_t slot_count, capacity;
  int64_t window; // 0: none
  float scale;

  FASTPPO_HD int64_t chunks() const { return (group + kDecodeHeads - 1) / kDecodeHeads; }
  FASTPPO_HD int64_t vectors() const { return (width + kDecodeColumns - 1) / kDecodeColumns; }
  // Whole pieces of a key.
  FASTPPO_HD int64_t padded() const { return (width + kDecodePiece<T> - 1) / kDecodePiece<T> * kDecodePiece<T>; }
};

// Floats of dynamic shared memory: the queries, then the threads' sums.
template <class T>
int64_t decode_attention_shared(const DecodeAttentionArgs<T>& args) {
  return kDecodeHeads * args.padded() + int64_t{kDecodeThreads} * kDecodeHeads * kDecodeColumns;
}

// One token's keys or values. Places before the last are written by no thread of the launch, so they may go through the
// read-only path.
template <class T>
__device__ __forceinline__ Span<const T> decode_token(
    const DecodeCache<T>& cache, const Span<const T>& fresh, int64_t offset, int64_t place, int64_t last,
    int64_t width) {
  if (place == last) {
    return fresh;
  }
  return {cache.data.part(offset + place * cache.place, width).data, width};
}

// Does every token of a cache, and the new one, come in whole vectors of 16 bytes?
template <class T>
__device__ __forceinline__ bool in_vectors(
    const DecodeCache<T>& cache, const Span<const T>& fresh, int64_t offset, int width) {
  return width % kDecodeColumns == 0 && cache.place % kPerVector<T> == 0 && is_aligned(cache.data.data + offset) &&
         is_aligned(fresh.data);
}

// The other tokens: one element at a time into the same places, zeros past the end.
template <int N, class T>
__device__ __forceinline__ void load_elements(const Span<const T>& token, int first, Vector<T> (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N * kPerVector<T>; ++i) {
    const T x = first + i < token.size ? token[first + i] : from_float<T>(0);
    out[i / kPerVector<T>].data[i % kPerVector<T>] = x;
  }
}

// 3 blocks a multiprocessor at least: with the 128 registers that 4 leave, sm_100 and sm_120 spill.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads, 3) decode_attention_kernel(const DecodeAttentionArgs<T> args) {
  FASTPPO_DYNAMIC_SHARED(float, shared);
  FASTPPO_SHARED(float, weights, kDecodeHeads* kDecodeThreads);
  FASTPPO_SHARED(float, factors, kDecodeHeads);
  FASTPPO_SHARED(float, sums, kDecodeHeads);
  const int thread = static_cast<int>(threadIdx.x);
  // At most kDecodeWidth: 32 bits save registers.
  const int width = static_cast<int>(args.width), vectors = static_cast<int>(args.vectors());
  const int padded = static_cast<int>(args.padded());
  const int64_t chunks = args.chunks();
  const int64_t chunk = blockIdx.x % chunks, head = blockIdx.x / chunks % args.heads;
  const int64_t row = blockIdx.x / chunks / args.heads;
  const int64_t first_head = chunk * kDecodeHeads;
  const int heads = static_cast<int>(args.group - first_head < kDecodeHeads ? args.group - first_head : kDecodeHeads);
  const int64_t query_row = (row * args.heads + head) * args.group + first_head;
  const Span<T> out = args.out.part(query_row * width, heads * width);
  const int64_t slot = args.slots[row], last = args.lengths[row]; // last: the new token's place
  if (slot < 0 || slot >= args.slot_count || last < 0 || last >= args.capacity) {
#pragma unroll 1
    for (int i = thread; i < heads * width; i += kDecodeThreads) {
      out[i] = from_float<T>(NAN);
    }
    return;
  }

  const Span<const T> key = args.key.part((row * args.heads + head) * width, width);
  const Span<const T> value = args.value.part((row * args.heads + head) * width, width);
  const int64_t keys_at = slot * args.keys.slot + head * args.keys.head;
  const int64_t values_at = slot * args.values.slot + head * args.values.head;
  if (chunk == 0) {
#pragma unroll 1
    for (int i = thread; i < width; i += kDecodeThreads) {
      const T k = key[i], v = value[i];
      args.keys.data[keys_at + last * args.keys.place + i] = k;
      args.values.data[values_at + last * args.values.place + i] = v;
    }
  }
#pragma unroll 1
  for (int i = thread; i < kDecodeHeads * padded; i += kDecodeThreads) {
    const int h = i / padded, column = i % padded;
    float x = 0;
    if (h < heads && column < width) {
      const T q = args.query[(query_row + h) * width + column];
      x = to_float(q) * args.scale;
    }
    shared[i] = x;
  }
  __syncthreads();
  const Shared<Vector<float>> queries = shared_as<Vector<float>>(shared);

  const int groups = kDecodeThreads / vectors, group = thread / vectors; // of tokens, in the pass over values
  const int column = thread % vectors * kDecodeColumns;
  float acc[kDecodeHeads][kDecodeColumns] = {};
  float highest = -INFINITY, sum = 0; // of this warp's head, the same in all lanes
  const bool key_vectors = in_vectors(args.keys, key, keys_at, width);
  const bool value_vectors = in_vectors(args.values, value, values_at, width);
  const int64_t first = args.window > 0 && last + 1 > args.window ? last + 1 - args.window : 0;
  for (int64_t tile = first; tile <= last; tile += kDecodeThreads) {
    const int count = static_cast<int>(last + 1 - tile < kDecodeThreads ? last + 1 - tile : kDecodeThreads);

    float scores[kDecodeHeads] = {};
    if (thread < count) {
      const Span<const T> token = decode_token(args.keys, key, keys_at, tile + thread, last, width);
      for (int at = 0; at < width; at += kDecodePiece<T>) {
        Vector<T> piece[kDecodeLoads];
        if (key_vectors) {
#pragma unroll
          for (int v = 0; v < kDecodeLoads; ++v) {
            const int column_at = at + v * kPerVector<T>;
            piece[v] = column_at < width ? load16(token, column_at) : Vector<T>{};
          }
        } else {
          load_elements(token, at, piece);
        }
#pragma unroll
        for (int i = 0; i < kDecodePiece<T>; i += 4) {
          float x[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            x[n] = to_float(piece[(i + n) / kPerVector<T>].data[(i + n) % kPerVector<T>]);
          }
#pragma unroll
          for (int h = 0; h < kDecodeHeads; ++h) {
            const Vector<float> q = queries[(h * padded + at + i) / 4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              scores[h] += q.data[n] * x[n];
            }
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kDecodeHeads; ++h) {
      weights[h * kDecodeThreads + thread] = thread < count ? scores[h] : -INFINITY;
    }
    __syncthreads();

    float x[kDecodeThreads / 32];
    float tile_highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kDecodeThreads / 32; ++i) {
      const float score = weights[warp_id() * kDecodeThreads + i * 32 + lane_id()];
      x[i] = score;
      tile_highest = vmax(tile_highest, score);
    }
    const float now = vmax(highest, warp_max(tile_highest));
    const float factor = vexp(highest - now);
    float tile_sum = 0;
#pragma unroll
    for (int i = 0; i < kDecodeThreads / 32; ++i) {
      const float weight = vexp(x[i] - now);
      weights[warp_id() * kDecodeThreads + i * 32 + lane_id()] = weight;
      tile_sum += weight;
    }
    sum = sum * factor + warp_sum(tile_sum);
    highest = now;
    if (lane_id() == 0) {
      factors[warp_id()] = factor;
    }
    __syncthreads();

    if (group < groups) {
#pragma unroll
      for (int h = 0; h < kDecodeHeads; ++h) {
        const float by = factors[h];
#pragma unroll
        for (int i = 0; i < kDecodeColumns; ++i) {
          acc[h][i] *= by;
        }
      }
      for (int j = group; j < count; j += groups * kDecodeTokens<T>) {
        Vector<T> pieces[kDecodeTokens<T>][kDecodeColumns / kPerVector<T>];
        // Past the end the first one again, from the L1 cache: leaving loads out instead makes nvcc spill.
        const auto token = [&](int n) {
          const int at = j + n * groups < count ? j + n * groups : j;
          return decode_token(args.values, value, values_at, tile + at, last, width);
        };
        if (value_vectors) {
#pragma unroll
          for (int n = 0; n < kDecodeTokens<T>; ++n) {
#pragma unroll
            for (int v = 0; v < kDecodeColumns / kPerVector<T>; ++v) {
              pieces[n][v] = load16(token(n), column + v * kPerVector<T>);
            }
          }
        } else {
#pragma unroll
          for (int n = 0; n < kDecodeTokens<T>; ++n) {
            load_elements(token(n), column, pieces[n]);
          }
        }
#pragma unroll
        for (int n = 0; n < kDecodeTokens<T>; ++n) {
          if (j + n * groups < count) {
#pragma unroll
            for (int h = 0; h < kDecodeHeads; ++h) {
              const float weight = weights[h * kDecodeThreads + j + n * groups];
#pragma unroll
              for (int i = 0; i < kDecodeColumns; ++i) {
                acc[h][i] += weight * to_float(pieces[n][i / kPerVector<T>].data[i % kPerVector<T>]);
              }
            }
          }
        }
      }
    }
    __syncthreads(); // weights and factors are written again
  }

  const int parts = kDecodeHeads * padded;
#pragma unroll
  for (int h = 0; h < kDecodeHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kDecodeColumns; ++i) {
      shared[parts + (thread * kDecodeHeads + h) * kDecodeColumns + i] = acc[h][i];
    }
  }
  if (lane_id() == 0) {
    sums[warp_id()] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < heads * width; i += kDecodeThreads) {
    const int h = i / width, d = i % width;
    float total = 0;
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      const float part =
          shared[parts + ((g * vectors + d / kDecodeColumns) * kDecodeHeads + h) * kDecodeColumns + d % kDecodeColumns];
      total += part;
    }
    const float by = sums[h];
    out[i] = from_float<T>(total / by);
  }
}

} // namespace fastppo::cuda
