// The loops of varlen_attention, for csrc/cpu/varlen_attention.cpp. csrc/varlen_attention.h says what it computes.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"

namespace fastppo {

// Tokens of one sequence, from its first one and the first head of a group on.
struct Heads {
  Rows tokens;      // a row is all heads of a token
  int64_t head = 0; // elements between two heads
};

// One sequence and one key head, with the query heads that share it.
struct VarlenAttentionArgs {
  Heads query, key, value;
  int64_t queries, keys, group, width;
  int64_t window; // the number of keys where there is none
  float scale;
  float* lse; // of the group's first head: `queries` floats; the next head's are lse_head further
  int64_t lse_head;
  Heads out; // written by the forward, read by the backward
  // The backward alone; the last three are written.
  Heads grad{}, grad_query{}, grad_key{}, grad_value{};
};

// Queries are taken this many at a time, so that their scores against all keys that they see stay in the cache.
constexpr int64_t kVarlenQueries = 32;

// Floats of scratch that a call needs. Widths and keys are rounded up to whole registers of every instruction set.
inline int64_t varlen_attention_scratch(int64_t group, int64_t width, int64_t keys, bool backward) {
  const int64_t rows = group * kVarlenQueries, padded = (width + 15) / 16 * 16, columns = (keys + 15) / 16 * 16;
  return (backward ? 5 : 2) * padded * columns + rows * ((backward ? 2 : 1) * columns + (backward ? 3 : 2) * padded);
}

} // namespace fastppo

FASTPPO_KERNEL(varlen_attention_forward, const VarlenAttentionArgs& args, float* scratch);
FASTPPO_KERNEL(varlen_attention_backward, const VarlenAttentionArgs& args, float* scratch);
