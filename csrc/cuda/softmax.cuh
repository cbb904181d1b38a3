/*
What every row loop over logits is made of: how rows are found and split, and the sums of a softmax (csrc/softmax.h).

Split. A block of kRowThreads takes a row or, where there are few rows, a part of one: RowSplit, from the shape alone.
A thread takes kRowVectors 16-byte vectors at a time, kRowThreads vectors apart, so that all their loads are under way
before the first is used: 64 bytes a thread, 64 KB for the 1024 threads that a multiprocessor holds at 64 registers. An
H100 needs 18 KB under way per multiprocessor to keep its memory busy, a B200 43.

Sums. Each thread sums relative to a reference of its own, in base 2: t = (logit - reference) log2(e) / temperature,
weight 2^t. A reference some nats below the maximum is as good as the maximum itself, so the quick loop looks for none:
unpack, subtract, multiply, 2^t, two sums, which is 6 instructions a logit. It goes on from the reference of before, and
where the sums of a batch show that this will not do (the first batch, a logit far above those of before, -inf, NaN) the
batch, still in registers, is done again by the careful loop. A batch is summed apart, in groups of eight: a weight that
is added to hundreds of others one after the other in float32 may be lost in them.

Merge. Threads are made relative to the block's highest reference, with one 2^t each, then added up in float64; parts of
a row by SoftmaxSums::merge. Always in the same order.
*/
#pragma once

#include "csrc/softmax.h"
#include "cuda/memory.cuh"
#include "cuda/reduce.cuh"

namespace fastppo::cuda {

constexpr int kRowThreads = 256;
constexpr int kRowVectors = 4;
constexpr int kBlocksPerMultiprocessor = 4; // at least: 64 registers a thread

// --- rows
// -----------------------------------------------------------------------------------------------------------------

constexpr int kMostLeading = 6;

// Where the rows of a tensor begin: its dimensions but the last, with those that can be walked as one made one.
struct Leading {
  int dims = 0;
  int64_t sizes[kMostLeading] = {};
  int64_t strides[kMostLeading] = {};

  FASTPPO_HD int64_t offset(int64_t row) const {
    if (dims == 1) {
      return row * strides[0]; // nearly always: no division
    }
    int64_t out = 0;
    for (int i = dims - 1; i >= 0; --i) {
      out += row % sizes[i] * strides[i];
      row /= sizes[i];
    }
    return out;
  }
};

template <class T>
struct LogitRows {
  const T* data;
  int64_t rows, vocabulary;
  Leading leading;

  __device__ __forceinline__ Span<const T> operator[](int64_t row) const {
    FASTPPO_ASSERT(row >= 0 && row < rows, "row out of range");
    return {data + leading.offset(row), vocabulary};
  }
};

// One number per row. Null: an optional tensor that was not given, all 0.
template <class T>
struct PerRow {
  const T* data = nullptr;
  int64_t rows = 0;
  Leading leading;

  __device__ __forceinline__ T operator[](int64_t row) const {
    FASTPPO_ASSERT(data == nullptr || (row >= 0 && row < rows), "row out of range");
    return data == nullptr ? T(0) : __ldg(data + leading.offset(row));
  }
};

// --- splitting rows over blocks
// -------------------------------------------------------------------------------------------

constexpr int64_t kRowBlocks = 512;      // fewer rows than these are split: 4 blocks on each of 128 multiprocessors
constexpr int64_t kMostBlocks = 1 << 20; // a launch; above, blocks take several tasks
constexpr int64_t kSplitColumns = 8 * kRowThreads; // parts begin at multiples of this: at whole vectors of any dtype

struct RowSplit {
  int64_t rows, columns;
  int64_t parts;   // of each row
  int64_t breadth; // columns of a part; the last may be shorter

  RowSplit(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    const int64_t pieces = (columns + kSplitColumns - 1) / kSplitColumns;
    const int64_t wanted = rows < kRowBlocks ? (kRowBlocks + rows - 1) / rows : 1;
    breadth = (pieces + wanted - 1) / wanted * kSplitColumns;
    parts = (columns + breadth - 1) / breadth;
  }

  unsigned blocks() const {
    const int64_t tasks = rows * parts;
    return static_cast<unsigned>(tasks < kMostBlocks ? tasks : kMostBlocks);
  }
};

// body(row, part of it, first column, columns) for the tasks of this block. All its threads come along.
template <class Body>
__device__ __forceinline__ void for_parts(const RowSplit& split, const Body& body) {
  for (int64_t task = blockIdx.x; task < split.rows * split.parts; task += gridDim.x) {
    const int64_t row = split.parts == 1 ? task : task / split.parts, part = task - row * split.parts;
    const int64_t first = part * split.breadth, left = split.columns - first;
    body(row, part, first, left < split.breadth ? left : split.breadth);
  }
}

// --- batches
// --------------------------------------------------------------------------------------------------------------

// A batch is what a thread has in registers at once: N logits in vectors that are kRowThreads vectors apart.
template <class T>
constexpr int kBatch = kRowVectors * kPerVector<T>;
template <class T>
constexpr int kHalfBatch = kBatch<T> / 2; // where there is more than one row in registers, or more blocks fit

// The 16 bytes that begin `behind` elements after `low`, of these and the next 16: behind is the same for a whole row.
template <class T>
__device__ __forceinline__ Vector<T> straddling(const Vector<T>& low, const Vector<T>& high, int behind) {
  uint32_t words[8];
  memcpy(words, &low, 16);
  memcpy(words + 4, &high, 16);
  const int bytes = behind * static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    words[i] = (bytes & 8) != 0 ? words[i + 2] : words[i];
  }
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    words[i] = (bytes & 4) != 0 ? words[i + 1] : words[i];
  }
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = (bytes & 2) != 0 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
    }
  }
  Vector<T> out;
  memcpy(&out, words, 16);
  return out;
}

/*
This thread's batch, its first vector at `first`; `fill` past the end of the part. In a row that does not begin on 16
bytes (an odd V) a vector is put together from the two aligned ones that it lies in, so a thread has the same elements
wherever the row lies; the second read of each finds it in the L1 cache. One by one only at the ends of the row.
*/
template <class X, int N>
__device__ __forceinline__ void load_batch(const Span<X>& part, int64_t first, float (&out)[N], float fill) {
  using T = std::remove_const_t<X>;
  constexpr int kPer = kPerVector<T>, kVectors = N / kPer;
  constexpr int64_t kApart = kRowThreads * kPer, kSpan = (kVectors - 1) * kApart + kPer;
  const auto behind = static_cast<int>(reinterpret_cast<uintptr_t>(part.data) % 16 / sizeof(T));
  const auto widen = [&](const Vector<T>(&vectors)[kVectors]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = to_float(vectors[i / kPer].data[i % kPer]);
    }
  };
  if (behind == 0 && first + kSpan <= part.size) {
    Vector<T> vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vectors[v] = load16(part, first + v * kApart);
    }
    widen(vectors);
  } else if (behind != 0 && first >= behind && first - behind + kPer + kSpan <= part.size) {
    Vector<T> vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t below = first - behind + v * kApart;
      vectors[v] = straddling(load16(part, below), load16(part, below + kPer), behind);
    }
    widen(vectors);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t column = first + i / kPer * kApart + i % kPer;
      out[i] = column < part.size ? to_float(part[column]) : fill;
    }
  }
}

// The other way; places past the end are left alone.
template <class T, int N>
__device__ __forceinline__ void store_batch(const Span<T>& part, int64_t first, const float (&x)[N]) {
  constexpr int kPer = kPerVector<T>;
  constexpr int64_t kApart = kRowThreads * kPer;
#pragma unroll
  for (int v = 0; v < N / kPer; ++v) {
    float values[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      values[i] = x[v * kPer + i];
    }
    store_floats(part, first + v * kApart, values);
  }
}

// body(first column of this thread's batch of N) over a part.
template <class T, int N = kBatch<T>, class Body>
__device__ __forceinline__ void for_batches(int64_t columns, const Body& body) {
  for (int64_t first = threadIdx.x * kPerVector<T>; first < columns; first += int64_t{kRowThreads} * N) {
    body(first);
  }
}

// How many elements before an address that is a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ int64_t unaligned_elements(const T* address) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T));
}

// out = map(x), by all threads of the block; x may be out. one(element, column) maps one element, and
// batch(values, first, rest) those of this thread's batch, which begins at `first` behind column `rest`.
template <class X, class T, class One, class Batch>
__device__ __forceinline__ void map_batches(const Span<X>& x, const Span<T>& out, const One& one, const Batch& batch) {
  // Which thread has which element changes nothing here: so the vectors may begin where the addresses allow it.
  int64_t head = unaligned_elements(out.data);
  head = head == unaligned_elements(x.data) && head < x.size ? head : 0;
  if (threadIdx.x < head) {
    const int64_t i = threadIdx.x;
    out[i] = from_float<T>(one(to_float(x[i]), i));
  }
  const Span<X> from = x.part(head, x.size - head);
  const Span<T> to = out.part(head, x.size - head);
  for_batches<T, kHalfBatch<T>>(from.size, [&](int64_t first) {
    float values[kHalfBatch<T>];
    load_batch(from, first, values, 0.0f);
    batch(values, first, head);
    store_batch(to, first, values);
  });
}

// out[i] = map(x[i], i), by all threads of the block; x may be out.
template <class X, class T, class Map>
__device__ __forceinline__ void map_row(const Span<X>& x, const Span<T>& out, const Map& map) {
  map_batches(x, out, map, [&](float (&values)[kHalfBatch<T>], int64_t first, int64_t rest) {
#pragma unroll
    for (int i = 0; i < kHalfBatch<T>; ++i) {
      constexpr int kPer = kPerVector<T>;
      values[i] = map(values[i], rest + first + i / kPer * (kRowThreads * kPer) + i % kPer);
    }
  });
}

template <class T>
__device__ __forceinline__ void write_zeros(const Span<T>& out) {
  const int64_t unaligned = unaligned_elements(out.data), head = unaligned < out.size ? unaligned : 0;
  if (threadIdx.x < head) {
    out[threadIdx.x] = from_float<T>(0.0f);
  }
  const Span<T> to = out.part(head, out.size - head);
  const float zeros[kHalfBatch<T>] = {};
  for_batches<T, kHalfBatch<T>>(to.size, [&](int64_t first) { store_batch(to, first, zeros); });
}

// --- sums
// -----------------------------------------------------------------------------------------------------------------

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x within 2 ulp, and 0 where that is below the normal numbers; 2^0 is 1. One special-function operation.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(FASTPPO_EMULATED)
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

constexpr float kLowest = -150.0f; // 2^t is 0 from here on

// What to subtract from logits with this maximum: -inf - -inf must not be formed.
__device__ __forceinline__ float finite_or_zero(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// log2(e) / temperature.
inline float base_2_scale(double inv_temperature) { return static_cast<float>(inv_temperature * kLog2E); }

// The sums of one thread. scale: base_2_scale().
struct ThreadSums {
  float reference = -kInfinity;
  float sum = 0, weighted = 0;

  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N], float scale) {
    constexpr float kMostQuick = 0x1p10f; // some 10 above the reference in t, where t is still within 5e-7
    float more, more_weighted;
    weigh<false>(x, reference, scale, more, more_weighted);
    if (!(more < kMostQuick && fabsf(more_weighted) < kInfinity)) {
      float highest = reference;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        highest = fmaxf(highest, x[i]); // passes over NaN, which the sum reports
      }
      rescale(highest, scale);
      weigh<true>(x, finite_or_zero(highest), scale, more, more_weighted);
    }
    sum += more;
    weighted += more_weighted;
  }

  // Makes the sums relative to a reference that is as high or higher.
  __device__ __forceinline__ void rescale(float higher, float scale) {
    const float shift = (reference - finite_or_zero(higher)) * scale, factor = exp2_approx(shift);
    weighted = factor == 0 ? 0 : factor * (weighted + shift * sum); // shift may be -inf
    sum *= factor;
    reference = higher;
  }

 private:
  template <bool kClamped, int N>
  __device__ __forceinline__ static void weigh(
      const float (&x)[N], float base, float scale, float& sum, float& weighted) {
    constexpr int kGroup = N % 8 == 0 ? 8 : N;
#pragma unroll
    for (int g = 0; g < N; g += kGroup) {
      float s, w;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float t = (x[g + i] - base) * scale, weight = exp2_approx(t);
        const float bounded = kClamped ? fmaxf(t, kLowest) : t; // -inf times its weight of 0
        s = i == 0 ? weight : s + weight;
        w = i == 0 ? bounded * weight : w + bounded * weight;
      }
      sum = g == 0 ? s : sum + s;
      weighted = g == 0 ? w : weighted + w;
    }
  }
};

struct TwoSums {
  double sum, weighted;
};

// The sums of all threads of the block, in every thread.
__device__ __forceinline__ SoftmaxSums block_sums(ThreadSums sums, float scale, double inv_temperature) {
  const auto higher = [](float a, float b) { return fmaxf(a, b); };
  sums.rescale(block_reduce<kRowThreads>(sums.reference, higher, -kInfinity), scale);
  const auto plus = [](const TwoSums& a, const TwoSums& b) { return TwoSums{a.sum + b.sum, a.weighted + b.weighted}; };
  const TwoSums total = block_reduce<kRowThreads>(TwoSums{sums.sum, sums.weighted}, plus, TwoSums{0, 0});
  return sums_in_nats(sums.reference, total.sum, total.weighted, inv_temperature, scale);
}

// The sums over a part of a row, in every thread. map(batch of N, its first column) turns what is read into logits.
template <int N, class X, class Map>
__device__ __forceinline__ SoftmaxSums
softmax_sums(const Span<X>& part, float scale, double inv_temperature, const Map& map) {
  ThreadSums sums;
  for_batches<std::remove_const_t<X>, N>(part.size, [&](int64_t first) {
    float x[N];
    load_batch(part, first, x, -kInfinity);
    map(x, first);
    sums.add(x, scale);
  });
  return block_sums(sums, scale, inv_temperature);
}

template <class X>
__device__ __forceinline__ SoftmaxSums softmax_sums(const Span<X>& part, float scale, double inv_temperature) {
  return softmax_sums<kBatch<std::remove_const_t<X>>>(part, scale, inv_temperature, [](auto&, int64_t) {});
}

/*
One row's parts, each written by a block of its own, merged by the last block to arrive, where this returns true with
the whole row's sums in all threads. `parts` has a place for every part of every row, `counters` one for every row.
merge(a, b) for part a before part b.
*/
template <class Sums, class Merge>
__device__ __forceinline__ bool merge_parts(
    const RowSplit& split, int64_t row, int64_t part, const Span<Sums>& parts, unsigned* counters, const Merge& merge,
    Sums& sums) {
  if (split.parts == 1) {
    return true;
  }
  if (threadIdx.x == 0) {
    parts[row * split.parts + part] = sums;
  }
  if (!is_last_block(counters + row, static_cast<unsigned>(split.parts))) {
    return false;
  }
  Sums mine;
  for (int64_t i = threadIdx.x; i < split.parts; i += kRowThreads) {
    const Sums other = parts[row * split.parts + i];
    mine = merge(mine, other);
  }
  sums = block_reduce<kRowThreads>(mine, merge, Sums());
  return true;
}

} // namespace fastppo::cuda
