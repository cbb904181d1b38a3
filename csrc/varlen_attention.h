/*
Causal attention over sequences packed one after the other, without padding:
  sequence s has queries [cu_seqlens_q[s], cu_seqlens_q[s+1]) and keys [cu_seqlens_k[s], cu_seqlens_k[s+1])
  query i of m, among n keys, stands at last(i) = i + n - m: the last query at the last key
  it sees keys j <= last(i), and with a window only j > last(i) - window
  lse[h, i] = log sum_j e^(scale * query[i, h] . key[j, h / group])
  out[i, h] = sum_j p_j value[j, h / group],  p = softmax of those scores

query, out: (Nq, Hq, D); key, value: (Nk, Hk, D), any strides; cu_seqlens_*: (S + 1,) int64; lse: (Hq, Nq) float32.
group = Hq / Hk query heads share a key head. A sequence has at least as many keys as queries; where it has more, those
before its queries are what other rows computed (a common beginning). Sums are in float32.

Gradients:
  delta[i, h] = sum_d grad[i, h] out[i, h]
  ds = p * (grad . value - delta) * scale
  d query = ds key,  d key = ds^T query,  d value = p^T grad
*/
#pragma once

#include "check.h"

namespace fastppo {

inline void check_varlen_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    double scale, std::optional<int64_t> window) {
  const char* op = "varlen_attention";
  check_floating(op, "query", query);
  check_dim(op, "query", query, 3, "(Nq, query heads, D)");
  check_dim(op, "key", key, 3, "(Nk, key heads, D)");
  if (key.size(2) != query.size(2)) {
    fail(
        op, "key must have shape (Nk, key heads, ", query.size(2), ") for a query of shape ", shape_text(query.sizes()),
        ", got ", shape_text(key.sizes()));
  }
  if (key.size(1) < 1 || query.size(1) % key.size(1) != 0) {
    fail(op, "query heads must be a multiple of key heads, got ", query.size(1), " and ", key.size(1));
  }
  check_shape(op, "value", value, key.sizes(), "key");
  check_dtype(op, "key", key, query.scalar_type());
  check_dtype(op, "value", value, query.scalar_type());
  check_device(op, "key", key, query, "query");
  check_device(op, "value", value, query, "query");
  check_dtype(op, "cu_seqlens_q", cu_seqlens_q, ScalarType::Long);
  check_dtype(op, "cu_seqlens_k", cu_seqlens_k, ScalarType::Long);
  if (cu_seqlens_q.dim() != 1 || cu_seqlens_q.size(0) < 1) {
    fail(op, "cu_seqlens_q must have shape (sequences + 1,), got ", shape_text(cu_seqlens_q.sizes()));
  }
  check_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.sizes(), "cu_seqlens_q");
  check_device(op, "cu_seqlens_q", cu_seqlens_q, query, "query");
  check_device(op, "cu_seqlens_k", cu_seqlens_k, query, "query");
  check_number(op, "scale", scale, std::isfinite(scale), "finite");
  if (window) {
    check_number(op, "window", static_cast<double>(*window), *window >= 1, "at least 1");
  }
}

inline void check_varlen_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& out, const Tensor& lse) {
  const char* op = "varlen_attention";
  check_like(op, "the gradient", grad, query, "query");
  check_like(op, "out", out, query, "query");
  check_dtype(op, "lse", lse, ScalarType::Float);
  if (lse.dim() != 2 || lse.size(0) != query.size(1) || lse.size(1) != query.size(0)) {
    fail(op, "lse must have shape (", query.size(1), ", ", query.size(0), "), got ", shape_text(lse.sizes()));
  }
}

} // namespace fastppo
