/*
gae, whiten, scale_to_unit_std and rewards_and_advantages on the CPU: checks, threads, registration.
Threads take whole rows in the scans and kBlock columns in the sums; partial sums are merged in order of position by one
thread. Reruns and other thread counts match bit for bit.
*/
#include "cpu/vec/gae.h"

#include "cpu/tensor.h"

#include <limits>

namespace fastppo {
namespace {

Moments moments(const Rows& x, const MaskRows& mask, Shape2d shape) {
  std::vector<Moments> parts(shape.rows * blocks_of(shape.columns));
  auto* of_block = FASTPPO_PICK(moments_of_block);
  for_each_block(shape, [&](int64_t row, int64_t first, int64_t n, int64_t block) {
    of_block(x, mask, row, first, n, parts[block]);
  });
  Moments total;
  for (const Moments& part : parts) {
    total = merge(total, part);
  }
  return total;
}

// out is contiguous and may be x itself.
void standardize(const Rows& x, const MaskRows& mask, Shape2d shape, bool keep_mean, float* out) {
  const Standardize by = standardize_by(moments(x, mask, shape), keep_mean);
  auto* of_block = FASTPPO_PICK(standardize_block);
  for_each_block(shape, [&](int64_t row, int64_t first, int64_t n, int64_t) {
    of_block(x, mask, row, first, n, by, out + row * shape.columns + first);
  });
}

Tensor standardized(const char* op, const Tensor& x, const Tensor& mask, bool keep_mean) {
  check_standardize(op, x, mask);
  const Tensor out = empty_float(x);
  standardize(HeldRows(x), HeldMask(mask), shape_2d(x), keep_mean, float_data(out));
  return out;
}

Tensor whiten_cpu(const Tensor& x, const Tensor& mask) { return standardized("whiten", x, mask, false); }

Tensor scale_to_unit_std_cpu(const Tensor& x, const Tensor& mask) {
  return standardized("scale_to_unit_std", x, mask, true);
}

// One float32 per row, in one piece.
Tensor per_row_floats(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, std::make_optional(ScalarType::Float)));
}

std::tuple<Tensor, Tensor> gae_cpu(
    const Tensor& rewards, const Tensor& values, const Tensor& response_mask, double gamma, double lam,
    const OptionalTensor& bootstrap_values) {
  check_gae(rewards, values, response_mask, gamma, lam, bootstrap_values);
  const HeldRows reward_rows(rewards), value_rows(values);
  const HeldMask mask(response_mask);
  const Tensor advantages = empty_float(rewards), returns = empty_float(rewards);
  const OptionalTensor bootstrap = bootstrap_values ? OptionalTensor(per_row_floats(*bootstrap_values)) : std::nullopt;
  const Shape2d shape = shape_2d(rewards);
  const GaeArgs args{
      reward_rows,
      value_rows,
      mask,
      bootstrap ? float_data(*bootstrap) : nullptr,
      shape.columns,
      static_cast<float>(gamma),
      static_cast<float>(gamma * lam),
      float_data(advantages),
      float_data(returns)};
  auto* rows = FASTPPO_PICK(gae_rows);
  for_rows(shape, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  return {advantages, returns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rewards_and_advantages_cpu(
    const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor& values,
    const Tensor& response_mask, double kl_coef, const std::string& estimator_name, std::optional<double> reward_clip,
    bool whiten_rewards, bool whiten_advantages, double gamma, double lam, const OptionalTensor& bootstrap_values) {
  const KlEstimator estimator = check_rewards_and_advantages(
      scores, logprobs, ref_logprobs, values, response_mask, kl_coef, estimator_name, reward_clip, gamma, lam,
      bootstrap_values);
  const HeldRows logprob_rows(logprobs), ref_rows(ref_logprobs);
  const HeldMask mask(response_mask);
  const Tensor score = per_row_floats(scores);
  const Tensor rewards = empty_float(logprobs), kl = empty_float(logprobs);
  const Shape2d shape = shape_2d(logprobs);
  const RewardArgs args{
      logprob_rows,
      ref_rows,
      mask,
      float_data(score),
      shape.columns,
      estimator,
      static_cast<float>(kl_coef),
      static_cast<float>(reward_clip.value_or(std::numeric_limits<double>::infinity())),
      float_data(rewards),
      float_data(kl)};
  auto* rows = FASTPPO_PICK(reward_rows);
  for_rows(shape, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  if (whiten_rewards) {
    standardize(HeldRows(rewards), mask, shape, /*keep_mean=*/true, float_data(rewards));
  }
  const auto [advantages, returns] = gae_cpu(rewards, values, response_mask, gamma, lam, bootstrap_values);
  if (whiten_advantages) {
    standardize(HeldRows(advantages), mask, shape, /*keep_mean=*/false, float_data(advantages));
  }
  return {rewards, kl, advantages, returns};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("gae", TORCH_BOX(&gae_cpu));
  m.impl("whiten", TORCH_BOX(&whiten_cpu));
  m.impl("scale_to_unit_std", TORCH_BOX(&scale_to_unit_std_cpu));
  m.impl("rewards_and_advantages", TORCH_BOX(&rewards_and_advantages_cpu));
}

} // namespace fastppo
