/*
Vector loops of gae: see csrc/gae.h for the formulas. A row is taken in blocks of kBlock columns that are widened to
float32 first. The recursion itself is scalar: it is 4 cycles a token, and 64 x 53 tokens take a few microseconds.
*/
#include "cpu/vec/gae.h"

#include "cpu/vec/vec.h"

namespace fastppo::CPU_CAPABILITY {

void gae_rows(const GaeArgs& args, int64_t begin, int64_t end) {
  Block rewards, values;
  for (int64_t row = begin; row < end; ++row) {
    GaeCarry carry{0.0f, args.bootstrap_values ? args.bootstrap_values[row] : 0.0f};
    const bool* mask = args.mask.row(row);
    float* advantages = args.advantages + row * args.columns;
    float* returns = args.returns + row * args.columns;
    for (int64_t first = (args.columns - 1) / kBlock * kBlock; first >= 0; first -= kBlock) {
      const int64_t n = std::min(kBlock, args.columns - first);
      load(args.rewards, row, first, n, rewards);
      load(args.values, row, first, n, values);
      for (int64_t i = n - 1; i >= 0; --i) {
        const int64_t t = first + i;
        if (mask[t]) {
          advantages[t] = gae_step(carry, rewards.data[i], values.data[i], args.gamma, args.gamma_lam);
          returns[t] = advantages[t] + values.data[i];
        } else {
          advantages[t] = returns[t] = 0.0f;
        }
      }
    }
  }
}

void reward_rows(const RewardArgs& args, int64_t begin, int64_t end) {
  Block mask, logprobs, ref_logprobs;
  with_estimator(args.estimator, [&](auto estimator) {
    const Vec minus_coef(-args.kl_coef);
    for (int64_t row = begin; row < end; ++row) {
      float* rewards = args.rewards + row * args.columns;
      float* kl = args.kl + row * args.columns;
      for (int64_t first = 0; first < args.columns; first += kBlock) {
        const int64_t n = std::min(kBlock, args.columns - first);
        load_mask(args.mask, row, first, n, mask);
        load_selected(args.logprobs, row, first, n, mask, logprobs);
        load_selected(args.ref_logprobs, row, first, n, mask, ref_logprobs);
        for (int64_t i = 0; i < n; i += kLanes) {
          // Masked places hold 0 in both inputs, and every estimator is 0 at d = 0.
          const Vec token_kl = kl_estimate<decltype(estimator)::value>(logprobs.get(i) - ref_logprobs.get(i));
          token_kl.store(kl + first + i, lanes_left(n, i));
          (minus_coef * token_kl).store(rewards + first + i, lanes_left(n, i));
        }
      }
      int64_t last = args.columns - 1;
      while (last >= 0 && !args.mask.row(row)[last]) {
        --last;
      }
      if (last >= 0) {
        rewards[last] += vmax(-args.reward_clip, vmin(args.scores[row], args.reward_clip));
      }
    }
  });
}

void moments_of_block(const Rows& x, const MaskRows& mask_rows, int64_t row, int64_t begin, int64_t n, Moments& out) {
  Block mask, values;
  load_mask(mask_rows, row, begin, n, mask);
  load_selected(x, row, begin, n, mask, values);
  Vec count(0.0f), sum(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    count = count + mask.get(i);
    sum = sum + values.get(i);
  }
  out.count = sum_lanes(count);
  out.mean = out.count > 0 ? sum_lanes(sum) / out.count : 0.0;
  const Vec mean(static_cast<float>(out.mean)), zero(0.0f);
  Vec m2(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec distance = select(mask.get(i) > zero, values.get(i) - mean, zero);
    m2 = m2 + distance * distance;
  }
  out.m2 = sum_lanes(m2);
}

void standardize_block(
    const Rows& x, const MaskRows& mask_rows, int64_t row, int64_t begin, int64_t n, const Standardize& by,
    float* out) {
  Block mask, values;
  load_mask(mask_rows, row, begin, n, mask);
  load_selected(x, row, begin, n, mask, values);
  const Vec shift(by.shift), scale(by.scale), offset(by.offset), zero(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec y = select(mask.get(i) > zero, (values.get(i) - shift) * scale + offset, zero);
    y.store(out + i, lanes_left(n, i));
  }
}

} // namespace fastppo::CPU_CAPABILITY
