// ppo_loss_from_logits and scale_ on CUDA: checks, launches, registration.
#include "csrc/ppo_loss_from_logits.h"

#include "cuda/ppo_loss_from_logits.cuh"
#include "cuda/tensor.h"

#include <algorithm>

namespace fastppo::cuda {

PpoLossFunction ppo_loss_terms_cuda; // cuda/ppo_loss.cu

namespace {

// A 0-d float64 tensor: how many places of the mask are True, at least 1.
Tensor counted(const Tensor& like, const MaskRows& mask, Stream stream) {
  static_assert(sizeof(long long) == sizeof(double));
  const Tensor count = torch::stable::new_empty(like, {}, std::make_optional(ScalarType::Long));
  const Tensor normalizer = torch::stable::new_empty(like, {}, std::make_optional(ScalarType::Double));
  FASTPPO_LAUNCH(
      count_tokens_kernel, 1, kPpoThreads, 0, stream, mask,
      Span<long long>{static_cast<long long*>(count.mutable_data_ptr()), 1},
      Span<double>{static_cast<double*>(normalizer.mutable_data_ptr()), 1});
  return normalizer;
}

// How many logits of a row a block holds; the rest of shared memory is for reductions.
template <class T>
int64_t logits_held(int64_t vocabulary) {
  constexpr int64_t kReserved = 2048;
  const int64_t vectors = (device_facts().max_shared - kReserved) / 16;
  const int64_t wanted = (vocabulary + kPerVector<T> - 1) / kPerVector<T>;
  return std::min(wanted, vectors) * kPerVector<T>;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss_from_logits_cuda(
    const Tensor& logits, const Tensor& ids, const Tensor& logprobs, const Tensor& advantages,
    const Tensor& response_mask, const OptionalTensor& new_values, const OptionalTensor& values,
    const OptionalTensor& returns, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    double temperature, double clip_range, double clip_range_high, std::optional<double> dual_clip,
    double value_clip_range, double vf_coef, double entropy_coef, double kl_coef, const std::string& kl_estimator,
    bool needs_logits, std::optional<double> normalizer_number) {
  const PpoSettings settings = check_ppo_loss_from_logits(
      logits, ids, logprobs, advantages, response_mask, new_values, values, returns, ref_logprobs, normalizer,
      temperature, clip_range, clip_range_high, dual_clip, value_clip_range, vf_coef, entropy_coef, kl_coef,
      kl_estimator, normalizer_number);
  const int64_t none[] = {0};
  const Tensor dlogits = torch::stable::new_empty(logits, needs_logits ? logits.sizes() : Sizes(none, 1));
  const Tensor new_logprobs = empty_float(logits, ids.sizes()), entropy = empty_float(logits, ids.sizes());

  const OnDevice on(logits);
  OptionalTensor divisor = normalizer;
  if (ids.numel() > 0) {
    const HeldMask mask(response_mask);
    const HeldRows logprob_rows(logprobs), advantage_rows(advantages);
    const auto ref_rows = ref_logprobs ? std::make_optional<HeldRows>(*ref_logprobs) : std::nullopt;
    if (!normalizer && !normalizer_number) {
      divisor = counted(logits, mask, on.stream);
    }
    const auto held_divisor = divisor ? std::make_optional<HeldNumber>(*divisor) : std::nullopt;
    const HeldPerRow<int64_t> id_rows(ids);
    with_element(logits.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const HeldLogits<T> rows(logits);
      const int64_t held = needs_logits ? logits_held<T>(rows.vocabulary) : 0;
      const PpoRowsArgs<T> args{
          rows,
          id_rows,
          logprob_rows,
          advantage_rows,
          ref_rows ? static_cast<const Rows&>(*ref_rows) : Rows{},
          mask,
          settings,
          held_divisor ? static_cast<const Number&>(*held_divisor) : number(normalizer_number.value_or(0)),
          1 / temperature,
          base_2_scale(1 / temperature),
          held,
          elements<T>(dlogits),
          floats(new_logprobs),
          floats(entropy)};
      const auto blocks = static_cast<unsigned>(std::min<int64_t>(rows.rows, kMostBlocks));
      const auto shared = held * static_cast<int64_t>(sizeof(T));
      FASTPPO_LAUNCH((ppo_rows_kernel<T>), blocks, kRowThreads, shared, on.stream, args);
    });
  }
  const Tensor grad_values = new_values ? empty_float(logits, ids.sizes()) : empty_float(logits, Sizes(none, 1));
  PpoGrads grads;
  grads.new_values = new_values ? floats(grad_values).data : nullptr;
  const auto [loss, stats] = ppo_loss_terms_cuda(
      new_logprobs, logprobs, advantages, response_mask, new_values, values, returns, entropy, ref_logprobs, divisor,
      normalizer_number, settings, grads);
  return {loss, stats, dlogits, grad_values};
}

void scale_cuda_(const Tensor& x, const Tensor& factor) {
  check_scale_(x, factor);
  if (x.numel() == 0) {
    return;
  }
  const OnDevice on(x);
  const HeldNumber by(factor);
  with_element(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t per_block = int64_t{kScaleThreads} * kPerVector<T>;
    const auto blocks = static_cast<unsigned>(std::min((x.numel() + per_block - 1) / per_block, kScaleBlocks));
    FASTPPO_LAUNCH((scale_kernel<T>), blocks, kScaleThreads, 0, on.stream, elements<T>(x), by);
  });
}

} // namespace

FASTPPO_CUDA_IMPL(m) {
  m.impl("ppo_loss_from_logits", TORCH_BOX(&ppo_loss_from_logits_cuda));
  m.impl("scale_", TORCH_BOX(&scale_cuda_));
}

} // namespace fastppo::cuda
