/*
logprobs on the CPU. Every tile of every row is a task of its own, so one row of a large vocabulary uses all cores;
the sums of a row's tiles are merged in tile order, so the thread count does not change a bit.
*/
#include "csrc/logprobs.h"

#include "cpu/logits.h"
#include "cpu/vec/logprobs.h"

namespace fastppo {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs(const Tensor& logits, const Tensor& ids, double temperature) {
  check_logprobs(logits, ids, temperature);
  const Tensor held_ids = contiguous_ids(ids);
  const int64_t* id = id_data(held_ids);
  const LogitRows x(logits);
  check_ids_in_range("logprobs", ids, id, x.vocabulary);

  const double inv_temperature = 1 / temperature;
  const int64_t tiles = tiles_of(x.vocabulary);
  std::vector<SoftmaxSums> sums(x.rows * tiles);
  const auto tile_sums = FASTPPO_PICK(softmax_sums);
  for_each_tile(x.rows, x.vocabulary, [&](int64_t row, int64_t tile, int64_t column, int64_t n) {
    tile_sums(x.at(row, column), x.dtype, n, inv_temperature, sums[row * tiles + tile], nullptr);
  });

  const Tensor picked = empty_float(ids.sizes()), entropy = empty_float(ids.sizes());
  const Tensor reference = empty_float(ids.sizes()), log_sum = empty_float(ids.sizes());
  float *picked_out = float_data(picked), *entropy_out = float_data(entropy);
  float *reference_out = float_data(reference), *log_sum_out = float_data(log_sum);
  for_each_row(x.rows, tiles, [&](int64_t row) {
    SoftmaxSums total;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      total.merge(sums[row * tiles + tile], inv_temperature);
    }
    picked_out[row] = static_cast<float>(total.logprob(x.value(row, id[row]), inv_temperature));
    entropy_out[row] = static_cast<float>(total.entropy());
    reference_out[row] = static_cast<float>(total.reference);
    log_sum_out[row] = static_cast<float>(total.log_sum_of_rounded(inv_temperature));
  });
  return {picked, entropy, reference, log_sum};
}

Tensor logprobs_backward(
    const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy, const Tensor& logits, const Tensor& ids,
    const Tensor& entropy, const Tensor& reference, const Tensor& log_sum, double temperature) {
  const Tensor held_ids = contiguous_ids(ids);
  const int64_t* id = id_data(held_ids);
  const LogitRows x(logits);
  const Tensor dlogits = on_large_pages(empty_tensor(logits.sizes(), logits.scalar_type()));
  const LogitRows dx(dlogits);
  const RowValues row_grad_logprob(grad_logprobs), row_grad_entropy(grad_entropy);
  const RowValues row_entropy(entropy), row_reference(reference), row_log_sum(log_sum);

  const double inv_temperature = 1 / temperature;
  const auto tile_grad = FASTPPO_PICK(logprobs_grad);
  for_each_tile(x.rows, x.vocabulary, [&](int64_t row, int64_t, int64_t column, int64_t n) {
    const double grad_logprob = row_grad_logprob[row], grad_entropy = row_grad_entropy[row];
    char* out = dx.at(row, column);
    if (grad_logprob == 0 && grad_entropy == 0) {
      std::memset(out, 0, n * bytes_of(x.dtype));
      return;
    }
    const SoftmaxGrad grad(
        grad_logprob, grad_entropy, row_entropy[row], row_reference[row], row_log_sum[row], inv_temperature);
    tile_grad(grad, x.at(row, column), x.dtype, n, out);
    const int64_t picked = id[row];
    if (picked >= column && picked < column + n) {
      dx.set_value(row, picked, grad.picked(x.value(row, picked), grad_logprob));
    }
  });
  return dlogits;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("logprobs", TORCH_BOX(&logprobs));
  m.impl("logprobs_backward", TORCH_BOX(&logprobs_backward));
}

} // namespace fastppo
