// gae, whiten, scale_to_unit_std and rewards_and_advantages on CUDA: checks, launches, registration.
#include "cuda/gae.cuh"

#include "cuda/tensor.h"

#include <algorithm>
#include <limits>

namespace fastppo::cuda {
namespace {

// From the shape alone, never from the device: each block is one part of a statistic.
unsigned blocks_for(int64_t tasks) {
  return static_cast<unsigned>(std::clamp<int64_t>((tasks + kGaeWarps - 1) / kGaeWarps, 1, kGaeBlocks));
}

int64_t chunks_of(int64_t columns) { return (columns + kGaeChunk - 1) / kGaeChunk; }

// Room for a Moments per block. Every part that is read was written by the launch before.
struct Parts {
  Tensor held;
  int64_t blocks;

  Parts(const Tensor& like, int64_t blocks, int64_t statistics)
      : held(allocate(like, blocks * statistics)), blocks(blocks) {}

  Span<Moments> operator[](int64_t statistic) const {
    return {static_cast<Moments*>(held.mutable_data_ptr()) + statistic * blocks, blocks};
  }

 private:
  static Tensor allocate(const Tensor& like, int64_t count) {
    static_assert(sizeof(Moments) == 3 * sizeof(double));
    const int64_t doubles[] = {3 * count};
    return torch::stable::new_empty(like, Sizes(doubles, 1), std::make_optional(ScalarType::Double));
  }
};

Tensor standardized_cuda(const char* op, const Tensor& x, const Tensor& mask, bool keep_mean) {
  check_standardize(op, x, mask);
  const Tensor out = empty_float(x);
  const Shape2d shape(x);
  if (shape.count() == 0) {
    return out;
  }
  const OnDevice on(x);
  const HeldRows rows(x);
  const HeldMask mask_rows(mask);
  const bool one_block = shape.count() <= kOneBlockTokens;
  const unsigned blocks = one_block ? 1 : blocks_for(shape.rows * chunks_of(shape.columns));
  const Parts parts(x, blocks, 1);
  const StandardizeArgs args{rows, mask_rows, keep_mean, floats(out), parts[0]};
  if (one_block) {
    FASTPPO_LAUNCH(standardize_kernel, blocks, kGaeThreads, 0, on.stream, args, kMeasure, kStandardize);
  } else {
    FASTPPO_LAUNCH(standardize_kernel, blocks, kGaeThreads, 0, on.stream, args, kMeasure, kMeasure);
    FASTPPO_LAUNCH(standardize_kernel, blocks, kGaeThreads, 0, on.stream, args, kStandardize, kStandardize);
  }
  return out;
}

Tensor whiten_cuda(const Tensor& x, const Tensor& mask) { return standardized_cuda("whiten", x, mask, false); }

Tensor scale_to_unit_std_cuda(const Tensor& x, const Tensor& mask) {
  return standardized_cuda("scale_to_unit_std", x, mask, true);
}

std::tuple<Tensor, Tensor> gae_cuda(
    const Tensor& rewards, const Tensor& values, const Tensor& response_mask, double gamma, double lam,
    const OptionalTensor& bootstrap_values) {
  check_gae(rewards, values, response_mask, gamma, lam, bootstrap_values);
  const Tensor advantages = empty_float(rewards), returns = empty_float(rewards);
  const Shape2d shape(rewards);
  if (shape.count() == 0) {
    return {advantages, returns};
  }
  const OnDevice on(rewards);
  const HeldRows reward_rows(rewards), value_rows(values), bootstrap = HeldRows::per_row(bootstrap_values);
  const HeldMask mask(response_mask);
  const GaeArgs args{
      reward_rows,        value_rows,     mask, bootstrap, static_cast<float>(gamma), static_cast<float>(gamma * lam),
      floats(advantages), floats(returns)};
  FASTPPO_LAUNCH(gae_kernel, blocks_for(shape.rows), kGaeThreads, 0, on.stream, args);
  return {advantages, returns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rewards_and_advantages_cuda(
    const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor& values,
    const Tensor& response_mask, double kl_coef, const std::string& estimator_name, std::optional<double> reward_clip,
    bool whiten_rewards, bool whiten_advantages, double gamma, double lam, const OptionalTensor& bootstrap_values) {
  const KlEstimator estimator = check_rewards_and_advantages(
      scores, logprobs, ref_logprobs, values, response_mask, kl_coef, estimator_name, reward_clip, gamma, lam,
      bootstrap_values);
  const Tensor rewards = empty_float(logprobs), kl = empty_float(logprobs);
  const Tensor advantages = empty_float(logprobs), returns = empty_float(logprobs);
  const Shape2d shape(logprobs);
  if (shape.count() == 0) {
    return {rewards, kl, advantages, returns};
  }
  const OnDevice on(logprobs);
  const HeldRows logprob_rows(logprobs), ref_rows(ref_logprobs), value_rows(values);
  const HeldRows score_rows = HeldRows::per_row(scores), bootstrap = HeldRows::per_row(bootstrap_values);
  const HeldMask mask(response_mask);

  const int first = whiten_rewards ? kShapeRewards : kAdvantages;
  const int last = whiten_advantages ? kWhitenAdvantages : kAdvantages;
  const bool one_block = first != last && shape.count() <= kOneBlockTokens;
  const unsigned blocks = one_block ? 1 : blocks_for(shape.rows);
  const Parts parts(logprobs, blocks, 2);
  const RewardsAndAdvantagesArgs args{
      score_rows,
      logprob_rows,
      ref_rows,
      value_rows,
      mask,
      bootstrap,
      estimator,
      static_cast<float>(kl_coef),
      static_cast<float>(reward_clip.value_or(std::numeric_limits<double>::infinity())),
      whiten_rewards,
      whiten_advantages,
      static_cast<float>(gamma),
      static_cast<float>(gamma * lam),
      floats(rewards),
      floats(kl),
      floats(advantages),
      floats(returns),
      parts[0],
      parts[1]};
  for (int phase = first; phase <= last; phase = one_block ? last + 1 : phase + 1) {
    FASTPPO_LAUNCH(
        rewards_and_advantages_kernel, blocks, kGaeThreads, 0, on.stream, args, phase, one_block ? last : phase);
  }
  return {rewards, kl, advantages, returns};
}

} // namespace

FASTPPO_CUDA_IMPL(m) {
  m.impl("gae", TORCH_BOX(&gae_cuda));
  m.impl("whiten", TORCH_BOX(&whiten_cuda));
  m.impl("scale_to_unit_std", TORCH_BOX(&scale_to_unit_std_cuda));
  m.impl("rewards_and_advantages", TORCH_BOX(&rewards_and_advantages_cuda));
}

} // namespace fastppo::cuda
