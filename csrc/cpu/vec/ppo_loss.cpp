/*
Vector loop of ppo_loss: see csrc/ppo_loss.h for the formulas. One pass over a block gives its part of the loss, of
every metric, and all gradients: about 37 bytes a token move, against the dozens of passes that eager torch makes.
Masked places are emptied on the way in, so all arithmetic on them is finite; what they would add is then dropped.
*/
#include "cpu/vec/ppo_loss.h"

#include "cpu/vec/vec.h"

namespace fastppo::CPU_CAPABILITY {

void ppo_loss_block(const PpoArgs& args, int64_t row, int64_t begin, int64_t n, PpoSums& sums) {
  const int64_t offset = row * args.columns + begin;
  const PpoCoefficients& c = args.coefficients;
  const Vec zero(0.0f), half(0.5f);
  Block mask_block, new_logprobs, logprobs, advantages, slopes;
  load_mask(args.mask, row, begin, n, mask_block);
  load_selected(args.new_logprobs, row, begin, n, mask_block, new_logprobs);
  load_selected(args.logprobs, row, begin, n, mask_block, logprobs);
  load_selected(args.advantages, row, begin, n, mask_block, advantages);

  const Vec low(c.ratio_low), high(c.ratio_high), policy_scale(c.policy_scale);
  Vec policy_loss(0.0f), approx_kl(0.0f), clipped(0.0f), ratio_sum(0.0f), ratio_max(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const auto counts = mask_block.get(i) > zero;
    const Vec log_ratio = new_logprobs.get(i) - logprobs.get(i);
    const Vec ratio = select(counts, vexp(log_ratio), zero);
    const auto term = policy_term(ratio, advantages.get(i), low, high, c.dual_clip);
    slopes.set(i, term.slope * policy_scale);
    policy_loss = policy_loss + term.loss;
    approx_kl = approx_kl + half * log_ratio * log_ratio;
    clipped = clipped + select(counts, term.clipped, zero);
    ratio_sum = ratio_sum + ratio;
    ratio_max = vmax(ratio_max, ratio);
  }
  sums.of[kPolicyLoss] = sum_lanes(policy_loss);
  sums.of[kApproxKl] = sum_lanes(approx_kl);
  sums.of[kClipped] = sum_lanes(clipped);
  sums.of[kRatio] = sum_lanes(ratio_sum);
  float lanes[kLanes];
  ratio_max.store(lanes);
  float largest = 0.0f;
  for (const float lane : lanes) {
    largest = fastppo::vmax(largest, lane);
  }
  sums.of[kRatioMax] = largest;

  if (args.ref_logprobs) {
    Block& ref_logprobs = logprobs; // no longer needed
    load_selected(args.ref_logprobs, row, begin, n, mask_block, ref_logprobs);
    with_estimator(args.kl_estimator, [&](auto estimator) {
      constexpr KlEstimator kEstimator = decltype(estimator)::value;
      const Vec scale(c.kl_scale);
      Vec kl(0.0f);
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec d = new_logprobs.get(i) - ref_logprobs.get(i); // 0 where masked, and so is every estimate
        kl = kl + kl_estimate<kEstimator>(d);
        slopes.set(i, slopes.get(i) + scale * kl_slope<kEstimator>(d));
      }
      sums.of[kKl] = sum_lanes(kl);
    });
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec grad = select(mask_block.get(i) > zero, slopes.get(i), zero); // k1 has slope 1 even at d = 0
    grad.store(args.grad_logprobs + offset + i, lanes_left(n, i));
  }

  if (args.new_values) {
    Block &new_values = new_logprobs, &values = logprobs, &returns = advantages; // no longer needed
    load_selected(args.new_values, row, begin, n, mask_block, new_values);
    load_selected(args.values, row, begin, n, mask_block, values);
    load_selected(args.returns, row, begin, n, mask_block, returns);
    const Vec scale(c.value_scale);
    Vec value_loss(0.0f), value_clipped(0.0f);
    for (int64_t i = 0; i < n; i += kLanes) {
      // Masked places hold 0, 0, 0: no error, no slope.
      const auto term = value_term(new_values.get(i), values.get(i), returns.get(i), c.value_clip_range);
      value_loss = value_loss + term.loss;
      value_clipped = value_clipped + term.clipped;
      (scale * term.slope).store(args.grad_values + offset + i, lanes_left(n, i));
    }
    sums.of[kValueLoss] = sum_lanes(value_loss);
    sums.of[kValueClipped] = sum_lanes(value_clipped);
  }

  if (args.entropy) {
    Block& entropy = new_logprobs; // no longer needed
    load_selected(args.entropy, row, begin, n, mask_block, entropy);
    const Vec scale(c.entropy_scale);
    Vec entropy_sum(0.0f);
    for (int64_t i = 0; i < n; i += kLanes) {
      entropy_sum = entropy_sum + entropy.get(i);
      (scale * mask_block.get(i)).store(args.grad_entropy + offset + i, lanes_left(n, i));
    }
    sums.of[kEntropy] = sum_lanes(entropy_sum);
  }
}

} // namespace fastppo::CPU_CAPABILITY
