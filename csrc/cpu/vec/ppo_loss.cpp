/*
Vector loops of ppo_loss: see csrc/ppo_loss.h for the formulas. One pass over a block gives its part of the loss, of
every metric, and all gradients: 45 bytes a token move with a critic, a reference and entropies in float32, against the
dozens of passes that eager torch makes. Float32 goes from the tensor into registers; other dtypes by way of a block.
Masked places are emptied on the way in, so all arithmetic on them is finite; what they would add is then dropped.

Vector instructions are what bounds it: 84 per 16 tokens for the policy's term and k3, two exponentials among them. On
one thread of an AVX-512 EPYC (2.6 GHz) all terms of [64, 512] take 54 us, two thirds of them in that loop, where
reading as much takes 19; sums across lanes and blocks are 2 %.
*/
#include "cpu/vec/ppo_loss.h"

#include "cpu/vec/vec.h"

namespace fastppo::CPU_CAPABILITY {
namespace {

// All ones in a lane whose token counts, else 0: `x & lanes` empties a place whatever it holds.
struct alignas(64) CountedLanes {
  int32_t data[kBlock];

  CountedLanes(const MaskRows& mask, int64_t row, int64_t begin, int64_t n) {
    // As bytes, which compilers turn into vector code; a bool they test one by one.
    const auto* source = reinterpret_cast<const uint8_t*>(mask.row(row) + begin);
    for (int64_t i = 0; i < n; ++i) {
      data[i] = source[i] != 0 ? -1 : 0;
    }
    std::fill(data + n, data + round_up(n), 0);
  }

  Vec get(int64_t i) const { return at::vec::cast<float, int32_t>(at::vec::Vectorized<int32_t>::loadu(data + i)); }
};

// One block of an input: float32 where it lies, other dtypes widened.
struct Input {
  const float* data;
  Block block;

  Input(const Rows& rows, int64_t row, int64_t begin, int64_t n) {
    if (rows.dtype == DType::kFloat32) {
      data = static_cast<const float*>(rows.data) + row * rows.stride + begin;
    } else {
      load(rows, row, begin, n, block);
      data = block.data;
    }
  }

  Vec get(int64_t i, int64_t lanes) const { return Vec::loadu(data + i, lanes); }
};

// f(first, lanes) over n columns. Lanes are a constant except in the last, incomplete vector.
template <class Function>
void for_vectors(int64_t n, const Function& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    f(i, std::integral_constant<int64_t, kLanes>());
  }
  if (i < n) {
    f(i, n - i);
  }
}

void store(const Vec& x, float* out, int64_t i, int64_t lanes) {
  if (out != nullptr) {
    x.store(out + i, lanes);
  }
}

struct NoKl {};

// With the KL to the reference, whose slope adds to the same gradient.
template <bool IsCapped, class Kl>
void policy(
    const PpoArgs& args, const CountedLanes& counted, int64_t row, int64_t begin, int64_t n, float* grad, Kl,
    PpoSums& sums) {
  constexpr bool kHasKl = !std::is_same_v<Kl, NoKl>;
  const PpoCoefficients& c = args.coefficients;
  const Input new_logprobs(args.new_logprobs, row, begin, n), logprobs(args.logprobs, row, begin, n);
  const Input advantages(args.advantages, row, begin, n),
      refs(kHasKl ? args.ref_logprobs : args.logprobs, row, begin, n);
  const Vec half(0.5f), low(c.ratio_low), high(c.ratio_high), policy_scale(c.policy_scale), kl_scale(c.kl_scale);
  Vec loss(0.0f), approx_kl(0.0f), clipped(0.0f), ratio_sum(0.0f), ratio_max(0.0f), kl(0.0f);
  for_vectors(n, [&](int64_t i, auto lanes) {
    const Vec counts = counted.get(i), new_logprob = new_logprobs.get(i, lanes) & counts;
    const Vec log_ratio = new_logprob - (logprobs.get(i, lanes) & counts);
    const Vec ratio = vexp(log_ratio) & counts, advantage = advantages.get(i, lanes) & counts;
    auto term = policy_term(ratio, advantage, low, high);
    if constexpr (IsCapped) {
      term = capped(term, advantage, c.dual_clip);
    }
    Vec slope = term.slope * policy_scale;
    loss = loss + term.loss;
    approx_kl = approx_kl + half * log_ratio * log_ratio;
    clipped = clipped + (term.clipped & counts);
    ratio_sum = ratio_sum + ratio;
    ratio_max = vmax(ratio_max, ratio);
    if constexpr (kHasKl) {
      const Vec d = new_logprob - (refs.get(i, lanes) & counts); // 0 where masked, and so is every estimate
      kl = kl + kl_estimate<Kl::value>(d);
      slope = slope + kl_scale * kl_slope<Kl::value>(d);
    }
    store(slope & counts, grad, i, lanes); // k1 has slope 1 even at d = 0
  });
  sums.of[kPolicyLoss] = sum_lanes(loss);
  sums.of[kKl] = sum_lanes(kl);
  sums.of[kApproxKl] = sum_lanes(approx_kl);
  sums.of[kClipped] = sum_lanes(clipped);
  sums.of[kRatio] = sum_lanes(ratio_sum);
  float largest[kLanes];
  ratio_max.store(largest);
  for (const float lane : largest) {
    sums.of[kRatioMax] = fastppo::vmax(static_cast<float>(sums.of[kRatioMax]), lane);
  }
}

void critic(
    const PpoArgs& args, const CountedLanes& counted, int64_t row, int64_t begin, int64_t n, float* grad,
    PpoSums& sums) {
  const Input new_values(args.new_values, row, begin, n), values(args.values, row, begin, n);
  const Input returns(args.returns, row, begin, n);
  const Vec scale(args.coefficients.value_scale);
  Vec loss(0.0f), clipped(0.0f);
  for_vectors(n, [&](int64_t i, auto lanes) {
    const Vec counts = counted.get(i); // masked places hold 0, 0, 0: no error, no slope
    const auto term = value_term(
        new_values.get(i, lanes) & counts, values.get(i, lanes) & counts, returns.get(i, lanes) & counts,
        args.coefficients.value_clip_range);
    loss = loss + term.loss;
    clipped = clipped + term.clipped;
    store(scale * term.slope, grad, i, lanes);
  });
  sums.of[kValueLoss] = sum_lanes(loss);
  sums.of[kValueClipped] = sum_lanes(clipped);
}

void entropy(
    const PpoArgs& args, const CountedLanes& counted, int64_t row, int64_t begin, int64_t n, float* grad,
    PpoSums& sums) {
  const Input entropies(args.entropy, row, begin, n);
  const Vec scale(args.coefficients.entropy_scale);
  Vec sum(0.0f);
  for_vectors(n, [&](int64_t i, auto lanes) {
    const Vec counts = counted.get(i);
    sum = sum + (entropies.get(i, lanes) & counts);
    store(scale & counts, grad, i, lanes);
  });
  sums.of[kEntropy] = sum_lanes(sum);
}

} // namespace

void ppo_loss_block(const PpoArgs& args, int64_t row, int64_t begin, int64_t n, PpoSums& sums) {
  const int64_t offset = row * args.columns + begin;
  const auto at = [&](float* grad) { return grad != nullptr ? grad + offset : nullptr; };
  const CountedLanes counted(args.mask, row, begin, n);
  const auto with_kl = [&](auto kl) {
    float* grad = at(args.grad_logprobs);
    if (std::isinf(args.coefficients.dual_clip)) {
      policy<false>(args, counted, row, begin, n, grad, kl, sums);
    } else {
      policy<true>(args, counted, row, begin, n, grad, kl, sums);
    }
  };
  if (args.ref_logprobs) {
    with_estimator(args.kl_estimator, with_kl);
  } else {
    with_kl(NoKl());
  }
  if (args.new_values) {
    critic(args, counted, row, begin, n, at(args.grad_values), sums);
  }
  if (args.entropy) {
    entropy(args, counted, row, begin, n, at(args.grad_entropy), sums);
  }
}

} // namespace fastppo::CPU_CAPABILITY
