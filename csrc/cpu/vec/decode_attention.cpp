// Vector loops of decode_attention: csrc/decode_attention.h says what it computes.
#include "cpu/vec/decode_attention.h"

#include "cpu/vec/vec.h"

#include <limits>

namespace fastppo::CPU_CAPABILITY {

namespace {

// Places [first, first + n) of a head in float32, `padded` apart, zero past the width.
void widen_tile(const Rows& rows, int64_t first, int64_t n, int64_t width, int64_t padded, float* out) {
  for (int64_t j = 0; j < n; ++j) {
    load(rows, first + j, 0, width, out + j * padded);
  }
}

// In place: weights of sum 1, or NaN where a score is NaN or +inf.
void softmax(float* scores, int64_t n) {
  const Vec none(-std::numeric_limits<float>::infinity());
  std::fill(scores + n, scores + round_up(n), -std::numeric_limits<float>::infinity());
  Vec highest = none;
  for (int64_t j = 0; j < n; j += kLanes) {
    highest = at::vec::maximum(highest, Vec::loadu(scores + j));
  }
  const Vec max(
      at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, highest));
  Vec sums(0.0f);
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec weights = vexp(Vec::loadu(scores + j) - max);
    weights.store(scores + j);
    sums = sums + weights;
  }
  const Vec inverse(1.0f / static_cast<float>(sum_lanes(sums)));
  for (int64_t j = 0; j < n; j += kLanes) {
    (Vec::loadu(scores + j) * inverse).store(scores + j);
  }
}

// out += sum_j weights[h][j] values[j] for Heads heads, whose sums stay in registers.
template <int Heads>
void add_values(
    const float* values, int64_t n, int64_t padded, const float* weights, int64_t weights_stride, float* out) {
  for (int64_t d = 0; d < padded; d += kLanes) {
    Vec sums[Heads];
    for (int h = 0; h < Heads; ++h) {
      sums[h] = Vec::loadu(out + h * padded + d);
    }
    for (int64_t j = 0; j < n; ++j) {
      const Vec value = Vec::loadu(values + j * padded + d);
      for (int h = 0; h < Heads; ++h) {
        sums[h] = at::vec::fmadd(Vec(weights[h * weights_stride + j]), value, sums[h]);
      }
    }
    for (int h = 0; h < Heads; ++h) {
      sums[h].store(out + h * padded + d);
    }
  }
}

} // namespace

void decode_attention_head(const DecodeAttentionArgs& args, float* scratch) {
  const int64_t n = args.last - args.first, width = args.width, padded = round_up(width);
  const int64_t stride = round_up(n); // between the scores of two heads
  float* tile = scratch;
  float* query = tile + kDecodeTile * padded;
  float* out = query + args.group * padded;
  float* scores = out + args.group * padded;
  const Vec scale(args.scale);
  for (int64_t h = 0; h < args.group; ++h) {
    load(args.query, h, 0, width, query + h * padded);
    for (int64_t d = 0; d < padded; d += kLanes) {
      (Vec::loadu(query + h * padded + d) * scale).store(query + h * padded + d);
    }
  }
  for (int64_t begin = 0; begin < n; begin += kDecodeTile) {
    const int64_t count = std::min(kDecodeTile, n - begin);
    widen_tile(args.keys, args.first + begin, count, width, padded, tile);
    for (int64_t h = 0; h < args.group; ++h) {
      for (int64_t j = 0; j < count; ++j) {
        Vec sums(0.0f);
        for (int64_t d = 0; d < padded; d += kLanes) {
          sums = at::vec::fmadd(Vec::loadu(query + h * padded + d), Vec::loadu(tile + j * padded + d), sums);
        }
        scores[h * stride + begin + j] =
            at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, sums);
      }
    }
  }
  for (int64_t h = 0; h < args.group; ++h) {
    softmax(scores + h * stride, n);
  }
  std::fill(out, out + args.group * padded, 0.0f);
  for (int64_t begin = 0; begin < n; begin += kDecodeTile) {
    const int64_t count = std::min(kDecodeTile, n - begin);
    widen_tile(args.values, args.first + begin, count, width, padded, tile);
    int64_t h = 0;
    for (; h + 4 <= args.group; h += 4) {
      add_values<4>(tile, count, padded, scores + h * stride + begin, stride, out + h * padded);
    }
    switch (args.group - h) {
      case 3:
        add_values<3>(tile, count, padded, scores + h * stride + begin, stride, out + h * padded);
        break;
      case 2:
        add_values<2>(tile, count, padded, scores + h * stride + begin, stride, out + h * padded);
        break;
      case 1:
        add_values<1>(tile, count, padded, scores + h * stride + begin, stride, out + h * padded);
        break;
      default:
        break;
    }
  }
  for (int64_t h = 0; h < args.group; ++h) {
    store(out + h * padded, width, args.query.dtype, args.out, h * width);
  }
}

} // namespace fastppo::CPU_CAPABILITY
