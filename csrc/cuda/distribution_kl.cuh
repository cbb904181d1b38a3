/*
distribution_kl and its gradient: csrc/distribution_kl.h has the formulas, cuda/softmax.cuh the manner of the row loop.
logits, ref_logits: rows x V of one dtype, each at any distance and alignment.

Forward, one launch and one read of both rows together. In base 2, t = (logit - reference) log2(e) / temperature:
  per pair of logits: weights 2^tp and 2^tq, their sums, and 2^tp (tp - tq)        12 instructions, 2 of them 2^t
relative to two references of the thread's own that are raised only when they must be. Tokens that are impossible under
either distribution show as a sum that is not finite, and the careful loop takes them one way or the other.

Backward, one launch, one read of both, one write of what is needed. Rows without gradient are zeros and not read.
*/
#pragma once

#include "csrc/distribution_kl.h"
#include "cuda/softmax.cuh"

namespace fastppo::cuda {

struct References {
  float p, q;
};

struct KlSumsOfThread {
  References reference{-kInfinity, -kInfinity};
  float sum_p = 0, sum_q = 0, difference = 0;

  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N], const float (&y)[N], float scale) {
    constexpr float kMostQuick = 0x1p10f; // as in ThreadSums
    float more_p, more_q, more;
    weigh<false>(x, y, reference, scale, more_p, more_q, more);
    if (!(more_p < kMostQuick && more_q < kMostQuick && fabsf(more) < kInfinity)) {
      References highest = reference;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        highest.p = fmaxf(highest.p, x[i]);
        highest.q = fmaxf(highest.q, y[i]);
      }
      rescale(highest, scale);
      weigh<true>(x, y, {finite_or_zero(highest.p), finite_or_zero(highest.q)}, scale, more_p, more_q, more);
    }
    sum_p += more_p;
    sum_q += more_q;
    difference += more;
  }

  // Makes the sums relative to references that are as high or higher.
  __device__ __forceinline__ void rescale(const References& higher, float scale) {
    const float shift_q = (reference.q - finite_or_zero(higher.q)) * scale;
    difference -= sum_p == 0 ? 0.0f : shift_q * sum_p; // no mass: shift may be -inf
    sum_q *= exp2_approx(shift_q);
    const float shift_p = (reference.p - finite_or_zero(higher.p)) * scale, factor = exp2_approx(shift_p);
    difference = factor == 0 ? 0.0f : factor * (difference + (sum_p == 0 ? 0.0f : shift_p * sum_p));
    sum_p *= factor;
    reference = higher;
  }

 private:
  template <bool kCareful, int N>
  __device__ __forceinline__ static void weigh(
      const float (&x)[N], const float (&y)[N], const References& base, float scale, float& sum_p, float& sum_q,
      float& difference) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float raw = (x[i] - base.p) * scale, tq = (y[i] - base.q) * scale;
      const float p = exp2_approx(raw), q = exp2_approx(tq);
      const float tp = kCareful ? fmaxf(raw, kLowest) : raw;
      // Where p is 0 the factor may be infinite: drop it. Where only q is 0, the divergence is infinite.
      const float d = kCareful && p == 0 ? 0.0f : p * (tp - tq);
      sum_p = i == 0 ? p : sum_p + p;
      sum_q = i == 0 ? q : sum_q + q;
      difference = i == 0 ? d : difference + d;
    }
  }
};

struct ThreeSums {
  double p, q, difference;
};

// The sums of all threads of the block, in every thread.
__device__ __forceinline__ KlSums block_kl_sums(KlSumsOfThread sums, float scale, double inv_temperature) {
  const auto higher = [](const References& a, const References& b) {
    return References{fmaxf(a.p, b.p), fmaxf(a.q, b.q)};
  };
  sums.rescale(block_reduce<kRowThreads>(sums.reference, higher, References{-kInfinity, -kInfinity}), scale);
  const auto plus = [](const ThreeSums& a, const ThreeSums& b) {
    return ThreeSums{a.p + b.p, a.q + b.q, a.difference + b.difference};
  };
  const ThreeSums total =
      block_reduce<kRowThreads>(ThreeSums{sums.sum_p, sums.sum_q, sums.difference}, plus, ThreeSums{0, 0, 0});
  return {sums.reference.p, total.p, sums.reference.q, total.q, total.difference * (inv_temperature / scale)};
}

constexpr int64_t kKlStats = 4; // reference and log of the sum, of the policy and of the reference

template <class T>
struct DistributionKlArgs {
  LogitRows<T> logits, ref_logits;
  double inv_temperature;
  float scale;
  RowSplit split;
  Span<KlSums> parts;
  unsigned* counters;
  Span<float> kl, stats;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksPerMultiprocessor)
    distribution_kl_kernel(const DistributionKlArgs<T> args) {
  for_parts(args.split, [&](int64_t row, int64_t part, int64_t first, int64_t columns) {
    const Span<const T> x = args.logits[row].part(first, columns), y = args.ref_logits[row].part(first, columns);
    KlSumsOfThread mine;
    for_batches<T, kHalfBatch<T>>(columns, [&](int64_t column) {
      float p[kHalfBatch<T>], q[kHalfBatch<T>];
      load_batch(x, column, p, -kInfinity);
      load_batch(y, column, q, -kInfinity);
      mine.add(p, q, args.scale);
    });
    KlSums sums = block_kl_sums(mine, args.scale, args.inv_temperature);
    const auto merge = [&](KlSums a, const KlSums& b) {
      a.merge(b, args.inv_temperature);
      return a;
    };
    if (merge_parts(args.split, row, part, args.parts, args.counters, merge, sums) && threadIdx.x == 0) {
      // Relative to the references rounded to float32, which is how the backward gets them.
      const auto log_sum = [&](double sum, double reference) {
        return static_cast<float>(std::log(sum) + (reference - static_cast<float>(reference)) * args.inv_temperature);
      };
      args.kl[row] = static_cast<float>(sums.kl());
      args.stats[row * kKlStats] = static_cast<float>(sums.reference_p);
      args.stats[row * kKlStats + 1] = log_sum(sums.sum_p, sums.reference_p);
      args.stats[row * kKlStats + 2] = static_cast<float>(sums.reference_q);
      args.stats[row * kKlStats + 3] = log_sum(sums.sum_q, sums.reference_q);
    }
  });
}

// --- backward
// -------------------------------------------------------------------------------------------------------------

template <class T>
struct DistributionKlBackwardArgs {
  PerRow<float> grad_kl;
  LogitRows<T> logits, ref_logits;
  PerRow<float> kl;
  Span<const float> stats;
  double inv_temperature;
  RowSplit split;
  Span<T> dlogits, dref_logits; // null: a gradient nobody asked for
};

// KlGrad in base 2.
struct Base2KlGrad {
  References reference, log_sum;
  float scale, kl, grad, natural_grad;

  __device__ __forceinline__ explicit Base2KlGrad(const KlGrad& row)
      : reference{row.reference_p, row.reference_q},
        log_sum{static_cast<float>(row.log_sum_p * kLog2E), static_cast<float>(row.log_sum_q * kLog2E)},
        scale(static_cast<float>(row.inv_temperature * kLog2E)),
        kl(static_cast<float>(row.kl * kLog2E)),
        grad(row.scale),
        natural_grad(static_cast<float>(row.scale / kLog2E)) {}

  // x, y: logits in, their gradients out.
  __device__ __forceinline__ void operator()(float& x, float& y) const {
    const float log_p = fmaxf((x - reference.p) * scale - log_sum.p, kLowest);
    const float log_q = fmaxf((y - reference.q) * scale - log_sum.q, kLowest);
    const float p = exp2_approx(log_p), q = exp2_approx(log_q);
    x = natural_grad * p * (log_p - log_q - kl);
    y = grad * (q - p);
  }
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksPerMultiprocessor - 1) // two rows in, two out: 80 registers
    distribution_kl_backward_kernel(const DistributionKlBackwardArgs<T> args) {
  for_parts(args.split, [&](int64_t row, int64_t, int64_t first, int64_t columns) {
    const int64_t begin = row * args.split.columns + first;
    const Span<T> dx = args.dlogits ? args.dlogits.part(begin, columns) : Span<T>();
    const Span<T> dy = args.dref_logits ? args.dref_logits.part(begin, columns) : Span<T>();
    const float grad_kl = args.grad_kl[row];
    if (grad_kl == 0) {
      write_zeros(dx);
      write_zeros(dy);
      return;
    }
    const auto stat = [&](int64_t i) { return static_cast<float>(args.stats[row * kKlStats + i]); };
    const Base2KlGrad grad(
        KlGrad{
            stat(0), stat(1), stat(2), stat(3), args.kl[row], static_cast<float>(args.inv_temperature),
            static_cast<float>(grad_kl * args.inv_temperature)});
    const Span<const T> x = args.logits[row].part(first, columns), y = args.ref_logits[row].part(first, columns);
    for_batches<T, kHalfBatch<T>>(columns, [&](int64_t column) {
      float p[kHalfBatch<T>], q[kHalfBatch<T>];
      load_batch(x, column, p, 0.0f);
      load_batch(y, column, q, 0.0f);
#pragma unroll
      for (int i = 0; i < kHalfBatch<T>; ++i) {
        grad(p[i], q[i]);
      }
      if (dx) {
        store_batch(dx, column, p);
      }
      if (dy) {
        store_batch(dy, column, q);
      }
    });
  });
}

} // namespace fastppo::cuda
