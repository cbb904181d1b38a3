/*
Log-probability of one id per row and entropy of the whole row, under softmax(logits / temperature):
  logprob = z[id] - log(sum)      entropy = log(sum) - weighted / sum      (z and the sums: softmax.h)
logits: (..., V), any row strides, last dimension contiguous. ids: (...), int64. Results: (...), float32, nats.
One read of the logits.

A picked logit of -inf gives -inf. A row with NaN or +inf, or of only -inf, gives NaN. An id outside [0, V) is an error
on the CPU and a logprob of NaN on CUDA.

Backward, with log p = z - log(sum):
  dlogits[i] = (grad_logprob * [i == id] - p[i] * (grad_logprob + grad_entropy * (log p[i] + entropy))) / temperature
and 0 where logits[i] is -inf. One read and one write; a row whose two incoming gradients are 0 is written as zeros
and not read. The row's max and log(sum) are saved apart: their sum would lose the digits of log(sum).
*/
#pragma once

#include "check.h"

#include <string>

namespace fastppo {

// Any leading dimensions and strides, unit stride along the vocabulary: a copy of the logits would cost more than the
// op.
inline void check_logits(const char* op, const char* name, const Tensor& logits) {
  check_floating(op, name, logits);
  if (logits.dim() < 1) [[unlikely]] {
    fail(op, name, " must have a vocabulary dimension, got shape ", shape_text(logits.sizes()));
  }
  const int64_t vocabulary = logits.size(logits.dim() - 1);
  if (vocabulary == 0) [[unlikely]] {
    fail(op, name, " must have at least one column, got shape ", shape_text(logits.sizes()));
  }
  if (vocabulary > 1 && logits.stride(logits.dim() - 1) != 1 && logits.numel() > 0) [[unlikely]] {
    fail(op, name, " must be contiguous in the last dimension, got strides ", shape_text(logits.strides()));
  }
}

inline void check_temperature(const char* op, double temperature) {
  check_number(op, "temperature", temperature, temperature > 0 && std::isfinite(temperature), "positive and finite");
}

// "ids[1, 3]" for the flat position 11 of shape (2, 8).
inline std::string position_text(Sizes sizes, int64_t flat) {
  std::string text;
  for (size_t i = sizes.size(); i-- > 0; flat /= sizes[i]) {
    text = std::to_string(flat % sizes[i]) + (text.empty() ? "" : ", ") + text;
  }
  return "[" + text + "]";
}

inline void check_id_in_range(const char* op, const Tensor& ids, int64_t flat, int64_t value, int64_t vocabulary) {
  if (value < 0 || value >= vocabulary) [[unlikely]] {
    check(false, op, "ids", position_text(ids.sizes(), flat), " must be in [0, ", vocabulary, "), got ", value);
  }
}

// Reads ids, so only for tensors the host can see.
inline void check_ids_in_range(const char* op, const Tensor& ids, const int64_t* values, int64_t vocabulary) {
  const int64_t n = ids.numel();
  for (int64_t i = 0; i < n; ++i) {
    check_id_in_range(op, ids, i, values[i], vocabulary);
  }
}

// Logits, and an id for each of their rows.
inline void check_row_ids(const char* op, const Tensor& logits, const Tensor& ids) {
  check_logits(op, "logits", logits);
  check_dtype(op, "ids", ids, ScalarType::Long);
  check_shape(op, "ids", ids, Sizes(logits.sizes().data(), logits.dim() - 1), "logits without its last dimension");
  check_device(op, "ids", ids, logits, "logits");
}

inline void check_logprobs(const Tensor& logits, const Tensor& ids, double temperature) {
  check_row_ids("logprobs", logits, ids);
  check_temperature("logprobs", temperature);
}

} // namespace fastppo
