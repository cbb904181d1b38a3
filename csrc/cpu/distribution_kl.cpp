/*
distribution_kl on the CPU: the tiles of both rows are walked together; as in logprobs, every tile is a task and the
tiles of a row are merged in order.
*/
#include "csrc/distribution_kl.h"

#include "cpu/logits.h"
#include "cpu/vec/distribution_kl.h"

namespace fastppo {
namespace {

constexpr int64_t kStats = 4; // reference and log of the sum, of the policy and of the reference

// kl (...) and what its backward needs of each row, (..., 4).
std::tuple<Tensor, Tensor> distribution_kl(const Tensor& logits, const Tensor& ref_logits, double temperature) {
  check_distribution_kl(logits, ref_logits, temperature);
  const LogitRows x(logits), y(ref_logits);
  const double inv_temperature = 1 / temperature;
  const int64_t tiles = tiles_of(x.vocabulary);
  std::vector<KlSums> sums(x.rows * tiles);
  const auto tile_sums = FASTPPO_PICK(kl_sums);
  for_each_tile(x.rows, x.vocabulary, [&](int64_t row, int64_t tile, int64_t column, int64_t n) {
    tile_sums(x.at(row, column), y.at(row, column), x.dtype, n, inv_temperature, sums[row * tiles + tile]);
  });

  std::vector<int64_t> stats_sizes(logits.sizes().begin(), logits.sizes().end());
  stats_sizes.back() = kStats;
  const Tensor kl = empty_float(Sizes(stats_sizes.data(), stats_sizes.size() - 1));
  const Tensor stats = empty_float(stats_sizes);
  float *kl_out = float_data(kl), *stats_out = float_data(stats);
  for_each_row(x.rows, tiles, [&](int64_t row) {
    KlSums total;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      total.merge(sums[row * tiles + tile], inv_temperature);
    }
    kl_out[row] = static_cast<float>(total.kl());
    // Relative to the references rounded to float32, which is how the backward gets them.
    const auto log_sum = [&](double sum, double reference) {
      return std::log(sum) + (reference - static_cast<float>(reference)) * inv_temperature;
    };
    const double values[kStats] = {
        total.reference_p, log_sum(total.sum_p, total.reference_p), total.reference_q,
        log_sum(total.sum_q, total.reference_q)};
    std::copy(values, values + kStats, stats_out + row * kStats);
  });
  return {kl, stats};
}

std::tuple<Tensor, Tensor> distribution_kl_backward(
    const Tensor& grad_kl, const Tensor& logits, const Tensor& ref_logits, const Tensor& kl, const Tensor& stats,
    double temperature, bool needs_logits, bool needs_ref_logits) {
  const LogitRows x(logits), y(ref_logits);
  const Tensor dlogits = on_large_pages(empty_if(needs_logits, logits)),
               dref_logits = on_large_pages(empty_if(needs_ref_logits, ref_logits));
  const RowValues row_grad(grad_kl), row_kl(kl), row_stats(stats);
  const double inv_temperature = 1 / temperature;
  const auto tile_grad = FASTPPO_PICK(kl_grad);
  const auto out = [&](const Tensor& gradient, bool needed, int64_t row, int64_t column) {
    const int64_t offset = (row * x.vocabulary + column) * bytes_of(x.dtype);
    return needed ? static_cast<char*>(gradient.mutable_data_ptr()) + offset : nullptr;
  };
  for_each_tile(x.rows, x.vocabulary, [&](int64_t row, int64_t, int64_t column, int64_t n) {
    char* dx = out(dlogits, needs_logits, row, column);
    char* dy = out(dref_logits, needs_ref_logits, row, column);
    if (row_grad[row] == 0) {
      for (char* gradient : {dx, dy}) {
        if (gradient != nullptr) {
          std::memset(gradient, 0, n * bytes_of(x.dtype));
        }
      }
      return;
    }
    const auto stat = [&](int64_t i) { return static_cast<float>(row_stats[row * kStats + i]); };
    const KlGrad grad{
        stat(0),
        stat(1),
        stat(2),
        stat(3),
        static_cast<float>(row_kl[row]),
        static_cast<float>(inv_temperature),
        static_cast<float>(row_grad[row] * inv_temperature)};
    tile_grad(grad, x.at(row, column), y.at(row, column), x.dtype, n, dx, dy);
  });
  return {dlogits, dref_logits};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("distribution_kl", TORCH_BOX(&distribution_kl));
  m.impl("distribution_kl_backward", TORCH_BOX(&distribution_kl_backward));
}

} // namespace fastppo
