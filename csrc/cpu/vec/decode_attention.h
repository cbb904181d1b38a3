// The loops of decode_attention, for csrc/cpu/decode_attention.cpp. csrc/decode_attention.h says what it computes.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"

namespace fastppo {

// One row and one key head, with the query heads that share it.
struct DecodeAttentionArgs {
  Rows query;        // group rows of width elements
  Rows keys, values; // places [first, last) of the cache, the new token's among them
  int64_t group, width, first, last;
  float scale;
  void* out; // group rows of width elements, contiguous, dtype of query
};

// Keys and values are widened this many at a time: 8 KB of float32 at a width of 64.
constexpr int64_t kDecodeTile = 32;

// Floats of scratch that a call needs.
inline int64_t decode_attention_scratch(int64_t group, int64_t width, int64_t longest) {
  const int64_t padded = (width + 63) / 64 * 64; // whole registers of every instruction set
  return group * (longest + 64) + (kDecodeTile + 2 * group) * padded;
}

} // namespace fastppo

FASTPPO_KERNEL(decode_attention_head, const DecodeAttentionArgs& args, float* scratch);
