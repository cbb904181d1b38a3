/*
sample: csrc/sample.h has the rule, csrc/softmax.h the sums. One launch, one read of the logits when nothing truncates.
logits: rows x V of any of the three dtypes, any distance between rows. Results: one of each per row.

Split. A row is cut into tiles of neighbouring ids, one for each of the block's warps; where there are few rows, several
blocks share a row and the last to arrive finishes it. All of that follows from the shape. A lane takes kSampleBatch
logits of its warp's tile at a time, as 16-byte vectors 32 lanes apart: 64 bytes a thread (128 of float32) under way.

  1. Every warp: the sums of its tile and, when something truncates, the maximum of each lane's batch (V / 32 floats, a
     sixteenth of a bfloat16 row, which the L2 cache keeps). After this a batch is read again only where its maximum
says that it can matter.
  2. One block per row: merge the tiles; find where the ranking is cut; choose a tile by the masses of the tiles, and an
     id by reading that one tile again.

The cut is the key (rank_key) of the last kept token, found by radix selection: count and weigh the candidates of an
interval of keys in up to kBins equal parts, go on in the part in which the wanted count or mass is reached. Nothing is
gathered, so a row of which nearly everything is kept needs no more room than any other, only more reading.

Mass is an integer: a weight of 1 is `unit`, a power of two that leaves room for the sum of a row. Integer sums do not
depend on their order, so histograms can be filled by atomics and come out the same in every run; and 44 bits below the
best token there is less rounding in them than in float64 sums of float32 weights. Tokens of less than 2^-44 of the best
are never drawn from a truncated row; without truncation they are as likely as they should be, to 2^-60.

A row that is no distribution (NaN, +inf, only -inf) gets id -1 and NaN, for the host cannot be told from here.
*/
#pragma once

#include <cfloat>

#include "csrc/sample.h"
#include "cuda/softmax.cuh"

namespace fastppo::cuda {

constexpr int kSampleBatch = 32; // logits per lane and step
constexpr int64_t kSampleStep = 32 * kSampleBatch;
constexpr int kSampleWarps = 8;        // per block, at most
constexpr int kSampleSplits = 16;      // blocks per row, at most
constexpr int64_t kSampleBlocks = 512; // rows are split until there are this many: four for each of 128 multiprocessors
constexpr int kSampleTiles = kSampleWarps * kSampleSplits;
constexpr int64_t kTileUnit = 256; // 32 lanes of 8: whole vectors of every dtype
constexpr int kBinBits = 11;       // of a key, per step of a selection
constexpr int kBins = 1 << kBinBits;
constexpr float kDeepest = 105; // nats below the best token, from where on float32 weights are 0

struct SampleSplit {
  int64_t rows, vocabulary;
  int warps = 1, splits = 1; // warps per block, blocks per row
  int tiles;                 // per row
  int64_t tile;              // logits per tile; the last ones may be shorter, or empty
  int64_t batches;           // per lane and tile

  SampleSplit(int64_t rows, int64_t vocabulary) : rows(rows), vocabulary(vocabulary) {
    const int64_t steps = (vocabulary + kSampleStep - 1) / kSampleStep;
    while (warps < kSampleWarps && 2 * warps <= steps) {
      warps *= 2;
    }
    while (splits < kSampleSplits && rows * 2 * splits <= kSampleBlocks && 2 * splits * warps <= steps) {
      splits *= 2;
    }
    tiles = warps * splits;
    tile = ((vocabulary + tiles - 1) / tiles + kTileUnit - 1) / kTileUnit * kTileUnit;
    batches = (tile + kSampleStep - 1) / kSampleStep;
  }

  FASTPPO_HD int64_t maxima() const { return tiles * batches * 32; } // of a row
};

struct TileSums {
  double sum, weighted;
  float reference; // of the two sums
  float best;      // the highest logit; only when something truncates
};

template <class T>
struct SampleArgs {
  LogitRows<T> logits;
  PerRow<int64_t> counters;
  SampleSplit split;
  double inv_temperature;
  float scale;   // base_2_scale()
  int64_t top_k; // 0: off
  double top_p;  // 1: off
  float min_p;   // 0: off
  float unit;    // the mass of the best token where something truncates
  uint64_t seed;
  Span<int64_t> ids;
  Span<float> logprobs, sampling_logprobs, entropy;
  // Where rows are split: a place for every tile, a counter for every row.
  Span<TileSums> tiles;
  unsigned* arrived;
  Span<float> maxima; // of all rows, where something truncates
};

// --- logits
// ---------------------------------------------------------------------------------------------------------------

// The column of a lane's i-th logit in the step that begins at `first`.
template <class T>
__device__ __forceinline__ int64_t column_of(int64_t first, int i) {
  constexpr int kPer = kPerVector<T>;
  return first + (i / kPer * 32 + lane_id()) * kPer + i % kPer;
}

// kCount of a lane's logits of one step, from its i-th; -inf past the end of the tile.
template <class T, int kCount>
__device__ __forceinline__ void load_step(const Span<const T>& tile, int64_t first, int i, float (&x)[kCount]) {
  constexpr int kPer = kPerVector<T>;
  constexpr int kVectors = kCount / kPer;
  if (is_aligned(tile.data) && first + kSampleStep <= tile.size) {
    Vector<T> vectors[kVectors]; // all loads first
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vectors[v] = load16(tile, column_of<T>(first, i + v * kPer));
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      x[n] = to_float(vectors[n / kPer].data[n % kPer]);
    }
  } else {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float vector[kPer];
      load_floats(tile, column_of<T>(first, i + v * kPer), vector, -kInfinity);
#pragma unroll
      for (int n = 0; n < kPer; ++n) {
        x[v * kPer + n] = vector[n];
      }
    }
  }
}

// The maximum of every batch of a row. Each is read only by the thread that wrote it, or after is_last_block().
struct Maxima {
  Span<float> of_row;
  int64_t batches;

  __device__ __forceinline__ void set(int tile, int64_t batch, float x) const { of_row[place(tile, batch)] = x; }
  __device__ __forceinline__ float get(int tile, int64_t batch) const {
    const float x = of_row[place(tile, batch)];
    return x;
  }

 private:
  __device__ __forceinline__ int64_t place(int tile, int64_t batch) const {
    return (tile * batches + batch) * 32 + lane_id();
  }
};

template <class T>
struct SampleRow {
  Span<const T> logits;
  SampleSplit split;

  __device__ __forceinline__ int64_t begin(int tile) const {
    const int64_t column = tile * split.tile;
    return column < split.vocabulary ? column : split.vocabulary;
  }
  __device__ __forceinline__ Span<const T> tile(int tile) const {
    return logits.part(begin(tile), begin(tile + 1) - begin(tile));
  }
};

// --- sums of all threads of a block whose size is chosen at run time
// -------------------------------------------------------------------

// The sum over the threads before this one, and over all. All threads of the block must come.
template <class U>
__device__ __forceinline__ U sum_before(U x, U& total) {
  FASTPPO_SHARED(U, warps, kSampleWarps);
  U running = x;
#pragma unroll
  for (int n = 1; n < 32; n *= 2) {
    const U below = shuffle(running, (lane_id() - n) & 31);
    running += lane_id() >= n ? below : 0;
  }
  if (lane_id() == 31) {
    warps[warp_id()] = running;
  }
  __syncthreads();
  U before = running - x;
  total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
    const U sum = warps[w];
    before += w < warp_id() ? sum : 0;
    total += sum;
  }
  __syncthreads(); // warps may be written again by the next one
  return before;
}

// --- truncation
// -----------------------------------------------------------------------------------------------------------

// The float whose rank_key this is.
__device__ __forceinline__ float ranked(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The weight of tokens relative to one of them, and which are kept.
struct Weights {
  float reference, scale, unit;
  float min_p = 0;
  // Only when something truncates: the key of the cut, and how many tokens that have it are kept.
  uint32_t cut = 0;
  unsigned ties = 0;

  __device__ __forceinline__ float weight(float logit) const { return exp2_approx((logit - reference) * scale); }
  __device__ __forceinline__ uint64_t mass(float logit) const {
    const float w = weight(logit);
    return w >= min_p ? static_cast<uint64_t>(w * unit) : 0;
  }
};

struct Histogram {
  Shared<unsigned> counts, low, high; // low and high: the halves of a mass

  __device__ __forceinline__ explicit Histogram(const Shared<unsigned>& memory)
      : counts(memory), low(memory + kBins), high(memory + 2 * kBins) {}

  __device__ __forceinline__ void clear(int bins) const {
    for (int i = static_cast<int>(threadIdx.x); i < bins; i += static_cast<int>(blockDim.x)) {
      counts[i] = 0;
      low[i] = 0;
      high[i] = 0;
    }
  }
  __device__ __forceinline__ void add(int bin, unsigned count, uint64_t mass) const {
    atomicAdd(&counts[bin], count);
    // In two halves: shared memory has no 64-bit addition. Whoever wraps the lower half around carries.
    const auto lower = static_cast<unsigned>(mass);
    const unsigned old = atomicAdd(&low[bin], lower);
    atomicAdd(&high[bin], static_cast<unsigned>(mass >> 32) + (old + lower < old ? 1 : 0));
  }
  __device__ __forceinline__ unsigned count(int bin) const {
    const unsigned x = counts[bin];
    return x;
  }
  __device__ __forceinline__ uint64_t mass(int bin) const {
    const unsigned upper = high[bin], lower = low[bin];
    return static_cast<uint64_t>(upper) << 32 | lower;
  }
};
constexpr int64_t kHistogramBytes = 3 * kBins * sizeof(unsigned);

// How much is to be kept: tokens, or mass.
struct Wanted {
  bool mass;
  double target;

  __device__ __forceinline__ bool reached(unsigned count, uint64_t mass_so_far) const {
    return static_cast<double>(mass ? mass_so_far : count) >= target;
  }
};

// The token at which it is reached: its key, how many have that key, and what ranks before them. Where it is not
// reached, everything ranks before.
struct Selected {
  bool reached;
  uint32_t key;
  unsigned ties, count_before;
  uint64_t mass_before;
};

// Among keys in [lowest, highest]. each(lowest logit, body(logit)) walks over this thread's logits, at least those not
// below; mass_of(logit). All threads must come, and all get the result.
template <class Each, class MassOf>
__device__ __forceinline__ Selected select_by_rank(
    const Histogram& bins, const Each& each, const MassOf& mass_of, uint32_t lowest, uint32_t highest,
    const Wanted& wanted) {
  struct Found {
    int bin;
    unsigned count, count_before;
    uint64_t mass_before;
  };
  FASTPPO_SHARED(Found, shared_found, 1);
  Selected out{true, highest, 0, 0, 0};
  while (true) {
    const int width = highest == lowest ? 0 : 32 - __clz(static_cast<int>(highest - lowest));
    const int shift = width > kBinBits ? width - kBinBits : 0;
    const int used = static_cast<int>((highest - lowest) >> shift) + 1;
    bins.clear(used);
    if (threadIdx.x == 0) {
      shared_found[0] = Found{-1, 0, 0, 0};
    }
    __syncthreads();

    // Equal neighbours go in together: a row of equal logits would queue up at one bin.
    int bin = -1;
    unsigned count = 0;
    uint64_t mass = 0;
    each(ranked(lowest), [&](float logit) {
      const uint32_t key = rank_key(logit);
      if (key < lowest || key > highest) {
        return;
      }
      const int next = static_cast<int>((highest - key) >> shift);
      if (next != bin) {
        if (count > 0) {
          bins.add(bin, count, mass);
        }
        bin = next;
        count = 0;
        mass = 0;
      }
      ++count;
      mass += mass_of(logit);
    });
    if (count > 0) {
      bins.add(bin, count, mass);
    }
    __syncthreads();

    // The best rank in bin 0.
    const int per_thread = (used + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
    const int begin = static_cast<int>(threadIdx.x) * per_thread;
    const int end = begin + per_thread < used ? begin + per_thread : used;
    unsigned counts = 0, all_counts;
    uint64_t masses = 0, all_masses;
    for (int i = begin; i < end; ++i) {
      counts += bins.count(i);
      masses += bins.mass(i);
    }
    unsigned count_before = out.count_before + sum_before(counts, all_counts);
    uint64_t mass_before = out.mass_before + sum_before(masses, all_masses);
    if (!wanted.reached(count_before, mass_before) && wanted.reached(count_before + counts, mass_before + masses)) {
      for (int i = begin; i < end; ++i) {
        const unsigned more = bins.count(i);
        const uint64_t more_mass = bins.mass(i);
        if (wanted.reached(count_before + more, mass_before + more_mass)) {
          shared_found[0] = Found{i, more, count_before, mass_before};
          break;
        }
        count_before += more;
        mass_before += more_mass;
      }
    }
    __syncthreads();
    const Found found = shared_found[0];
    __syncthreads(); // cleared again by the next step
    if (found.bin < 0) {
      return {false, lowest, 0, out.count_before + all_counts, out.mass_before + all_masses};
    }
    out.count_before = found.count_before;
    out.mass_before = found.mass_before;
    highest -= static_cast<uint32_t>(found.bin) << shift;
    if (shift == 0) {
      out.key = highest;
      out.ties = found.count;
      return out;
    }
    const uint32_t depth = (1u << shift) - 1;
    lowest = highest - lowest > depth ? highest - depth : lowest;
  }
}

// body(logit) for those of this lane's logits of a tile that are not below `lowest`, which is not -inf.
template <class T, class Body>
__device__ __forceinline__ void for_candidates(
    const SampleRow<T>& row, const Maxima& maxima, int tile, float lowest, const Body& body) {
  constexpr int kAtOnce = 8;
  const Span<const T> logits = row.tile(tile);
  int64_t batch = 0;
  for (int64_t first = 0; first < logits.size; first += kSampleStep, ++batch) {
    if (maxima.get(tile, batch) < lowest) {
      continue;
    }
    unsigned found = 0;
#pragma unroll 1 // in parts: registers are what the callers are short of
    for (int begin = 0; begin < kSampleBatch; begin += kAtOnce) {
      float x[kAtOnce];
      load_step(logits, first, begin, x);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        found |= static_cast<unsigned>(x[i] >= lowest) << (begin + i);
      }
    }
    // Few are found, so `body` is there once, not 32 times, and reads its logit once more, from the L1 cache.
    for (; found != 0; found &= found - 1) {
      const T logit = logits[column_of<T>(first, __ffs(static_cast<int>(found)) - 1)];
      body(to_float(logit));
    }
  }
}

// Where top_k and top_p cut the row. `all`: the mass of the whole row, in units of the best token's. All threads come.
template <class T>
__device__ __forceinline__ Cutoff find_cut(
    const SampleArgs<T>& args, const SampleRow<T>& row, const Maxima& maxima, const Histogram& bins,
    const Weights& weights, double all) {
  const auto candidates = [&](float lowest, const auto& body) {
    for (int tile = warp_id(); tile < row.split.tiles; tile += row.split.warps) {
      for_candidates(row, maxima, tile, lowest, body);
    }
  };
  const auto mass_of = [&](float logit) { return static_cast<uint64_t>(weights.weight(logit) * weights.unit); };
  const auto below_best = [&](double nats) {
    return rank_key(fmaxf(static_cast<float>(weights.reference - nats / args.inv_temperature), -FLT_MAX));
  };
  const auto cut_at = [&](const Selected& last, double target) {
    const auto each = static_cast<double>(mass_of(ranked(last.key)));
    const auto ties = static_cast<int64_t>(last.ties);
    return Cutoff{last.key, each > 0 ? kept_ties(static_cast<double>(last.mass_before), each, target, ties) : ties};
  };
  const uint32_t highest = rank_key(weights.reference);
  if (args.top_k > 0) {
    const Wanted wanted{false, static_cast<double>(args.top_k)};
    // top_k batches have a logit that is at least this, so top_k logits are.
    const Selected bound = select_by_rank(
        bins,
        [&](float lowest, const auto& body) {
          for (int tile = warp_id(); tile < row.split.tiles; tile += row.split.warps) {
            int64_t batch = 0;
            for (int64_t first = row.begin(tile); first < row.begin(tile + 1); first += kSampleStep, ++batch) {
              const float highest_of_batch = maxima.get(tile, batch);
              if (highest_of_batch >= lowest) {
                body(highest_of_batch);
              }
            }
          }
        },
        [](float) { return uint64_t{0}; }, rank_key(-FLT_MAX), highest, wanted);
    const Selected last = select_by_rank(bins, candidates, mass_of, bound.key, highest, wanted);
    // Not reached: there are fewer tokens that can occur at all.
    Cutoff cut =
        last.reached ? Cutoff{last.key, args.top_k - static_cast<int64_t>(last.count_before)} : Cutoff{last.key - 1, 0};
    if (args.top_p < 1) {
      const uint64_t mass =
          last.mass_before + (last.reached ? static_cast<uint64_t>(cut.ties) * mass_of(ranked(last.key)) : 0);
      const double target = args.top_p * static_cast<double>(mass);
      cut.intersect(cut_at(select_by_rank(bins, candidates, mass_of, last.key, highest, Wanted{true, target}), target));
    }
    return cut;
  }
  if (args.top_p < 1) {
    // Most mass is near the maximum: look further below it only while what was found is not enough.
    const double target = args.top_p * all * static_cast<double>(weights.unit);
    for (float depth = 8; depth < 2 * kDeepest; depth *= 2) {
      const uint32_t lowest = below_best(fminf(depth, kDeepest));
      const Selected last = select_by_rank(bins, candidates, mass_of, lowest, highest, Wanted{true, target});
      if (last.reached) {
        return cut_at(last, target);
      }
    }
    return {below_best(kDeepest) - 1, 0};
  }
  // A little lower than min_p asks: the test on the weight decides.
  return {below_best(fmin(static_cast<double>(kDeepest), 1e-3 - log(static_cast<double>(args.min_p)))) - 1, 0};
}

// --- the draw
// -------------------------------------------------------------------------------------------------------------

// How many of `ties` tokens with the key of the cut are kept, after `before` others, where `kept` are in all.
__device__ __forceinline__ unsigned kept_of(unsigned ties, unsigned before, unsigned kept) {
  const unsigned left = kept > before ? kept - before : 0;
  return ties < left ? ties : left;
}

// The lowest id of a tile whose running mass exceeds `rest`. ties_before: tokens with the key of the cut in tiles
// before. All threads must come, and all get the result.
template <class T, bool kTruncates>
__device__ __forceinline__ int64_t draw_from_tile(
    const SampleRow<T>& row, int tile, const Weights& weights, uint64_t tie_mass, uint64_t rest, unsigned ties_before) {
  constexpr int kPerThread = 8;
  FASTPPO_SHARED(int, drawn, 1);
  FASTPPO_SHARED(int, last, 1);
  if (threadIdx.x == 0) {
    drawn[0] = -1;
    last[0] = 0;
  }
  __syncthreads();
  const Span<const T> logits = row.tile(tile);
  int last_possible = 0;
  for (int64_t base = 0; base < logits.size; base += int64_t{kPerThread} * blockDim.x) {
    const int64_t first = base + threadIdx.x * kPerThread;
    float x[kPerThread];
    load_floats(logits, first, x, -kInfinity);
    uint64_t mass = 0;
    unsigned ties = 0, all_ties = 0, own_ties_before = ties_before;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if constexpr (kTruncates) {
        const uint32_t key = rank_key(x[i]);
        mass += key > weights.cut ? weights.mass(x[i]) : 0;
        ties += key == weights.cut ? 1 : 0;
      } else {
        const float w = weights.weight(x[i]);
        mass += static_cast<uint64_t>(w * weights.unit);
        last_possible = w > 0 ? static_cast<int>(first) + i : last_possible;
      }
    }
    if constexpr (kTruncates) {
      own_ties_before += sum_before(ties, all_ties);
      mass += kept_of(ties, own_ties_before, weights.ties) * tie_mass;
    }
    uint64_t all_mass;
    const uint64_t before = sum_before(mass, all_mass);
    if (before <= rest && rest < before + mass) {
      uint64_t running = before;
      int place = -1;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if constexpr (kTruncates) {
          const uint32_t key = rank_key(x[i]);
          if (key > weights.cut) {
            running += weights.mass(x[i]);
          } else if (key == weights.cut) {
            running += kept_of(1, own_ties_before, weights.ties) * tie_mass;
            ++own_ties_before;
          }
        } else {
          running += static_cast<uint64_t>(weights.weight(x[i]) * weights.unit);
        }
        place = place < 0 && running > rest ? i : place;
      }
      drawn[0] = static_cast<int>(first) + place;
    }
    if (rest < all_mass) {
      break;
    }
    rest -= all_mass;
    ties_before += all_ties;
  }
  if constexpr (!kTruncates) {
    atomicMax(&last[0], last_possible); // the tile's own sum was rounded to above what its tokens add up to
  }
  __syncthreads();
  const int found = drawn[0], otherwise = last[0];
  return row.begin(tile) + (found >= 0 ? found : otherwise);
}

// --- the kernel
// -----------------------------------------------------------------------------------------------------------

// The sums of one tile, in all lanes of its warp.
template <class T, bool kTruncates>
__device__ __forceinline__ TileSums sum_tile(const SampleRow<T>& row, int tile, float scale, const Maxima& maxima) {
  const Span<const T> logits = row.tile(tile);
  ThreadSums sums;
  float best = -kInfinity;
  int64_t batch = 0;
  for (int64_t first = 0; first < logits.size; first += kSampleStep, ++batch) {
    float x[kSampleBatch];
    load_step(logits, first, 0, x);
    sums.add(x, scale);
    if constexpr (kTruncates) {
      float highest = x[0];
#pragma unroll
      for (int i = 1; i < kSampleBatch; ++i) {
        highest = fmaxf(highest, x[i]);
      }
      maxima.set(tile, batch, highest);
      best = fmaxf(best, highest);
    }
  }
  const float reference = warp_max(sums.reference);
  sums.rescale(reference, scale);
  return {
      warp_sum(static_cast<double>(sums.sum)), warp_sum(static_cast<double>(sums.weighted)), reference,
      kTruncates ? warp_max(best) : 0};
}

struct RowSums {
  double sum, weighted;
  float reference, best, unit;
  double all; // the sum relative to the best logit
};

// The sums of a row, and the mass of each tile in units that fill 60 bits. By one warp, a lane for every 32nd tile.
template <bool kTruncates>
__device__ __forceinline__ RowSums
merge_tiles(const Shared<TileSums>& tiles, int count, float scale, const Shared<uint64_t>& masses) {
  float reference = -kInfinity, best = -kInfinity;
  for (int i = lane_id(); i < count; i += 32) {
    const TileSums tile = tiles[i];
    reference = fmaxf(reference, tile.reference);
    best = fmaxf(best, tile.best);
  }
  reference = warp_max(reference);
  best = warp_max(best);
  const auto factor_of = [&](const TileSums& tile, double& shift) {
    shift = (static_cast<double>(tile.reference) - reference) * scale;
    return tile.sum == 0 ? 0 : exp2(shift); // a tile without tokens has no reference
  };
  double sum = 0, weighted = 0, shift;
  for (int i = lane_id(); i < count; i += 32) {
    const TileSums tile = tiles[i];
    const double factor = factor_of(tile, shift);
    sum += factor * tile.sum;
    weighted += factor == 0 ? 0 : factor * (tile.weighted + shift * tile.sum);
  }
  sum = warp_sum(sum);
  weighted = warp_sum(weighted);
  RowSums row{sum, weighted, reference, best, 0, 0};
  if constexpr (kTruncates) {
    row.all = sum * exp2((static_cast<double>(reference) - best) * scale);
  } else if (sum > 0) {
    int exponent;
    frexp(sum, &exponent);
    row.unit = static_cast<float>(ldexp(1.0, 60 - exponent));
    for (int i = lane_id(); i < count; i += 32) {
      const TileSums tile = tiles[i];
      const double mass = factor_of(tile, shift) * tile.sum * row.unit;
      masses[i] = static_cast<uint64_t>(mass);
    }
  }
  return row;
}

template <class T, bool kTruncates>
__global__ void __launch_bounds__(32 * kSampleWarps, kTruncates ? 3 : 4) sample_kernel(const SampleArgs<T> args) {
  const SampleSplit& split = args.split;
  const int64_t number = blockIdx.x / static_cast<unsigned>(split.splits); // of the row
  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(split.splits));
  const SampleRow<T> row{args.logits[number], split};
  FASTPPO_DYNAMIC_SHARED(unsigned, memory); // a histogram, when something truncates
  const Maxima maxima{
      kTruncates ? args.maxima.part(number * split.maxima(), split.maxima()) : Span<float>(), split.batches};

  FASTPPO_SHARED(TileSums, tiles, kSampleTiles);
  const int my_tile = part * split.warps + warp_id();
  const TileSums mine = sum_tile<T, kTruncates>(row, my_tile, args.scale, maxima);
  if (split.splits == 1) {
    if (lane_id() == 0) {
      tiles[my_tile] = mine;
    }
  } else {
    const Span<TileSums> all = args.tiles.part(number * split.tiles, split.tiles);
    if (lane_id() == 0) {
      all[my_tile] = mine;
    }
    if (!is_last_block(args.arrived + number, static_cast<unsigned>(split.splits))) {
      return;
    }
    for (int i = static_cast<int>(threadIdx.x); i < split.tiles; i += static_cast<int>(blockDim.x)) {
      const TileSums tile = all[i];
      tiles[i] = tile;
    }
  }
  __syncthreads();

  FASTPPO_SHARED(RowSums, shared_total, 1);
  FASTPPO_SHARED(uint64_t, masses, kSampleTiles);
  FASTPPO_SHARED(unsigned, ties, kSampleTiles);
  if (warp_id() == 0) {
    const RowSums merged = merge_tiles<kTruncates>(tiles, split.tiles, args.scale, masses);
    if (lane_id() == 0) {
      shared_total[0] = merged;
    }
  }
  __syncthreads();
  const RowSums total = shared_total[0]; // and once more at the end: registers are short in between
  if (!(total.sum > 0)) {
    if (threadIdx.x == 0) {
      args.ids[number] = -1;
      args.logprobs[number] = NAN;
      args.sampling_logprobs[number] = NAN;
      args.entropy[number] = NAN;
    }
    return;
  }

  Weights weights{total.reference, args.scale, total.unit};
  uint64_t tie_mass = 0;
  if constexpr (kTruncates) {
    weights.reference = total.best;
    weights.unit = args.unit;
    const Cutoff cut = find_cut(args, row, maxima, Histogram(memory), weights, total.all);
    weights.cut = cut.key;
    weights.ties = static_cast<unsigned>(cut.ties);
    weights.min_p = args.min_p;
    tie_mass = weights.ties > 0 ? weights.mass(ranked(weights.cut)) : 0;
    for (int tile = warp_id(); tile < split.tiles; tile += split.warps) {
      uint64_t mass = 0;
      unsigned count = 0;
      for_candidates(row, maxima, tile, fmaxf(ranked(weights.cut), -FLT_MAX), [&](float logit) {
        const uint32_t key = rank_key(logit);
        mass += key > weights.cut ? weights.mass(logit) : 0;
        count += key == weights.cut ? 1 : 0;
      });
      mass = warp_sum(mass);
      count = warp_sum(count);
      if (lane_id() == 0) {
        masses[tile] = mass;
        ties[tile] = count;
      }
    }
    __syncthreads();
  }

  // The tile in which the uniform falls. There are no more tiles than threads.
  struct Chosen {
    int tile;
    uint64_t rest;
    unsigned ties_before;
  };
  FASTPPO_SHARED(Chosen, shared_chosen, 1);
  uint64_t kept_mass, mass = 0;
  unsigned ties_before = 0, count = 0;
  const int my_place = static_cast<int>(threadIdx.x);
  if (my_place < split.tiles) {
    mass = masses[my_place];
  }
  if constexpr (kTruncates) {
    unsigned all_ties;
    if (my_place < split.tiles) {
      const unsigned of_tile = ties[my_place];
      count = of_tile;
    }
    ties_before = sum_before(count, all_ties);
    mass += kept_of(count, ties_before, weights.ties) * tie_mass;
  }
  const uint64_t before = sum_before(mass, kept_mass);
  // floor(u * kept_mass): a running sum of integers exceeds the one where it exceeds the other.
  const int64_t counter = args.counters[number];
  const double uniform = philox_uniform(args.seed, static_cast<uint64_t>(counter));
  const uint64_t target = __umul64hi(static_cast<uint64_t>(uniform * 0x1p53) << 11, kept_mass);
  if (before <= target && target < before + mass) {
    shared_chosen[0] = Chosen{my_place, target - before, ties_before};
  }
  __syncthreads();
  const Chosen chosen = shared_chosen[0];
  const int64_t id =
      draw_from_tile<T, kTruncates>(row, chosen.tile, weights, tie_mass, chosen.rest, chosen.ties_before);

  if (threadIdx.x == 0) {
    const T drawn = row.logits[id];
    const double logit = to_float(drawn);
    const RowSums again = shared_total[0];
    const SoftmaxSums sums = sums_in_nats(again.reference, again.sum, again.weighted, args.inv_temperature, args.scale);
    const double logprob = sums.logprob(logit, args.inv_temperature);
    args.ids[number] = id;
    args.logprobs[number] = static_cast<float>(logprob);
    args.sampling_logprobs[number] = static_cast<float>(
        kTruncates ? (logit - again.best) * args.inv_temperature -
                         log(static_cast<double>(kept_mass) / static_cast<double>(args.unit))
                   : logprob);
    args.entropy[number] = static_cast<float>(sums.entropy());
  }
}

} // namespace fastppo::cuda
