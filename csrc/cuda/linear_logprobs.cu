/*
linear_logprobs and its gradient on CUDA: checks, matrix products by cuBLAS through torch, the kernels between them,
registration.

A tile is at most kTileBytes, which an H100 keeps in its L2 cache between the product that writes it and the kernel that
reads it; at least kFewestColumns of the vocabulary, so that a product of many rows stays one worth starting. Extra
memory: forward the tile. Backward the tile, and of the size of hidden the copy without inactive rows, one product and
its float32 sum; with more than kRowBlock rows also one product and one float32 sum of a slice of weight.
All launches and shapes come from the sizes of the arguments: nothing waits for the device.
*/
#include "cuda/linear_logprobs.cuh"

#include "cuda/tensor.h"
#include "products.h"

#include <limits>

namespace fastppo::cuda {
namespace {

constexpr int64_t kTileBytes = 32 << 20;
constexpr int64_t kRowBlock = 8192; // rows per product
constexpr int64_t kMostColumns = 16384, kFewestColumns = 1024;

int64_t columns_per_tile(int64_t rows, ScalarType dtype, int64_t vocabulary) {
  const int64_t bytes = dtype == ScalarType::Float ? 4 : 2;
  const int64_t fitting = kTileBytes / (std::max<int64_t>(1, rows) * bytes) / 256 * 256;
  return std::min(vocabulary, std::clamp(fitting, kFewestColumns, kMostColumns));
}

unsigned blocks_for(int64_t tasks) { return static_cast<unsigned>(std::clamp<int64_t>(tasks, 1, kMostBlocks)); }

// cuBLAS counts the distance between two rows in an int.
Tensor with_int_strides(const Tensor& x) {
  const bool fits = x.stride(0) <= std::numeric_limits<int>::max() && x.stride(1) <= std::numeric_limits<int>::max();
  return fits ? x : torch::stable::contiguous(x);
}

OptionalTensor contiguous_or_none(const OptionalTensor& x) {
  return x ? OptionalTensor(torch::stable::contiguous(*x)) : std::nullopt;
}

template <class T>
HeadRows<T> head_rows(const OptionalTensor& bias, std::optional<double> softcap, double logit_scale) {
  HeadRows<T> out{{static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))}, {}};
  if (bias) {
    out.bias = {static_cast<const T*>(bias->const_data_ptr()), bias->numel()};
  }
  return out;
}

Tensor empty_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, Sizes(&count, 1), std::make_optional(ScalarType::Float));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprobs_cuda(
    const Tensor& given_hidden, const Tensor& given_weight, const Tensor& ids, const OptionalTensor& bias,
    double temperature, std::optional<double> softcap, double logit_scale) {
  check_linear_logprobs(given_hidden, given_weight, ids, bias, temperature, softcap, logit_scale);
  const Tensor hidden = with_int_strides(given_hidden), weight = with_int_strides(given_weight);
  const Tensor logprobs = empty_float(hidden, ids.sizes()), entropy = empty_float(hidden, ids.sizes());
  const Tensor reference = empty_float(hidden, ids.sizes()), log_sum = empty_float(hidden, ids.sizes());
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
  if (rows == 0) {
    return {logprobs, entropy, reference, log_sum};
  }
  const OnDevice on(hidden);
  const int64_t block = std::min(rows, kRowBlock);
  const int64_t columns = columns_per_tile(block, hidden.scalar_type(), vocabulary);
  const Tensor buffer = new_empty(hidden, {block * columns});
  const Tensor sums = scratch<SoftmaxSums>(hidden, rows), picked = empty_floats(hidden, rows);
  const OptionalTensor held_bias = contiguous_or_none(bias);
  const HeldPerRow<int64_t> id_rows(ids);
  with_element(hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const HeadRows<T> head = head_rows<T>(held_bias, softcap, logit_scale);
    for_each_product(rows, kRowBlock, vocabulary, columns, [&](int64_t row, int64_t count, int64_t column, int64_t n) {
      const Tensor tile = matrix(buffer, count, n);
      matrix_product(rows_of(hidden, row, count), transposed(rows_of(weight, column, n)), tile);
      const FoldArgs<T> args{
          {elements<T>(tile), count, n, row, column},
          head,
          id_rows,
          vocabulary,
          1 / temperature,
          base_2_scale(1 / temperature),
          span_of<SoftmaxSums>(sums),
          floats(picked),
          floats(logprobs),
          floats(entropy),
          floats(reference),
          floats(log_sum)};
      FASTPPO_LAUNCH((fold_kernel<T>), blocks_for(count), kRowThreads, 0, on.stream, args);
    });
  });
  return {logprobs, entropy, reference, log_sum};
}

// One product after another into a float32 sum, the last one out in T.
template <class T>
void accumulate(
    const OnDevice& on, const Tensor& product, const OptionalTensor& sum, const Tensor* out, bool is_first,
    int64_t first_row = 0, const RowGrads* grads = nullptr) {
  const int64_t count = product.numel();
  if (count == 0) {
    return;
  }
  const AccumulateArgs<T> args{
      {static_cast<const T*>(product.const_data_ptr()), count},
      sum ? Span<float>{static_cast<float*>(sum->mutable_data_ptr()), count} : Span<float>(),
      out != nullptr ? elements<T>(*out) : Span<T>(),
      is_first,
      product.size(1),
      first_row,
      grads != nullptr,
      grads != nullptr ? *grads : RowGrads{}};
  FASTPPO_LAUNCH((accumulate_kernel<T>), blocks_for(product.size(0)), kRowThreads, 0, on.stream, args);
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward_cuda(
    const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy, const Tensor& hidden,
    const Tensor& given_weight, const Tensor& ids, const OptionalTensor& bias, const Tensor& entropy,
    const Tensor& reference, const Tensor& log_sum, double temperature, std::optional<double> softcap,
    double logit_scale, bool needs_hidden, bool needs_weight, bool needs_bias) {
  const Tensor weight = with_int_strides(given_weight);
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0), width = weight.size(1);
  const Tensor dhidden = empty_if(needs_hidden, hidden), dweight = empty_if(needs_weight, weight);
  const Tensor dbias = new_empty(weight, {needs_bias ? vocabulary : 0});
  if (rows == 0) {
    Tensor zero_weight = dweight, zero_bias = dbias;
    torch::stable::zero_(zero_weight);
    torch::stable::zero_(zero_bias);
    return {dhidden, dweight, dbias};
  }
  const OnDevice on(hidden);
  const int64_t block = std::min(rows, kRowBlock);
  const int64_t columns = columns_per_tile(block, hidden.scalar_type(), vocabulary);
  const bool one_block = rows <= kRowBlock, one_tile = columns == vocabulary;
  const Tensor buffer = new_empty(hidden, {block * columns}), states = new_empty(hidden, {rows, width});
  const Tensor product = new_empty(hidden, {std::max(needs_hidden ? block : 0, one_block ? 0 : columns) * width});
  const Tensor hidden_sum = empty_floats(hidden, needs_hidden && !one_tile ? rows * width : 0);
  const Tensor weight_sum = empty_floats(hidden, needs_weight && !one_block ? columns * width : 0);
  const Tensor bias_sum = empty_floats(hidden, needs_bias && !one_block ? vocabulary : 0);
  const OptionalTensor held_bias = contiguous_or_none(bias);
  const HeldPerRow<float> row_grad_logprobs(grad_logprobs), row_grad_entropy(grad_entropy);
  const HeldPerRow<int64_t> id_rows(ids);
  const HeldPerRow<float> row_entropy(entropy), row_reference(reference), row_log_sum(log_sum);
  const RowGrads grads{row_grad_logprobs, row_grad_entropy};

  with_element(hidden.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const HeadRows<T> head = head_rows<T>(held_bias, softcap, logit_scale);
    const Tensor held_hidden = hidden.stride(1) == 1 || width <= 1 ? hidden : torch::stable::contiguous(hidden);
    if (width > 0) {
      const HeldLogits<T> hidden_rows(held_hidden);
      const ActiveRowsArgs<T> args{hidden_rows, grads, elements<T>(states)};
      FASTPPO_LAUNCH((active_rows_kernel<T>), blocks_for(rows), kRowThreads, 0, on.stream, args);
    }
    for_each_product(rows, kRowBlock, vocabulary, columns, [&](int64_t row, int64_t count, int64_t column, int64_t n) {
      const Tensor tensor = matrix(buffer, count, n), slice = rows_of(weight, column, n);
      const Tensor block_states = rows_of(states, row, count);
      matrix_product(block_states, transposed(slice), tensor);
      const Tile<T> tile{elements<T>(tensor), count, n, row, column};
      const TileGradArgs<T> args{tile, head, grads, id_rows, row_entropy, row_reference, row_log_sum, 1 / temperature};
      FASTPPO_LAUNCH((tile_grad_kernel<T>), blocks_for(count), kRowThreads, 0, on.stream, args);
      if (needs_hidden) {
        const Tensor part = matrix(product, count, width), out = rows_of(dhidden, row, count);
        const OptionalTensor sum =
            one_tile ? std::nullopt : OptionalTensor(rows_of(hidden_sum, row * width, count * width));
        matrix_product(tensor, slice, part);
        accumulate<T>(on, part, sum, column + n == vocabulary ? &out : nullptr, column == 0, row, &grads);
      }
      if (needs_weight && one_block) {
        matrix_product(transposed(tensor), block_states, rows_of(dweight, column, n));
      } else if (needs_weight) {
        const Tensor part = matrix(product, n, width), out = rows_of(dweight, column, n);
        matrix_product(transposed(tensor), block_states, part);
        accumulate<T>(on, part, weight_sum, row + count == rows ? &out : nullptr, row == 0);
      }
      if (needs_bias) {
        const ColumnSumsArgs<T> sums{tile, floats(bias_sum), row + count == rows ? elements<T>(dbias) : Span<T>()};
        const int64_t blocks = (n + kColumnsPerBlock - 1) / kColumnsPerBlock;
        FASTPPO_LAUNCH((column_sums_kernel<T>), blocks_for(blocks), kRowThreads, 0, on.stream, sums);
      }
    });
  });
  return {dhidden, dweight, dbias};
}

} // namespace

FASTPPO_CUDA_IMPL(m) {
  m.impl("linear_logprobs", TORCH_BOX(&linear_logprobs_cuda));
  m.impl("linear_logprobs_backward", TORCH_BOX(&linear_logprobs_backward_cuda));
}

} // namespace fastppo::cuda
