/*
ppo_loss_from_logits on the CPU. A row is one thread's: it reads it from memory in tiles of kTile for the sums, 200 to
600 KB that then lie in its L2 cache, and goes through it again for dlogits. Log-probs and entropies are the bits that
logprobs gives; loss, metrics and gradients of values are ppo_loss's, called on them.
*/
#include "csrc/ppo_loss_from_logits.h"

#include "cpu/logits.h"
#include "cpu/vec/logprobs.h"
#include "cpu/vec/ppo_loss_from_logits.h"

namespace fastppo {

PpoLossFunction ppo_loss_terms_cpu; // cpu/ppo_loss.cpp

namespace {

const char* const kOp = "ppo_loss_from_logits";

// One float per token, whatever the dtype and strides.
struct TokenFloats {
  explicit TokenFloats(const Tensor& x)
      : held_(torch::stable::contiguous(torch::stable::to(x, std::make_optional(ScalarType::Float)))),
        data_(static_cast<const float*>(held_.const_data_ptr())) {}

  float operator[](int64_t token) const { return data_[token]; }

 private:
  Tensor held_;
  const float* data_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss_from_logits_cpu(
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
  const Tensor held_ids = contiguous_ids(ids), held_mask = torch::stable::contiguous(response_mask);
  const int64_t* id = id_data(held_ids);
  const bool* mask = static_cast<const bool*>(held_mask.const_data_ptr());
  const LogitRows x(logits);
  int64_t count = 0;
  for (int64_t row = 0; row < x.rows; ++row) {
    if (mask[row]) {
      ++count;
      check_id_in_range(kOp, ids, row, id[row], x.vocabulary);
    }
  }
  const double tokens = normalizer_number ? *normalizer_number
                        : normalizer      ? number_in(*normalizer)
                                          : static_cast<double>(std::max<int64_t>(1, count));
  check_number(kOp, "normalizer", tokens, tokens > 0 && std::isfinite(tokens), "above 0 and finite");

  const Tensor new_logprobs = empty_float(ids.sizes()), entropy = empty_float(ids.sizes());
  float *logprob_out = float_data(new_logprobs), *entropy_out = float_data(entropy);
  const Tensor dlogits = on_large_pages(empty_if(needs_logits, logits));
  const TokenFloats old(logprobs), advantage(advantages), ref(ref_logprobs ? *ref_logprobs : logprobs);
  const PpoCoefficients coefficients(settings, tokens);
  const double inv_temperature = 1 / temperature;
  const int64_t tiles = tiles_of(x.vocabulary), row_bytes = x.vocabulary * bytes_of(x.dtype);
  const auto tile_sums = FASTPPO_PICK(softmax_sums);
  const auto tile_grad = FASTPPO_PICK(logprobs_grad);
  const auto for_tiles = [&](const auto& body) {
    for (int64_t column = 0; column < x.vocabulary; column += kTile) {
      body(column, std::min(kTile, x.vocabulary - column));
    }
  };
  char* out = needs_logits ? static_cast<char*>(dlogits.mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(
      0, x.rows, std::max<int64_t>(1, kTilesPerThread / tiles), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          char* dx = out + row * row_bytes;
          if (!mask[row]) {
            logprob_out[row] = entropy_out[row] = 0;
            if (needs_logits) {
              std::memset(dx, 0, row_bytes);
            }
            continue;
          }
          SoftmaxSums total;
          for_tiles([&](int64_t column, int64_t n) {
            SoftmaxSums sums;
            tile_sums(x.at(row, column), x.dtype, n, inv_temperature, sums, nullptr);
            total.merge(sums, inv_temperature);
          });
          const double picked = x.value(row, id[row]);
          logprob_out[row] = static_cast<float>(total.logprob(picked, inv_temperature));
          entropy_out[row] = static_cast<float>(total.entropy());
          if (!needs_logits) {
            continue;
          }
          const float grad_logprob = ppo_slope(
              logprob_out[row], old[row], advantage[row], ref_logprobs.has_value(), ref[row], settings.kl_estimator,
              coefficients);
          const float grad_entropy = coefficients.entropy_scale;
          if (grad_logprob == 0 && grad_entropy == 0) {
            std::memset(dx, 0, row_bytes);
            continue;
          }
          const SoftmaxGrad grad(
              grad_logprob, grad_entropy, entropy_out[row], static_cast<float>(total.reference),
              static_cast<float>(total.log_sum_of_rounded(inv_temperature)), inv_temperature);
          for_tiles([&](int64_t column, int64_t n) {
            tile_grad(grad, x.at(row, column), x.dtype, n, dx + column * bytes_of(x.dtype));
          });
          set_float(dx, x.dtype, id[row], grad.picked(picked, grad_logprob));
        }
      });

  const Tensor grad_values = new_values ? empty_float(ids.sizes()) : empty_tensor({0}, ScalarType::Float);
  PpoGrads grads;
  grads.new_values = new_values ? float_data(grad_values) : nullptr;
  const auto [loss, stats] = ppo_loss_terms_cpu(
      new_logprobs, logprobs, advantages, response_mask, new_values, values, returns, entropy, ref_logprobs,
      std::nullopt, tokens, settings, grads);
  return {loss, stats, dlogits, grad_values};
}

// x *= factor; nothing is read or written where the factor is 1.
void scale_cpu_(const Tensor& x, const Tensor& factor) {
  check_scale_(x, factor);
  const auto by = static_cast<float>(number_in(factor));
  if (by == 1) {
    return;
  }
  const DType dtype = dtype_of(x);
  char* data = static_cast<char*>(x.mutable_data_ptr());
  const auto scale = FASTPPO_PICK(scale_elements);
  torch::stable::parallel_for(0, tiles_of(x.numel()), kTilesPerThread, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kTile, last = std::min(end * kTile, x.numel());
    scale(data + first * bytes_of(dtype), dtype, last - first, by);
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("ppo_loss_from_logits", TORCH_BOX(&ppo_loss_from_logits_cpu));
  m.impl("scale_", TORCH_BOX(&scale_cpu_));
}

} // namespace fastppo
