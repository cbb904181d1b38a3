/*
How a tensor reaches a vector loop: rows of unit inner stride, any distance between rows, one of three dtypes.
Plain C++, so that units on both sides of the stable ABI can include it.
*/
#pragma once

#include <cstdint>

namespace fastppo {

enum class DType : int8_t { kFloat32, kBFloat16, kFloat16 };

struct Rows {
  const void* data = nullptr; // null: an optional tensor that was not given
  int64_t stride = 0;         // elements between the starts of two rows
  DType dtype = DType::kFloat32;

  explicit operator bool() const { return data != nullptr; }
};

struct MaskRows {
  const bool* data = nullptr;
  int64_t stride = 0;

  const bool* row(int64_t r) const { return data + r * stride; }
};

// Rows are cut into blocks of this many columns: a block's inputs, converted to float32, stay in the L1 cache, and
// block borders, and with them the order of every sum, depend on the shape alone and never on the thread count.
constexpr int64_t kBlock = 512;

// Logits are summed in chunks of this many, whose maximum is a by-product: a truncation looks only at those chunks
// where kept tokens can be.
constexpr int64_t kChunk = 128;

// Sums of logits are summed up part by part: a weight added to 256 others one after the other in float32 may be lost in
// them, one added to 16 is not. A draw without truncation looks for its part first.
constexpr int64_t kPart = 4 * kChunk;

} // namespace fastppo
