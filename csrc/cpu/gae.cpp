/*
gae, whiten, scale_to_unit_std and rewards_and_advantages on the CPU: checks, threads, registration.
Threads take whole rows in the scans and kBlock columns in the sums; partial sums are merged in order of position by one
thread. Reruns and other thread counts match bit for bit. rewards_and_advantages does all it can for a row while the row
is in the cache, and wakes the threads once, and once more for each whitening.
*/
#include "cpu/vec/gae.h"

#include "cpu/tensor.h"

#include <limits>

namespace fastppo {
namespace {

// Sums by blocks, of any rows in any order, and their merged total.
class BlockMoments {
 public:
  BlockMoments(const MaskRows& mask, Shape2d shape)
      : mask_(mask), columns_(shape.columns), parts_(shape.rows * blocks_of(shape.columns)) {}

  void add_block(const Rows& x, int64_t row, int64_t first, int64_t n) {
    of_block_(x, mask_, row, first, n, parts_[row * blocks_of(columns_) + first / kBlock]);
  }

  void add_row(const Rows& x, int64_t row) {
    for (int64_t first = 0; first < columns_; first += kBlock) {
      add_block(x, row, first, std::min(kBlock, columns_ - first));
    }
  }

  Moments total() const {
    Moments total;
    for (const Moments& part : parts_) {
      total = merge(total, part);
    }
    return total;
  }

 private:
  decltype(FASTPPO_PICK(moments_of_block)) of_block_ = FASTPPO_PICK(moments_of_block);
  MaskRows mask_;
  int64_t columns_;
  std::vector<Moments> parts_;
};

// out is contiguous and may be x itself.
void standardize(const Rows& x, const MaskRows& mask, Shape2d shape, const Standardize& by, float* out) {
  auto* of_block = FASTPPO_PICK(standardize_block);
  for_each_block(shape, [&](int64_t row, int64_t first, int64_t n, int64_t) {
    of_block(x, mask, row, first, n, by, out + row * shape.columns + first);
  });
}

Tensor standardized(const char* op, const Tensor& x, const Tensor& mask, bool keep_mean) {
  check_standardize(op, x, mask);
  const Tensor out = empty_float(x);
  const HeldRows rows(x);
  const HeldMask held_mask(mask);
  const Shape2d shape = shape_2d(x);
  BlockMoments moments(held_mask, shape);
  for_each_block(
      shape, [&](int64_t row, int64_t first, int64_t n, int64_t) { moments.add_block(rows, row, first, n); });
  standardize(rows, held_mask, shape, standardize_by(moments.total(), keep_mean), float_data(out));
  return out;
}

Tensor whiten_cpu(const Tensor& x, const Tensor& mask) { return standardized("whiten", x, mask, false); }

Tensor scale_to_unit_std_cpu(const Tensor& x, const Tensor& mask) {
  return standardized("scale_to_unit_std", x, mask, true);
}

std::tuple<Tensor, Tensor> gae_cpu(
    const Tensor& rewards, const Tensor& values, const Tensor& response_mask, double gamma, double lam,
    const OptionalTensor& bootstrap_values) {
  check_gae(rewards, values, response_mask, gamma, lam, bootstrap_values);
  const HeldRows reward_rows(rewards), value_rows(values);
  const HeldMask mask(response_mask);
  const Tensor advantages = empty_float(rewards), returns = empty_float(rewards);
  const RowFloats bootstrap(bootstrap_values);
  const Shape2d shape = shape_2d(rewards);
  const GaeArgs args{
      reward_rows,
      value_rows,
      mask,
      bootstrap.data,
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
  const HeldRows logprob_rows(logprobs), ref_rows(ref_logprobs), value_rows(values);
  const HeldMask mask(response_mask);
  const RowFloats score(scores), bootstrap(bootstrap_values);
  const Tensor rewards = empty_float(logprobs), kl = empty_float(logprobs);
  const Tensor advantages = empty_float(logprobs), returns = empty_float(logprobs);
  const Shape2d shape = shape_2d(logprobs);
  const RewardArgs reward_args{
      logprob_rows,
      ref_rows,
      mask,
      score.data,
      shape.columns,
      estimator,
      static_cast<float>(kl_coef),
      static_cast<float>(reward_clip.value_or(std::numeric_limits<double>::infinity())),
      float_data(rewards),
      float_data(kl)};
  const Rows made_rewards{float_data(rewards), shape.columns, DType::kFloat32};
  const Rows made_advantages{float_data(advantages), shape.columns, DType::kFloat32};
  const GaeArgs gae_args{
      made_rewards,
      value_rows,
      mask,
      bootstrap.data,
      shape.columns,
      static_cast<float>(gamma),
      static_cast<float>(gamma * lam),
      float_data(advantages),
      float_data(returns)};

  BlockMoments reward_moments(mask, shape), advantage_moments(mask, shape);
  auto* to_rewards = FASTPPO_PICK(reward_rows);
  auto* to_advantages = FASTPPO_PICK(gae_rows);
  const auto advantages_of = [&](int64_t row) {
    to_advantages(gae_args, row, row + 1);
    if (whiten_advantages) {
      advantage_moments.add_row(made_advantages, row);
    }
  };
  for_each_whole_row(shape, [&](int64_t row) {
    to_rewards(reward_args, row, row + 1);
    if (whiten_rewards) {
      reward_moments.add_row(made_rewards, row);
    } else {
      advantages_of(row);
    }
  });
  if (whiten_rewards) {
    const Standardize by = standardize_by(reward_moments.total(), /*keep_mean=*/true);
    standardize(made_rewards, mask, shape, by, float_data(rewards));
    for_each_whole_row(shape, advantages_of);
  }
  if (whiten_advantages) {
    const Standardize by = standardize_by(advantage_moments.total(), /*keep_mean=*/false);
    standardize(made_advantages, mask, shape, by, float_data(advantages));
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
