// decode_attention on the CPU: checks, threads, registration.
#include "cpu/vec/decode_attention.h"

#include "cpu/tensor.h"
#include "csrc/decode_attention.h"

#include <cstring>

namespace fastppo {
namespace {

constexpr int64_t kDecodeGrain = 1 << 15; // multiplications a thread should have before a second one is worth waking

const char* at(const Tensor& x, int64_t b, int64_t h, int64_t bytes) {
  return static_cast<const char*>(x.const_data_ptr()) + (b * x.stride(0) + h * x.stride(1)) * bytes;
}

// Every row has a slot of its own, and room in it for one more token.
void check_rows(const int64_t* slots, const int64_t* lengths, int64_t rows, int64_t slot_count, int64_t capacity) {
  const char* op = "decode_attention";
  std::vector<bool> taken(slot_count);
  for (int64_t b = 0; b < rows; ++b) {
    if (slots[b] < 0 || slots[b] >= slot_count) {
      fail(op, "slots must be in [0, ", slot_count, "), got ", slots[b], " in row ", b);
    }
    if (taken[slots[b]]) {
      fail(op, "slots must differ from row to row, got ", slots[b], " again in row ", b);
    }
    taken[slots[b]] = true;
    if (lengths[b] < 0 || lengths[b] >= capacity) {
      fail(
          op, "lengths must be in [0, ", capacity, "), to leave room for the new token, got ", lengths[b], " in row ",
          b);
    }
  }
}

Tensor decode_attention_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& slots, const Tensor& lengths, double scale, std::optional<int64_t> window) {
  check_decode_attention(query, key, value, key_cache, value_cache, slots, lengths, scale, window);
  const Tensor out = empty_tensor(query.sizes(), query.scalar_type());
  const int64_t rows = query.size(0), heads = key.size(1), width = query.size(2), group = query.size(1) / heads;
  if (out.numel() == 0) {
    return out;
  }
  const Tensor held_slots = torch::stable::contiguous(slots), held_lengths = torch::stable::contiguous(lengths);
  const auto* slot_of = static_cast<const int64_t*>(held_slots.const_data_ptr());
  const auto* length_of = static_cast<const int64_t*>(held_lengths.const_data_ptr());
  check_rows(slot_of, length_of, rows, key_cache.size(0), key_cache.size(2));
  const int64_t longest = *std::max_element(length_of, length_of + rows) + 1;
  const Tensor q = with_unit_last_stride(query), k = with_unit_last_stride(key), v = with_unit_last_stride(value);
  const DType dtype = dtype_of(query);
  const int64_t bytes = element_size(dtype);
  auto* of_head = FASTPPO_PICK(decode_attention_head);
  auto* out_data = static_cast<char*>(out.mutable_data_ptr());
  // Never const: the new token is written.
  const struct Cache {
    char* data;
    int64_t slot, head, place;
    char* at(int64_t s, int64_t h, int64_t size) const { return data + (s * slot + h * head) * size; }
  } keys{
      static_cast<char*>(key_cache.mutable_data_ptr()), key_cache.stride(0), key_cache.stride(1), key_cache.stride(2)},
      values{
          static_cast<char*>(value_cache.mutable_data_ptr()), value_cache.stride(0), value_cache.stride(1),
          value_cache.stride(2)};
  const int64_t grain = std::max<int64_t>(1, kDecodeGrain / (longest * width * group));
  torch::stable::parallel_for(0, rows * heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(decode_attention_scratch(group, width, longest));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads, last = length_of[b] + 1;
      char* const head_keys = keys.at(slot_of[b], h, bytes);
      char* const head_values = values.at(slot_of[b], h, bytes);
      std::memcpy(head_keys + (last - 1) * keys.place * bytes, at(k, b, h, bytes), width * bytes);
      std::memcpy(head_values + (last - 1) * values.place * bytes, at(v, b, h, bytes), width * bytes);
      const DecodeAttentionArgs args{
          Rows{at(q, b, h * group, bytes), q.stride(1), dtype},
          Rows{head_keys, keys.place, dtype},
          Rows{head_values, values.place, dtype},
          group,
          width,
          window ? std::max<int64_t>(0, last - *window) : 0,
          last,
          static_cast<float>(scale),
          out_data + (b * heads + h) * group * width * bytes};
      of_head(args, scratch.data());
    }
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention_cpu)); }

} // namespace fastppo
