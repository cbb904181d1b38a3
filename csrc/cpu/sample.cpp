/*
sample on the CPU, in two steps.
  1. Every tile of every row, in parallel: its sums (softmax.h) and, when something truncates, its block maxima.
  2. Every row, in parallel: merge the tiles, find where the ranking is cut, draw.
Without truncation the draw goes to a tile by the tile sums and looks at the weights of that tile only. With truncation
it looks at the blocks whose maximum reaches a bound below which no kept token can be; the cut is found there by radix
selection over the bits of the logits. Nothing is sorted, and a row of equal logits costs no more than any other.
*/
#include "csrc/sample.h"

#include "cpu/logits.h"
#include "cpu/vec/logprobs.h"
#include "cpu/vec/sample.h"

#include <string>

namespace fastppo {
namespace {

struct Settings {
  double inv_temperature;
  int64_t top_k; // 0: off
  double top_p;  // 1: off
  double min_p;  // 0: off
  uint64_t seed;

  bool truncates() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

struct Drawn {
  int64_t id;
  double log_probability; // under the distribution it was drawn from
};

// The tokens of a row that may be kept, in id order. One for each thread, reused from row to row.
struct Candidates {
  std::vector<int64_t> ids;
  std::vector<float> logits;
  std::vector<float> weights;

  int64_t size() const { return static_cast<int64_t>(ids.size()); }
};

class RowSampler {
 public:
  RowSampler(const LogitRows& x, const Settings& settings) : x_(x), settings_(settings) {}

  // tiles: the sums of each tile. maxima: of each block, only looked at when something truncates.
  Drawn draw(int64_t row, const SoftmaxSums& total, const SoftmaxSums* tiles, const float* maxima, double uniform) {
    row_ = row;
    total_ = total;
    return settings_.truncates() ? draw_truncated(maxima, uniform) : draw_any(tiles, uniform);
  }

 private:
  Drawn draw_any(const SoftmaxSums* tiles, double uniform) {
    const int64_t count = tiles_of(x_.vocabulary);
    const double target = uniform * total_.sum;
    double before = 0, running = 0; // mass before the chosen tile, and with it
    int64_t chosen = 0;
    for (int64_t tile = 0; tile < count && running <= target; ++tile) {
      const double shift = (tiles[tile].max - total_.max) * settings_.inv_temperature;
      if (shift < 1 - kLowest) {
        continue; // its float32 weights are all 0
      }
      chosen = tile;
      before = running;
      running += tiles[tile].sum * std::exp(shift);
    }
    const int64_t column = chosen * kTile, n = std::min(kTile, x_.vocabulary - column);
    float weights[kTile];
    weigh_(x_.at(row_, column), x_.dtype, n, max(), inv_temperature(), weights);
    int64_t id = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (weights[i] == 0) {
        continue;
      }
      id = column + i;
      before += weights[i];
      if (before > target) {
        break;
      }
    }
    return {id, total_.logprob(x_.value(row_, id), settings_.inv_temperature)};
  }

  Drawn draw_truncated(const float* maxima, double uniform) {
    const Cutoff cut = find_cut(maxima);
    double kept_mass = 0;
    int64_t ties = 0, kept = 0;
    for (int64_t i = 0; i < candidates_.size(); ++i) {
      const uint32_t key = rank_key(candidates_.logits[i]);
      const bool keep = key > cut.key || (key == cut.key && ties++ < cut.ties);
      if (keep && candidates_.weights[i] > 0 && candidates_.weights[i] >= static_cast<float>(settings_.min_p)) {
        kept_mass += candidates_.weights[i];
        candidates_.ids[kept] = candidates_.ids[i];
        candidates_.weights[kept] = candidates_.weights[i];
        ++kept;
      }
    }
    const double target = uniform * kept_mass;
    double running = 0;
    int64_t drawn = 0;
    for (; drawn + 1 < kept; ++drawn) {
      running += candidates_.weights[drawn];
      if (running > target) {
        break;
      }
    }
    const int64_t id = candidates_.ids[drawn];
    const double z = (x_.value(row_, id) - total_.max) * settings_.inv_temperature;
    return {id, z - std::log(kept_mass)};
  }

  // Gathers the candidates and says where top_k and top_p cut them; min_p is a test on each weight.
  Cutoff find_cut(const float* maxima) {
    const int64_t blocks = (x_.vocabulary + kMaximaBlock - 1) / kMaximaBlock;
    const auto one = [](int64_t) { return 1.0; };
    const auto weight = [this](int64_t i) -> double { return candidates_.weights[i]; };
    Cutoff cut;
    if (settings_.top_k > 0) {
      gather(maxima, blocks, kth_largest(maxima, blocks));
      cut = select(one, static_cast<double>(settings_.top_k), cut);
      if (settings_.top_p < 1) {
        cut.intersect(select(weight, settings_.top_p * mass(cut), cut));
      }
    } else if (settings_.top_p < 1) {
      // Most mass is near the maximum: look further below it only while what was found is not enough.
      const double target = settings_.top_p * total_.sum;
      for (double depth = 8; depth < 2 * kLowest; depth *= 2) {
        gather(maxima, blocks, static_cast<float>(total_.max - std::min(depth, kLowest) / settings_.inv_temperature));
        if (mass(cut) >= target) {
          break;
        }
      }
      cut = select(weight, target, cut);
    } else {
      // A little lower than min_p asks: the test on the weight decides.
      const double depth = std::min(kLowest, 1e-3 - std::log(settings_.min_p));
      gather(maxima, blocks, static_cast<float>(total_.max - depth / settings_.inv_temperature));
    }
    return cut;
  }

  // A bound that at least top_k logits reach: the top_k-th largest of the block maxima.
  float kth_largest(const float* maxima, int64_t blocks) {
    if (settings_.top_k > blocks) {
      return -std::numeric_limits<float>::infinity();
    }
    sorted_.assign(maxima, maxima + blocks);
    const auto kth = sorted_.begin() + (settings_.top_k - 1);
    std::nth_element(sorted_.begin(), kth, sorted_.end(), std::greater<float>());
    return *kth;
  }

  // Candidates are the logits >= bound, without -inf.
  void gather(const float* maxima, int64_t blocks, float bound) {
    bound = std::max(bound, -std::numeric_limits<float>::max());
    candidates_.ids.clear();
    candidates_.logits.clear();
    float block_logits[kMaximaBlock];
    for (int64_t block = 0; block < blocks; ++block) {
      if (maxima[block] < bound) {
        continue;
      }
      const int64_t column = block * kMaximaBlock, n = std::min(kMaximaBlock, x_.vocabulary - column);
      widen_(x_.at(row_, column), x_.dtype, n, block_logits);
      for (int64_t i = 0; i < n; ++i) {
        if (block_logits[i] >= bound) {
          candidates_.ids.push_back(column + i);
          candidates_.logits.push_back(block_logits[i]);
        }
      }
    }
    candidates_.weights.resize(candidates_.ids.size());
    weigh_(
        candidates_.logits.data(), DType::kFloat32, candidates_.size(), max(), inv_temperature(),
        candidates_.weights.data());
  }

  // body(candidate) for those inside a cut.
  template <class Body>
  void for_each_kept(const Cutoff& cut, const Body& body) const {
    int64_t ties = 0;
    for (int64_t i = 0; i < candidates_.size(); ++i) {
      const uint32_t key = rank_key(candidates_.logits[i]);
      if (key > cut.key || (key == cut.key && ties++ < cut.ties)) {
        body(i, key);
      }
    }
  }

  double mass(const Cutoff& cut) const {
    double sum = 0;
    for_each_kept(cut, [&](int64_t i, uint32_t) { sum += candidates_.weights[i]; });
    return sum;
  }

  // Keeps the candidates inside `within` that have less than `target` of weight_of ranked before them. The key of the
  // last one is found digit by digit, from the high bits down; each digit's tokens are weighed in id order.
  template <class WeightOf>
  Cutoff select(const WeightOf& weight_of, double target, const Cutoff& within) {
    constexpr int kShifts[] = {21, 10, 0};
    constexpr int kBits[] = {11, 11, 10};
    uint32_t prefix = 0, fixed = 0; // the digits found so far, and a mask of their bits
    double before = 0;
    for (int level = 0; level < 3; ++level) {
      const int shift = kShifts[level];
      const uint32_t digits = 1u << kBits[level];
      digits_.assign(digits, {});
      for_each_kept(within, [&](int64_t i, uint32_t key) {
        if ((key & fixed) == prefix) {
          Digit& digit = digits_[key >> shift & (digits - 1)];
          digit.mass += weight_of(i);
          ++digit.count;
        }
      });
      // Down to the digit in which the target is reached; the lowest one in use if rounding keeps it from being so.
      uint32_t found = 0;
      double found_before = before;
      for (uint32_t digit = digits; digit-- > 0;) {
        if (digits_[digit].count == 0) {
          continue;
        }
        found = digit;
        found_before = before;
        before += digits_[digit].mass;
        if (before >= target) {
          break;
        }
      }
      before = found_before;
      prefix |= found << shift;
      fixed |= (digits - 1) << shift;
      if (level == 2) {
        const Digit& last = digits_[found];
        const double each = last.mass / static_cast<double>(last.count);
        return {prefix, each > 0 ? kept_ties(before, each, target, last.count) : last.count};
      }
    }
    return within;
  }

  float max() const { return static_cast<float>(total_.max); }
  float inv_temperature() const { return static_cast<float>(settings_.inv_temperature); }

  struct Digit {
    double mass = 0;
    int64_t count = 0;
  };

  static constexpr double kLowest = 88; // nats below the best token, from where on float32 weights are 0

  const LogitRows& x_;
  const Settings& settings_;
  decltype(FASTPPO_PICK(softmax_weights)) weigh_ = FASTPPO_PICK(softmax_weights);
  decltype(FASTPPO_PICK(to_float32)) widen_ = FASTPPO_PICK(to_float32);
  int64_t row_ = 0;
  SoftmaxSums total_;
  Candidates candidates_;
  std::vector<float> sorted_;
  std::vector<Digit> digits_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(
    const Tensor& logits, double temperature, int64_t top_k, double top_p, double min_p, int64_t seed,
    const Tensor& counters) {
  check_sample(logits, temperature, top_k, top_p, min_p, counters);
  const LogitRows x(logits);
  const Settings settings{1 / temperature, top_k < x.vocabulary ? top_k : 0, top_p, min_p, static_cast<uint64_t>(seed)};
  const Tensor held_counters = contiguous_ids(counters);
  const int64_t* counter = id_data(held_counters);

  const int64_t tiles = tiles_of(x.vocabulary), blocks = (x.vocabulary + kMaximaBlock - 1) / kMaximaBlock;
  std::vector<SoftmaxSums> sums(x.rows * tiles);
  std::vector<float> maxima(settings.truncates() ? x.rows * blocks : 0);
  const auto tile_sums = FASTPPO_PICK(softmax_sums);
  const auto tile_maxima = FASTPPO_PICK(block_maxima);
  for_each_tile(x.rows, x.vocabulary, [&](int64_t row, int64_t tile, int64_t column, int64_t n) {
    const void* logit = x.at(row, column);
    tile_sums(logit, x.dtype, n, static_cast<float>(settings.inv_temperature), sums[row * tiles + tile]);
    if (settings.truncates()) {
      tile_maxima(logit, x.dtype, n, &maxima[row * blocks + column / kMaximaBlock]);
    }
  });

  std::vector<SoftmaxSums> totals(x.rows);
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      totals[row].merge(sums[row * tiles + tile], settings.inv_temperature);
    }
    if (const char* why = not_a_distribution(totals[row])) {
      check(false, "sample", "logits row ", row, " ", why);
    }
  }

  const Tensor ids = torch::stable::new_empty(logits, counters.sizes(), std::make_optional(ScalarType::Long));
  const Tensor policy = empty_float(logits, counters.sizes()), sampling = empty_float(logits, counters.sizes());
  const Tensor entropy = empty_float(logits, counters.sizes());
  auto* id_out = static_cast<int64_t*>(ids.mutable_data_ptr());
  float *policy_out = float_data(policy), *sampling_out = float_data(sampling), *entropy_out = float_data(entropy);
  torch::stable::parallel_for(0, x.rows, 1, [&](int64_t begin, int64_t end) {
    RowSampler sampler(x, settings);
    for (int64_t row = begin; row < end; ++row) {
      const Drawn drawn = sampler.draw(
          row, totals[row], &sums[row * tiles], maxima.data() + (settings.truncates() ? row * blocks : 0),
          philox_uniform(settings.seed, static_cast<uint64_t>(counter[row])));
      id_out[row] = drawn.id;
      policy_out[row] = static_cast<float>(totals[row].logprob(x.value(row, drawn.id), settings.inv_temperature));
      sampling_out[row] = static_cast<float>(drawn.log_probability);
      entropy_out[row] = static_cast<float>(totals[row].entropy());
    }
  });
  return {ids, policy, sampling, entropy};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

} // namespace fastppo
