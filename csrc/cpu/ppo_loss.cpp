/*
ppo_loss on the CPU: checks, threads, registration. Blocks are summed in order of position by one thread, in float64:
reruns and other thread counts match bit for bit.
*/
#include "cpu/vec/ppo_loss.h"

#include "cpu/tensor.h"

namespace fastppo {
namespace {

double count_true(const MaskRows& mask, Shape2d shape) {
  int64_t count = 0;
  for (int64_t row = 0; row < shape.rows; ++row) {
    // As bytes, and in runs that a byte can count: vector code, where bools are tested one by one.
    const auto* places = reinterpret_cast<const uint8_t*>(mask.row(row));
    for (int64_t begin = 0; begin < shape.columns; begin += 255) {
      uint8_t run = 0;
      for (int64_t i = begin; i < std::min(begin + 255, shape.columns); ++i) {
        run += places[i] != 0;
      }
      count += run;
    }
  }
  return static_cast<double>(count);
}

// Returns loss (), stats (9,), and the gradients of loss for new_logprobs, new_values and entropy (float32; the last
// two have shape (0,) where the input was not given).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_cpu(
    const Tensor& new_logprobs, const Tensor& logprobs, const Tensor& advantages, const Tensor& response_mask,
    const OptionalTensor& new_values, const OptionalTensor& values, const OptionalTensor& returns,
    const OptionalTensor& entropy, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    double clip_range, double clip_range_high, std::optional<double> dual_clip, double value_clip_range, double vf_coef,
    double entropy_coef, double kl_coef, const std::string& kl_estimator) {
  const PpoSettings settings{clip_range, clip_range_high, value_clip_range, vf_coef, entropy_coef, kl_coef, dual_clip};
  const KlEstimator estimator = check_ppo_loss(
      new_logprobs, logprobs, advantages, response_mask, new_values, values, returns, entropy, ref_logprobs, normalizer,
      settings, kl_estimator);
  const Shape2d shape = shape_2d(new_logprobs);
  const HeldRows new_logprob_rows(new_logprobs), logprob_rows(logprobs), advantage_rows(advantages);
  const HeldMask mask(response_mask);
  const OptionalRows new_value_rows = optional_rows(new_values);
  const OptionalRows value_rows = new_values ? optional_rows(values) : std::nullopt;
  const OptionalRows return_rows = new_values ? optional_rows(returns) : std::nullopt;
  const OptionalRows entropy_rows = optional_rows(entropy), ref_rows = optional_rows(ref_logprobs);

  const double tokens = normalizer ? number_in(*normalizer) : std::max(1.0, count_true(mask, shape));
  check_number("ppo_loss", "normalizer", tokens, tokens > 0 && std::isfinite(tokens), "above 0 and finite");

  const Tensor grad_logprobs = empty_float(new_logprobs);
  const Tensor grad_values = new_values ? empty_float(new_logprobs) : empty_tensor({0}, ScalarType::Float);
  const Tensor grad_entropy = entropy ? empty_float(new_logprobs) : empty_tensor({0}, ScalarType::Float);
  const PpoArgs args{
      new_logprob_rows,
      logprob_rows,
      advantage_rows,
      rows_or_none(new_value_rows),
      rows_or_none(value_rows),
      rows_or_none(return_rows),
      rows_or_none(entropy_rows),
      rows_or_none(ref_rows),
      mask,
      shape.columns,
      estimator,
      static_cast<float>(1 - clip_range),
      static_cast<float>(1 + clip_range_high),
      static_cast<float>(dual_clip.value_or(std::numeric_limits<double>::infinity())),
      static_cast<float>(value_clip_range),
      static_cast<float>(1 / tokens),
      static_cast<float>(vf_coef / tokens),
      static_cast<float>(-entropy_coef / tokens),
      static_cast<float>(kl_coef / tokens),
      float_data(grad_logprobs),
      float_data(grad_values),
      float_data(grad_entropy)};
  std::vector<PpoSums> parts(shape.rows * blocks_of(shape.columns));
  auto* of_block = FASTPPO_PICK(ppo_loss_block);
  for_each_block(shape, [&](int64_t row, int64_t first, int64_t n, int64_t block) {
    of_block(args, row, first, n, parts[block]);
  });

  PpoSums total;
  for (const PpoSums& part : parts) {
    for (int stat = 0; stat < kRatioMax; ++stat) {
      total.of[stat] += part.of[stat];
    }
    double& largest = total.of[kRatioMax]; // NaN from either side stays
    largest = largest >= part.of[kRatioMax] || largest != largest ? largest : part.of[kRatioMax];
  }
  const Tensor loss = empty_tensor({}, ScalarType::Float), stats = empty_tensor({kPpoStats}, ScalarType::Float);
  for (int stat = 0; stat < kPpoStats; ++stat) {
    total.of[stat] /= stat == kRatioMax ? 1.0 : tokens;
    float_data(stats)[stat] = static_cast<float>(total.of[stat]);
  }
  *float_data(loss) = static_cast<float>(
      total.of[kPolicyLoss] + vf_coef * total.of[kValueLoss] - entropy_coef * total.of[kEntropy] +
      kl_coef * total.of[kKl]);
  return {loss, stats, grad_logprobs, grad_values, grad_entropy};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("ppo_loss", TORCH_BOX(&ppo_loss_cpu)); }

} // namespace fastppo
