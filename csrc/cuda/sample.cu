// sample on CUDA: checks, one launch, registration.
#include "cuda/sample.cuh"

#include "cuda/tensor.h"

#include <algorithm>
#include <bit>

namespace fastppo::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_cuda(
    const Tensor& logits, double temperature, int64_t top_k, double top_p, double min_p, int64_t seed,
    const Tensor& counters) {
  check_sample(logits, temperature, top_k, top_p, min_p, counters);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  check(vocabulary <= INT32_MAX, "sample", "logits must have fewer than 2^31 columns, got ", vocabulary);
  const Tensor ids = torch::stable::new_empty(logits, counters.sizes(), std::make_optional(ScalarType::Long));
  const Tensor policy = empty_float(logits, counters.sizes()), sampling = empty_float(logits, counters.sizes());
  const Tensor entropy = empty_float(logits, counters.sizes());
  if (rows == 0) {
    return {ids, policy, sampling, entropy};
  }
  top_k = top_k < vocabulary ? top_k : 0;
  const bool truncates = top_k > 0 || top_p < 1 || min_p > 0;
  // Room for the mass of a row in 63 bits; a float32 weight has no use for more than 44 after the point.
  const int mass_bits = std::min(44, 63 - static_cast<int>(std::bit_width(static_cast<uint64_t>(vocabulary))));

  const OnDevice on(logits);
  const SampleSplit split(rows, vocabulary);
  const bool splits = split.splits > 1;
  const Tensor tiles = scratch<TileSums>(logits, splits ? rows * split.tiles : 0);
  const Tensor maxima = scratch<float>(logits, truncates ? rows * split.maxima() : 0);
  const auto arrived = splits ? std::make_optional(counters_at_zero(logits, rows, on)) : std::nullopt;
  const HeldPerRow<int64_t> counter_rows(counters);
  with_element(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const HeldLogits<T> logit_rows(logits);
    const SampleArgs<T> args{
        logit_rows,
        counter_rows,
        split,
        1 / temperature,
        base_2_scale(1 / temperature),
        top_k,
        top_p,
        static_cast<float>(min_p),
        static_cast<float>(std::ldexp(1.0, mass_bits)),
        static_cast<uint64_t>(seed),
        elements<int64_t>(ids),
        floats(policy),
        floats(sampling),
        floats(entropy),
        span_of<TileSums>(tiles),
        arrived ? span_of<unsigned>(*arrived).data : nullptr,
        span_of<float>(maxima)};
    const auto blocks = static_cast<unsigned>(rows * split.splits);
    const unsigned threads = 32 * split.warps;
    if (truncates) {
      FASTPPO_LAUNCH((sample_kernel<T, true>), blocks, threads, kHistogramBytes, on.stream, args);
    } else {
      FASTPPO_LAUNCH((sample_kernel<T, false>), blocks, threads, 0, on.stream, args);
    }
  });
  return {ids, policy, sampling, entropy};
}

} // namespace

FASTPPO_CUDA_IMPL(m) { m.impl("sample", TORCH_BOX(&sample_cuda)); }

} // namespace fastppo::cuda
