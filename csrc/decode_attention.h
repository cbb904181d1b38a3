/*
Attention of one new token per row over a key-value cache that is written in place:
  n = lengths[b] + 1, cache[slots[b]] has the row's keys and values; the new ones go to place n - 1
  first = 0, or max(0, n - window): a sliding window counts the new token
  p = softmax of scale * query[b, h] . key_cache[slots[b], h / group, j],  j = first..n-1
  out[b, h] = sum_j p_j value_cache[slots[b], h / group, j]

query, out: (B, Hq, D); key, value: (B, Hk, D); key_cache, value_cache: (S, Hk, C, D), any strides but that of D; slots,
lengths: (B,) int64. group = Hq / Hk query heads share a pass over one head's keys and values. Sums are in float32. Rows
know their slots, so a batch shrinks, grows and changes its order without moving what is cached.
*/
#pragma once

#include "check.h"

namespace fastppo {

inline void check_decode_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& slots, const Tensor& lengths, double scale, std::optional<int64_t> window) {
  const char* op = "decode_attention";
  check_floating(op, "query", query);
  check_dim(op, "query", query, 3, "(B, query heads, D)");
  check_dim(op, "key", key, 3, "(B, key heads, D)");
  check_dim(op, "key_cache", key_cache, 4, "(slots, key heads, capacity, D)");
  if (key.size(0) != query.size(0) || key.size(2) != query.size(2)) {
    fail(
        op, "key must have shape (", query.size(0), ", key heads, ", query.size(2), ") for a query of shape ",
        shape_text(query.sizes()), ", got ", shape_text(key.sizes()));
  }
  if (key.size(1) < 1 || query.size(1) % key.size(1) != 0) {
    fail(op, "query heads must be a multiple of key heads, got ", query.size(1), " and ", key.size(1));
  }
  check_shape(op, "value", value, key.sizes(), "key");
  if (key_cache.size(1) != key.size(1) || key_cache.size(3) != key.size(2)) {
    fail(
        op, "key_cache must have shape (slots, ", key.size(1), ", capacity, ", key.size(2), ") for a key of shape ",
        shape_text(key.sizes()), ", got ", shape_text(key_cache.sizes()));
  }
  check_shape(op, "value_cache", value_cache, key_cache.sizes(), "key_cache");
  const struct {
    const char* name;
    const Tensor& tensor;
  } like_query[] = {{"key", key}, {"value", value}, {"key_cache", key_cache}, {"value_cache", value_cache}};
  for (const auto& [name, tensor] : like_query) {
    check_dtype(op, name, tensor, query.scalar_type());
    check_device(op, name, tensor, query, "query");
  }
  for (const auto& [name, tensor] : {like_query[2], like_query[3]}) {
    // Written in place: a copy would not do.
    if (tensor.numel() > 0 && tensor.size(3) > 1 && tensor.stride(3) != 1) {
      fail(op, name, " must have a last dimension of stride 1, got stride ", tensor.stride(3));
    }
  }
  const struct {
    const char* name;
    const Tensor& tensor;
  } per_row[] = {{"slots", slots}, {"lengths", lengths}};
  for (const auto& [name, tensor] : per_row) {
    check_dtype(op, name, tensor, ScalarType::Long);
    if (tensor.dim() != 1 || tensor.size(0) != query.size(0)) {
      fail(op, name, " must have shape (", query.size(0), ",), one per row of query, got ", shape_text(tensor.sizes()));
    }
    check_device(op, name, tensor, query, "query");
  }
  check_number(op, "scale", scale, std::isfinite(scale), "finite");
  if (window) {
    check_number(op, "window", static_cast<double>(*window), *window >= 1, "at least 1");
  }
}

} // namespace fastppo
