/*
The rows of ppo_loss_from_logits: csrc/ppo_loss_from_logits.h says what is computed, cuda/softmax.cuh has the row loops.
logits: rows x V of one dtype at any distance and alignment; dlogits: contiguous, of the same dtype.

A block per row. It reads the row once, sums it and keeps it in shared memory; one thread makes log-prob, entropy and
the slopes of the row's token from the sums; then the block writes dlogits from shared memory. A row for which there is
not room enough (227 KB of an H100's hold 115 thousand bfloat16 logits, the 99 KB of an L4 49 thousand) is held as far
as it goes, and the rest is read a second time, most likely from the L2 cache. Every element is computed by the same
formula from the same numbers wherever it comes from, so no bit depends on how much was held. A cluster of blocks could
hold longer rows on sm_90 and later; what it could save is the part read twice: 24 % of 151936 bfloat16 logits, an
eighth of the row's traffic if the cache kept none of it.

Then ppo_loss_kernel, a launch over what is per token, makes loss, metrics and the critic's gradients from log-probs and
entropies: 8 bytes per row written here and read there. Launches: this one, ppo_loss's, and before them one that counts
the tokens where the normalizer is not given.
*/
#pragma once

#include "cuda/logprobs.cuh"
#include "cuda/ppo_tokens.cuh"

namespace fastppo::cuda {

// For one block: tokens are few where each has a row of logits.
__global__ void __launch_bounds__(kPpoThreads)
    count_tokens_kernel(const MaskRows mask, const Span<long long> count, const Span<double> normalizer) {
  count_tokens(mask, count);
  if (threadIdx.x == 0) { // which wrote it
    const long long tokens = count[0];
    normalizer[0] = static_cast<double>(tokens > 1 ? tokens : 1);
  }
}

template <class T>
struct PpoRowsArgs {
  LogitRows<T> logits;
  PerRow<int64_t> ids;
  Rows logprobs, advantages, ref_logprobs; // the last without data where not given
  MaskRows mask;
  PpoSettings settings;
  Number normalizer;
  double inv_temperature;
  float scale;     // base_2_scale()
  int64_t held;    // logits of a row that shared memory has room for: whole vectors
  Span<T> dlogits; // without data where not asked for
  Span<float> new_logprobs, entropy;
};

// What a row's second half has to know, by the thread that found it out.
struct PpoRow {
  Base2Grad grad;
  float picked; // dlogits at the id
  bool is_zero;
};

// The batch that begins at `first`, as far as there is room.
template <class T>
__device__ __forceinline__ void hold_batch(
    const Shared<Vector<T>>& held, int64_t room, int64_t first, const float (&x)[kBatch<T>]) {
  constexpr int kPer = kPerVector<T>;
#pragma unroll
  for (int v = 0; v < kRowVectors; ++v) {
    const int64_t column = first + v * int64_t{kRowThreads} * kPer;
    if (column < room) {
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        vector.data[i] = from_float<T>(x[v * kPer + i]); // exact: it came from there
      }
      held[column / kPer] = vector;
    }
  }
}

// out[i] = map(held[i]), by all threads of the block. Stores are of 16 bytes wherever the row begins: where that is not
// at 16 bytes, as every second row of an odd vocabulary, elements are shifted on their way out of shared memory.
template <class T, class Map>
__device__ __forceinline__ void map_held(const Shared<Vector<T>>& held, const Span<T>& out, const Map& map) {
  constexpr int kPer = kPerVector<T>;
  const Shared<T> elements = shared_as<T>(held);
  const int64_t unaligned = unaligned_elements(out.data), head = unaligned < out.size ? unaligned : 0;
  if (threadIdx.x < head) {
    const T x = elements[threadIdx.x];
    out[threadIdx.x] = from_float<T>(map(to_float(x)));
  }
  const Span<T> to = out.part(head, out.size - head);
  for (int64_t first = threadIdx.x * int64_t{kPer}; first < to.size; first += int64_t{kRowThreads} * kPer) {
    float values[kPer];
    if (head == 0) {
      const Vector<T> vector = held[first / kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        values[i] = map(to_float(vector.data[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int64_t column = head + first + i;
        T x = from_float<T>(0.0f);
        if (column < out.size) {
          x = elements[column];
        }
        values[i] = map(to_float(x));
      }
    }
    store_floats(to, first, values);
  }
}

// By one thread, from the row's sums. Writes log-prob and entropy.
template <class T>
__device__ __forceinline__ PpoRow ppo_row(
    const PpoRowsArgs<T>& args, const PpoCoefficients& c, const Span<const T>& logits, int64_t row,
    const SoftmaxSums& sums) {
  const int64_t columns = args.mask.columns, id = args.ids[row];
  const bool in_range = id >= 0 && id < logits.size; // else NaN: the host, which could complain, does not wait
  const double picked = in_range ? to_float(logits[id]) : std::numeric_limits<float>::quiet_NaN();
  const auto logprob = static_cast<float>(sums.logprob(picked, args.inv_temperature));
  const auto entropy = static_cast<float>(sums.entropy());
  args.new_logprobs[row] = logprob;
  args.entropy[row] = entropy;
  const bool has_ref = static_cast<bool>(args.ref_logprobs);
  const float slope = ppo_slope(
      logprob, load_float(args.logprobs, row / columns, row % columns),
      load_float(args.advantages, row / columns, row % columns), has_ref,
      has_ref ? load_float(args.ref_logprobs, row / columns, row % columns) : 0.0f, args.settings.kl_estimator, c);
  const SoftmaxGrad grad(
      slope, c.entropy_scale, entropy, static_cast<float>(sums.reference),
      static_cast<float>(sums.log_sum_of_rounded(args.inv_temperature)), args.inv_temperature);
  return {
      Base2Grad(grad), in_range ? static_cast<float>(grad.picked(picked, slope)) : 0.0f,
      slope == 0 && c.entropy_scale == 0};
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) ppo_rows_kernel(const PpoRowsArgs<T> args) {
  FASTPPO_DYNAMIC_SHARED(Vector<T>, held);
  FASTPPO_SHARED(PpoCoefficients, coefficients, 1);
  FASTPPO_SHARED(PpoRow, found, 1);
  if (threadIdx.x == 0) { // which alone reads them
    coefficients[0] = PpoCoefficients(args.settings, given_normalizer(args.normalizer));
  }
  const int64_t vocabulary = args.logits.vocabulary, held_columns = args.held < vocabulary ? args.held : vocabulary;
  for (int64_t row = blockIdx.x; row < args.logits.rows; row += gridDim.x) {
    const bool counts = mask_at(args.mask, row / args.mask.columns, row % args.mask.columns);
    const Span<T> dlogits = args.dlogits ? args.dlogits.part(row * vocabulary, vocabulary) : Span<T>{};
    if (!counts) {
      if (args.dlogits) {
        write_zeros(dlogits);
      }
      if (threadIdx.x == 0) {
        args.new_logprobs[row] = 0;
        args.entropy[row] = 0;
      }
      continue;
    }
    const Span<const T> logits = args.logits[row];
    const SoftmaxSums sums = softmax_sums<kBatch<T>>(
        logits, args.scale, args.inv_temperature,
        [&](const auto& x, int64_t first) { hold_batch<T>(held, held_columns, first, x); });
    if (threadIdx.x == 0) {
      const PpoCoefficients c = coefficients[0];
      found[0] = ppo_row(args, c, logits, row, sums);
    }
    __syncthreads();
    const PpoRow mine = found[0];
    if (args.dlogits) {
      if (mine.is_zero) {
        write_zeros(dlogits);
      } else {
        map_held(held, dlogits.part(0, held_columns), mine.grad);
        if (held_columns < vocabulary) {
          const int64_t rest = vocabulary - held_columns;
          map_row(logits.part(held_columns, rest), dlogits.part(held_columns, rest), mine.grad);
        }
      }
    }
    __syncthreads(); // before the next row is held, and before the id's element is written again
    if (args.dlogits && !mine.is_zero && threadIdx.x == 0) {
      const int64_t id = args.ids[row];
      if (id >= 0 && id < vocabulary) {
        dlogits[id] = from_float<T>(mine.picked);
      }
    }
  }
}

// --- scale_
// ---------------------------------------------------------------------------------------------------------------

constexpr int kScaleThreads = 256;
constexpr int64_t kScaleBlocks = 1 << 11; // at most: where the factor is 1, starting them is all that is done

// x *= factor. Where the factor is 1 nothing is read or written: the host cannot know it without waiting.
template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const Span<T> x, const Number factor) {
  const auto by = static_cast<float>(factor.value());
  if (by == 1) {
    return;
  }
  constexpr int kPer = kPerVector<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kScaleThreads * kPer;
  for (int64_t first = (blockIdx.x * int64_t{kScaleThreads} + threadIdx.x) * kPer; first < x.size; first += step) {
    float values[kPer];
    load_floats(x, first, values, 0.0f);
#pragma unroll
    for (float& value : values) {
      value *= by;
    }
    store_floats(x, first, values);
  }
}

} // namespace fastppo::cuda
