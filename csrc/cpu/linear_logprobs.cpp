/*
linear_logprobs on the CPU. The matrix products are torch's own (oneDNN or MKL), called through the dispatcher; between
two of them, rows are split over threads to fold the tile or to turn it, in place, into its gradient.
A tile is at most kTileBytes, so what one product writes the next pass finds in a cache; the extra memory is that, one
product of the size of hidden, its float32 sum, and a copy of hidden where rows are skipped.
*/
#include "csrc/linear_logprobs.h"

#include "cpu/logits.h"
#include "cpu/vec/linear_logprobs.h"
#include "cpu/vec/logprobs.h"
#include "products.h"

namespace fastppo {
namespace {

constexpr int64_t kTileBytes = 8 << 20;
constexpr int64_t kRowBlock = 4096;                          // rows per product
constexpr int64_t kMostColumns = 4096, kFewestColumns = 256; // of a tile; a row of the most is 16 KB of float32

int64_t columns_per_tile(int64_t rows, DType dtype, int64_t vocabulary) {
  const int64_t fitting = kTileBytes / (std::max<int64_t>(1, rows) * bytes_of(dtype)) / 64 * 64;
  return std::min(vocabulary, std::clamp(fitting, kFewestColumns, kMostColumns));
}

std::vector<float> as_floats(const OptionalTensor& x) {
  if (!x) {
    return {};
  }
  const Tensor held = torch::stable::contiguous(torch::stable::to(*x, std::make_optional(ScalarType::Float)));
  const auto* data = static_cast<const float*>(held.const_data_ptr());
  return {data, data + held.numel()};
}

char* bytes(const Tensor& x) { return static_cast<char*>(x.data_ptr()); }

template <class Body>
void for_each_row_of_tile(int64_t rows, const Body& body) {
  constexpr int64_t kRowsPerThread = 4;
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    alignas(64) float logits[kMostColumns], dlogits[kMostColumns];
    for (int64_t row = begin; row < end; ++row) {
      body(row, logits, dlogits);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprobs(
    const Tensor& hidden, const Tensor& weight, const Tensor& ids, const OptionalTensor& bias, double temperature,
    std::optional<double> softcap, double logit_scale) {
  check_linear_logprobs(hidden, weight, ids, bias, temperature, softcap, logit_scale);
  const Tensor held_ids = contiguous_ids(ids);
  const int64_t* id = id_data(held_ids);
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
  check_ids_in_range("linear_logprobs", ids, id, vocabulary);

  const Head head{static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))};
  const double inv_temperature = 1 / temperature;
  const std::vector<float> biases = as_floats(bias);
  const DType dtype = dtype_of(hidden);
  const int64_t block = std::min(rows, kRowBlock), columns = columns_per_tile(block, dtype, vocabulary);
  const Tensor buffer = new_empty(hidden, {block * columns});
  const auto to_logits = FASTPPO_PICK(head_logits);
  const auto fold = FASTPPO_PICK(softmax_sums);

  std::vector<SoftmaxSums> sums(rows);
  std::vector<float> picked(rows);
  for_each_product(rows, kRowBlock, vocabulary, columns, [&](int64_t first, int64_t count, int64_t column, int64_t n) {
    const Tensor tile = matrix(buffer, count, n);
    matrix_product(rows_of(hidden, first, count), transposed(rows_of(weight, column, n)), tile);
    for_each_row_of_tile(count, [&](int64_t i, float* logits, float*) {
      const int64_t row = first + i;
      to_logits(head, bytes(tile) + i * n * bytes_of(dtype), dtype, bias ? &biases[column] : nullptr, n, logits);
      SoftmaxSums part;
      fold(logits, DType::kFloat32, n, inv_temperature, part, nullptr);
      sums[row].merge(part, inv_temperature);
      if (id[row] >= column && id[row] < column + n) {
        picked[row] = logits[id[row] - column];
      }
    });
  });

  const Tensor logprob = empty_float(ids.sizes()), entropy = empty_float(ids.sizes());
  const Tensor reference = empty_float(ids.sizes()), log_sum = empty_float(ids.sizes());
  float *logprob_out = float_data(logprob), *entropy_out = float_data(entropy);
  float *reference_out = float_data(reference), *log_sum_out = float_data(log_sum);
  for (int64_t row = 0; row < rows; ++row) {
    logprob_out[row] = static_cast<float>(sums[row].logprob(picked[row], inv_temperature));
    entropy_out[row] = static_cast<float>(sums[row].entropy());
    reference_out[row] = static_cast<float>(sums[row].reference);
    log_sum_out[row] = static_cast<float>(sums[row].log_sum_of_rounded(inv_temperature));
  }
  return {logprob, entropy, reference, log_sum};
}

// The rows with a gradient: all that the backward computes with.
std::vector<int64_t> active_rows(const RowValues& grad_logprobs, const RowValues& grad_entropy, int64_t rows) {
  std::vector<int64_t> active;
  active.reserve(rows);
  for (int64_t row = 0; row < rows; ++row) {
    if (grad_logprobs[row] != 0 || grad_entropy[row] != 0) { // NaN counts
      active.push_back(row);
    }
  }
  return active;
}

Tensor gathered(const Tensor& x, const std::vector<int64_t>& rows) {
  const Tensor from = torch::stable::contiguous(x);
  if (static_cast<int64_t>(rows.size()) == x.size(0)) {
    return from;
  }
  const Tensor out = new_empty(x, {static_cast<int64_t>(rows.size()), x.size(1)});
  const int64_t row_bytes = x.size(1) * bytes_of(dtype_of(x));
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(bytes(out) + i * row_bytes, bytes(from) + rows[i] * row_bytes, row_bytes);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward(
    const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy, const Tensor& hidden, const Tensor& weight,
    const Tensor& ids, const OptionalTensor& bias, const Tensor& entropy, const Tensor& reference,
    const Tensor& log_sum, double temperature, std::optional<double> softcap, double logit_scale, bool needs_hidden,
    bool needs_weight, bool needs_bias) {
  const Tensor held_ids = contiguous_ids(ids);
  const int64_t* id = id_data(held_ids);
  const int64_t vocabulary = weight.size(0), width = weight.size(1);
  const RowValues row_grad_logprob(grad_logprobs), row_grad_entropy(grad_entropy);
  const RowValues row_entropy(entropy), row_reference(reference), row_log_sum(log_sum);
  const std::vector<int64_t> active = active_rows(row_grad_logprob, row_grad_entropy, hidden.size(0));
  const auto rows = static_cast<int64_t>(active.size());

  const Tensor dhidden = needs_hidden ? torch::stable::new_zeros(hidden, hidden.sizes()) : new_empty(hidden, {0});
  const Tensor dweight = empty_if(needs_weight, weight);
  const Tensor dbias = new_empty(weight, {needs_bias ? vocabulary : 0});
  if (rows == 0) {
    if (needs_weight) {
      std::memset(bytes(dweight), 0, dweight.numel() * bytes_of(dtype_of(weight)));
    }
    if (needs_bias) {
      std::memset(bytes(dbias), 0, dbias.numel() * bytes_of(dtype_of(weight)));
    }
    return {dhidden, dweight, dbias};
  }

  const Head head{static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))};
  const double inv_temperature = 1 / temperature;
  const std::vector<float> biases = as_floats(bias);
  const DType dtype = dtype_of(hidden);
  const Tensor states = gathered(hidden, active);
  const int64_t block = std::min(rows, kRowBlock), columns = columns_per_tile(block, dtype, vocabulary);
  const bool one_block = rows <= kRowBlock;
  const Tensor buffer = new_empty(hidden, {block * columns});
  const Tensor product = new_empty(hidden, {std::max(needs_hidden ? block : 0, one_block ? 0 : columns) * width});
  std::vector<float> hidden_sum(needs_hidden ? rows * width : 0);
  std::vector<float> weight_sum(needs_weight && !one_block ? columns * width : 0);
  std::vector<float> bias_sum(needs_bias ? vocabulary : 0);
  const auto to_logits = FASTPPO_PICK(head_logits);
  const auto to_dlogits = FASTPPO_PICK(logprobs_grad);
  const auto through_head = FASTPPO_PICK(head_grad);
  const auto add = FASTPPO_PICK(add_to);
  const auto round = FASTPPO_PICK(from_float32);
  const auto add_matrix = [&](const Tensor& x, float* sum) {
    torch::stable::parallel_for(0, x.size(0), 64, [&](int64_t begin, int64_t end) {
      const int64_t offset = begin * width;
      add(bytes(x) + offset * bytes_of(dtype), dtype, (end - begin) * width, sum + offset);
    });
  };

  for_each_product(rows, kRowBlock, vocabulary, columns, [&](int64_t first, int64_t count, int64_t column, int64_t n) {
    const Tensor tile = matrix(buffer, count, n), slice = rows_of(weight, column, n);
    const Tensor block_states = rows_of(states, first, count);
    matrix_product(block_states, transposed(slice), tile);
    for_each_row_of_tile(count, [&](int64_t i, float* logits, float* dlogits) {
      const int64_t row = active[first + i];
      char* x = bytes(tile) + i * n * bytes_of(dtype);
      to_logits(head, x, dtype, bias ? &biases[column] : nullptr, n, logits);
      const SoftmaxGrad grad(
          row_grad_logprob[row], row_grad_entropy[row], row_entropy[row], static_cast<float>(row_reference[row]),
          static_cast<float>(row_log_sum[row]), inv_temperature);
      to_dlogits(grad, logits, DType::kFloat32, n, dlogits);
      if (id[row] >= column && id[row] < column + n) {
        const int64_t picked = id[row] - column;
        dlogits[picked] = static_cast<float>(grad.picked(logits[picked], row_grad_logprob[row]));
      }
      through_head(head, logits, dlogits, n, x, dtype);
    });
    if (needs_hidden) {
      const Tensor part = matrix(product, count, width);
      matrix_product(tile, slice, part);
      add_matrix(part, &hidden_sum[first * width]);
    }
    if (needs_weight && one_block) {
      matrix_product(transposed(tile), block_states, rows_of(dweight, column, n));
    } else if (needs_weight) {
      const Tensor part = matrix(product, n, width);
      matrix_product(transposed(tile), block_states, part);
      if (first == 0) {
        std::fill(weight_sum.begin(), weight_sum.end(), 0.0f);
      }
      add_matrix(part, weight_sum.data());
      if (first + count == rows) {
        round(weight_sum.data(), n * width, bytes(dweight) + column * width * bytes_of(dtype), dtype);
      }
    }
    if (needs_bias) {
      for (int64_t i = 0; i < count; ++i) {
        add(bytes(tile) + i * n * bytes_of(dtype), dtype, n, &bias_sum[column]);
      }
    }
  });

  if (needs_hidden) {
    for (int64_t i = 0; i < rows; ++i) {
      round(&hidden_sum[i * width], width, bytes(dhidden) + active[i] * width * bytes_of(dtype), dtype);
    }
  }
  if (needs_bias) {
    round(bias_sum.data(), vocabulary, bytes(dbias), dtype);
  }
  return {dhidden, dweight, dbias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("linear_logprobs", TORCH_BOX(&linear_logprobs));
  m.impl("linear_logprobs_backward", TORCH_BOX(&linear_logprobs_backward));
}

} // namespace fastppo
