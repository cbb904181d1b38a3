/*
ppo_loss on the CPU: checks, threads, registration. Blocks are summed in order of position by one thread, in float64:
reruns and other thread counts match bit for bit.
*/
#include "cpu/vec/ppo_loss.h"

#include "cpu/tensor.h"

namespace fastppo {
namespace {

// Of the tokens that count, at least 1.
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
  return static_cast<double>(std::max<int64_t>(1, count));
}

} // namespace

std::tuple<Tensor, Tensor> ppo_loss_terms_cpu(
    const Tensor& new_logprobs, const Tensor& logprobs, const Tensor& advantages, const Tensor& response_mask,
    const OptionalTensor& new_values, const OptionalTensor& values, const OptionalTensor& returns,
    const OptionalTensor& entropy, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    std::optional<double> normalizer_number, const PpoSettings& settings, const PpoGrads& grads) {
  const Shape2d shape = shape_2d(new_logprobs);
  const HeldRows new_logprob_rows(new_logprobs), logprob_rows(logprobs), advantage_rows(advantages);
  const HeldMask mask(response_mask);
  const OptionalRows new_value_rows = optional_rows(new_values);
  const OptionalRows value_rows = new_values ? optional_rows(values) : std::nullopt;
  const OptionalRows return_rows = new_values ? optional_rows(returns) : std::nullopt;
  const OptionalRows entropy_rows = optional_rows(entropy), ref_rows = optional_rows(ref_logprobs);

  const double tokens = normalizer_number ? *normalizer_number
                        : normalizer      ? number_in(*normalizer)
                                          : count_true(mask, shape);
  check_number("ppo_loss", "normalizer", tokens, tokens > 0 && std::isfinite(tokens), "above 0 and finite");

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
      settings.kl_estimator,
      PpoCoefficients(settings, tokens),
      grads.new_logprobs,
      grads.new_values,
      grads.entropy};
  std::vector<PpoSums> parts(shape.rows * blocks_of(shape.columns));
  auto* of_block = FASTPPO_PICK(ppo_loss_block);
  for_each_block(shape, [&](int64_t row, int64_t first, int64_t n, int64_t block) {
    of_block(args, row, first, n, parts[block]);
  });

  PpoSums total;
  for (const PpoSums& part : parts) {
    total.merge(part);
  }
  const PpoResult result = total.result(settings, tokens);
  const Tensor loss = empty_tensor({}, ScalarType::Float), stats = empty_tensor({kPpoStats}, ScalarType::Float);
  *float_data(loss) = result.loss;
  std::copy(result.stats, result.stats + kPpoStats, float_data(stats));
  return {loss, stats};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> ppo_loss_cpu(
    const Tensor& new_logprobs, const Tensor& logprobs, const Tensor& advantages, const Tensor& response_mask,
    const OptionalTensor& new_values, const OptionalTensor& values, const OptionalTensor& returns,
    const OptionalTensor& entropy, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    double clip_range, double clip_range_high, std::optional<double> dual_clip, double value_clip_range, double vf_coef,
    double entropy_coef, double kl_coef, const std::string& kl_estimator, std::optional<double> normalizer_number) {
  const PpoSettings settings = check_ppo_loss(
      new_logprobs, logprobs, advantages, response_mask, new_values, values, returns, entropy, ref_logprobs, normalizer,
      normalizer_number, clip_range, clip_range_high, dual_clip, value_clip_range, vf_coef, entropy_coef, kl_coef,
      kl_estimator);
  const bool has_values = new_values.has_value(), has_entropy = entropy.has_value();
  const Tensor grads = empty_float(ppo_grads_sizes(new_logprobs, has_values, has_entropy));
  const auto [loss, stats] = ppo_loss_terms_cpu(
      new_logprobs, logprobs, advantages, response_mask, new_values, values, returns, entropy, ref_logprobs, normalizer,
      normalizer_number, settings, PpoGrads(grads, new_logprobs.numel(), has_values, has_entropy));
  return {loss, stats, grads};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("ppo_loss", TORCH_BOX(&ppo_loss_cpu)); }

} // namespace fastppo
