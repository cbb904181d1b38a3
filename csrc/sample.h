/*
One token per row of logits (B, V), by inverse transform sampling.

  weight[i] = e^z[i], z[i] = (logits[i] - max) / temperature: the best token has weight 1
  Tokens are ranked by (logit descending, id ascending). Each truncation keeps a prefix of that ranking:
    top_k  the first top_k tokens                                                     (0 keeps all)
    top_p  of those, the tokens with less than top_p of their mass ranked before them  (1 keeps all)
    min_p  of those, the tokens of weight >= min_p                                    (0 keeps all)
  u      = one uniform in [0, 1) from Philox4x32-10, key = seed, counter = counters[row]: 53 bits
  token  = the lowest id whose running sum of kept weights, in id order, exceeds u * (sum of kept weights)

This is the order in which Hugging Face's generate truncates (temperature, top_k, top_p, min_p). The draw depends on the
row, the settings, the seed and the row's counter, so batch size, order and thread count do not change it. One uniform a
row: per-element Gumbel noise would cost more than reading bf16 logits does.

Results, float32 but for the id: logprobs = log-probability under softmax(logits / temperature), the behaviour policy of
PPO's ratio; sampling_logprobs = log(weight / sum of kept weights); entropy of softmax(logits / temperature), nats.
A row with NaN or +inf, or of only -inf, is an error: on the CPU it throws; on CUDA, where the host does not wait for
the device, the row's id is -1 and its other results are NaN.
*/
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numeric.h"

namespace fastppo {

// The top 53 of the first 64 bits that Philox4x32-10 makes (Salmon et al. 2011), as a number in [0, 1).
FASTPPO_HD double philox_uniform(uint64_t seed, uint64_t counter) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  uint32_t word[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * word[0];
    const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * word[2];
    word[0] = static_cast<uint32_t>(second >> 32) ^ word[1] ^ key[0];
    word[1] = static_cast<uint32_t>(second);
    word[2] = static_cast<uint32_t>(first >> 32) ^ word[3] ^ key[1];
    word[3] = static_cast<uint32_t>(first);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const uint64_t bits = static_cast<uint64_t>(word[0]) << 32 | word[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// An unsigned integer that orders as the float does; -0 and +0 are one value.
FASTPPO_HD uint32_t rank_key(float logit) {
  const float x = logit + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A prefix of the ranking: every token above `key`, and of those equal to it the `ties` lowest ids.
struct Cutoff {
  uint32_t key = 0;
  int64_t ties = INT64_MAX;

  // The shorter of two prefixes.
  FASTPPO_HD void intersect(const Cutoff& other) {
    if (other.key > key) {
      *this = other;
    } else if (other.key == key && other.ties < ties) {
      ties = other.ties;
    }
  }
};

// How many of `ties` tokens of equal weight are kept when a token is kept while the mass before it is below `target`.
FASTPPO_HD int64_t kept_ties(double mass_before, double weight, double target, int64_t ties) {
  const double wanted = std::ceil((target - mass_before) / weight);
  return wanted < 1 ? 1 : wanted < static_cast<double>(ties) ? static_cast<int64_t>(wanted) : ties;
}

} // namespace fastppo

#if defined(TORCH_TARGET_VERSION)
#include "logprobs.h"

namespace fastppo {

inline void check_sample(
    const Tensor& logits, double temperature, int64_t top_k, double top_p, double min_p, const Tensor& counters) {
  const char* op = "sample";
  check_dim(op, "logits", logits, 2, "(B, V)");
  check_logits(op, "logits", logits);
  check_temperature(op, temperature);
  check(top_k >= 0, op, "top_k must be at least 0 (0 keeps all tokens), got ", top_k);
  check_number(op, "top_p", top_p, top_p > 0 && top_p <= 1, "in (0, 1]");
  check_number(op, "min_p", min_p, min_p >= 0 && min_p <= 1, "in [0, 1]");
  check_dtype(op, "counters", counters, ScalarType::Long);
  check_shape(op, "counters", counters, Sizes(logits.sizes().data(), 1), "the rows of logits");
  check_device(op, "counters", counters, logits, "logits");
}

} // namespace fastppo
#endif
