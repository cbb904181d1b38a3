// ppo_loss on CUDA: checks, one or two launches, registration.
#include "cuda/ppo_loss.cuh"

#include "cuda/tensor.h"

#include <algorithm>

namespace fastppo::cuda {
namespace {

// From the shape alone, never from the device: each block is one part of the sums.
unsigned ppo_blocks(const Shape2d& shape) {
  if (shape.count() <= kPpoOneBlockTokens) {
    return 1;
  }
  const int64_t tasks = shape.rows * ((shape.columns + kPpoPart - 1) / kPpoPart);
  return static_cast<unsigned>(std::clamp<int64_t>((tasks + kPpoWarps - 1) / kPpoWarps, 1, kPpoBlocks));
}

std::optional<HeldRows> held_rows(const OptionalTensor& x) {
  return x ? std::make_optional<HeldRows>(*x) : std::nullopt;
}

Rows rows_or_none(const std::optional<HeldRows>& x) { return x ? static_cast<Rows>(*x) : Rows{}; }

} // namespace

std::tuple<Tensor, Tensor> ppo_loss_terms_cuda(
    const Tensor& new_logprobs, const Tensor& logprobs, const Tensor& advantages, const Tensor& response_mask,
    const OptionalTensor& new_values, const OptionalTensor& values, const OptionalTensor& returns,
    const OptionalTensor& entropy, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    std::optional<double> normalizer_number, const PpoSettings& settings, const PpoGrads& grads) {
  const Tensor loss = empty_float(new_logprobs, {}), stats = empty_float(new_logprobs, {kPpoStats});

  const OnDevice on(new_logprobs);
  const HeldRows new_logprob_rows(new_logprobs), logprob_rows(logprobs), advantage_rows(advantages);
  const HeldMask mask(response_mask);
  const auto new_value_rows = held_rows(new_values), value_rows = held_rows(values), return_rows = held_rows(returns);
  const auto entropy_rows = held_rows(entropy), ref_rows = held_rows(ref_logprobs);
  const auto held_number = normalizer ? std::make_optional<HeldNumber>(*normalizer) : std::nullopt;

  const Shape2d shape(new_logprobs);
  const unsigned blocks = ppo_blocks(shape);
  const bool count = !normalizer && !normalizer_number;
  // PpoSums, then counts, then the counter: none of them is read before a launch of this call has written it.
  static_assert(sizeof(PpoSums) == kPpoStats * sizeof(double) && sizeof(long long) == sizeof(double));
  const int64_t doubles[] = {int64_t{blocks} * (kPpoStats + 1) + 1};
  const Tensor scratch =
      torch::stable::new_empty(new_logprobs, Sizes(doubles, 1), std::make_optional(ScalarType::Double));
  auto* parts = static_cast<PpoSums*>(scratch.mutable_data_ptr());
  auto* counts = reinterpret_cast<long long*>(parts + blocks);

  const auto grad = [&](float* data) { return data != nullptr ? Span<float>{data, shape.count()} : Span<float>{}; };
  const PpoArgs args{
      new_logprob_rows,
      logprob_rows,
      advantage_rows,
      rows_or_none(new_value_rows),
      new_values ? rows_or_none(value_rows) : Rows{},
      new_values ? rows_or_none(return_rows) : Rows{},
      rows_or_none(entropy_rows),
      rows_or_none(ref_rows),
      mask,
      settings,
      count,
      held_number ? static_cast<Number>(*held_number) : number(normalizer_number.value_or(0)),
      {floats(loss), floats(stats), grad(grads.new_logprobs), grad(grads.new_values), grad(grads.entropy)},
      {counts, blocks},
      {parts, blocks},
      reinterpret_cast<unsigned*>(counts + blocks)};
  if (blocks == 1) {
    FASTPPO_LAUNCH(ppo_loss_kernel, 1, kPpoThreads, 0, on.stream, args, kPpoPrepare, kPpoLoss);
  } else {
    FASTPPO_LAUNCH(ppo_loss_kernel, count ? blocks : 1, kPpoThreads, 0, on.stream, args, kPpoPrepare, kPpoPrepare);
    FASTPPO_LAUNCH(ppo_loss_kernel, blocks, kPpoThreads, 0, on.stream, args, kPpoLoss, kPpoLoss);
  }
  return {loss, stats};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> ppo_loss_cuda(
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
  const Tensor grads = empty_float(new_logprobs, ppo_grads_sizes(new_logprobs, has_values, has_entropy));
  const auto [loss, stats] = ppo_loss_terms_cuda(
      new_logprobs, logprobs, advantages, response_mask, new_values, values, returns, entropy, ref_logprobs, normalizer,
      normalizer_number, settings, PpoGrads(grads, new_logprobs.numel(), has_values, has_entropy));
  return {loss, stats, grads};
}

} // namespace

FASTPPO_CUDA_IMPL(m) { m.impl("ppo_loss", TORCH_BOX(&ppo_loss_cuda)); }

} // namespace fastppo::cuda
