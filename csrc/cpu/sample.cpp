/*
sample on the CPU, in one parallel region: the sums of every tile of every row (softmax.h) with, when something
truncates, its chunk maxima, else its part sums. Who finishes the last tile of a row draws the row: merges the tiles,
finds where the ranking is cut, draws. A second region for the rows would cost another meeting of all threads, and find
the logits gone from the cache. Without truncation the draw goes to a tile by the tile sums, to a part by the part sums
of that tile, and looks at the weights of that part only. With truncation it looks at the chunks whose maximum reaches a
bound below which no kept token can be; the cut is found there by radix selection over the bits of the logits. Nothing
is sorted, and a row of equal logits costs no more than any other.
*/
#include "csrc/sample.h"

#include "cpu/logits.h"
#include "cpu/vec/logprobs.h"
#include "cpu/vec/sample.h"

#include <atomic>
#include <numeric>

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

// The tokens of a row that may be kept, in id order.
struct Candidates {
  int64_t size = 0;
  std::vector<int64_t> ids;
  std::vector<float> logits, weights;

  void make_room(int64_t more) {
    if (size + more > static_cast<int64_t>(ids.size())) {
      ids.resize(2 * (size + more));
      logits.resize(ids.size());
      weights.resize(ids.size());
    }
  }
};

struct Digit {
  double mass = 0;
  int64_t count = 0;
};

// What a truncated draw works on. One for each thread, kept from row to row and from call to call.
struct Workspace {
  Candidates candidates;
  std::vector<Digit> digits;
};

// What the threads of a call share, for the one that drew it up: kept from call to call, too.
struct Shared {
  std::vector<SoftmaxSums> sums;   // of each tile
  std::vector<float> details;      // of each tile (TileDetails)
  std::vector<int32_t> tiles_left; // of each row
};

class RowSampler {
 public:
  RowSampler(const LogitRows& x, const Settings& settings, Workspace& workspace)
      : x_(x), settings_(settings), candidates_(workspace.candidates), digits_(workspace.digits) {}

  // tiles: the sums of each tile. details: chunk maxima of the row when something truncates, else its part sums.
  Drawn draw(int64_t row, const SoftmaxSums& total, const SoftmaxSums* tiles, const float* details, double uniform) {
    row_ = row;
    total_ = total;
    return settings_.truncates() ? draw_truncated(details, uniform) : draw_any(tiles, details, uniform);
  }

 private:
  // The first of n places whose running mass exceeds the target, else the last that has any; the mass before it is
  // taken off the target.
  template <class MassOf>
  static int64_t place_of(double& target, int64_t n, const MassOf& mass_of) {
    int64_t place = 0;
    double before = 0, running = 0;
    for (int64_t i = 0; i < n && running <= target; ++i) {
      const double mass = mass_of(i);
      if (mass > 0) {
        place = i;
        before = running;
        running += mass;
      }
    }
    target -= before;
    return place;
  }

  Drawn draw_any(const SoftmaxSums* tiles, const float* part_sums, double uniform) {
    const auto scale = [&](int64_t tile) {
      return std::exp((tiles[tile].reference - total_.reference) * settings_.inv_temperature);
    };
    double target = uniform * total_.sum;
    const int64_t tile = place_of(target, tiles_of(x_.vocabulary), [&](int64_t i) { return tiles[i].sum * scale(i); });
    target /= scale(tile);
    const int64_t first_part = tile * (kTile / kPart);
    const int64_t parts = (std::min(kTile, x_.vocabulary - tile * kTile) + kPart - 1) / kPart;
    const int64_t part =
        first_part + place_of(target, parts, [&](int64_t i) -> double { return part_sums[first_part + i]; });
    const int64_t column = part * kPart, n = std::min(kPart, x_.vocabulary - column);
    const int64_t chunk_count = (n + kChunk - 1) / kChunk;
    float weights[kPart];
    double chunks[kPart / kChunk];
    weigh_chunks_(
        x_.at(row_, column), x_.dtype, n, static_cast<float>(tiles[tile].reference), settings_.inv_temperature, weights,
        chunks);
    // These are more precise than the part sum, and of a reference rounded to float32.
    target *= std::accumulate(chunks, chunks + chunk_count, 0.0) / part_sums[part];
    const int64_t first = kChunk * place_of(target, chunk_count, [&](int64_t i) { return chunks[i]; });
    const int64_t id = column + first + place_of(target, std::min(kChunk, n - first), [&](int64_t i) -> double {
                         return weights[first + i];
                       });
    return {id, total_.logprob(x_.value(row_, id), settings_.inv_temperature)};
  }

  Drawn draw_truncated(const float* maxima, double uniform) {
    const int64_t chunks = (x_.vocabulary + kChunk - 1) / kChunk;
    best_ = *std::max_element(maxima, maxima + chunks);
    const Cutoff cut = find_cut(maxima, chunks);
    double kept_mass = 0;
    int64_t kept = 0;
    for_each_kept(cut, [&](int64_t i, uint32_t) {
      if (candidates_.weights[i] > 0 && candidates_.weights[i] >= static_cast<float>(settings_.min_p)) {
        kept_mass += candidates_.weights[i];
        candidates_.ids[kept] = candidates_.ids[i];
        candidates_.weights[kept] = candidates_.weights[i];
        ++kept;
      }
    });
    double target = uniform * kept_mass;
    const int64_t id =
        candidates_.ids[place_of(target, kept, [&](int64_t i) -> double { return candidates_.weights[i]; })];
    const double z = (x_.value(row_, id) - best_) * settings_.inv_temperature;
    return {id, z - std::log(kept_mass)};
  }

  // Gathers the candidates and says where top_k and top_p cut them; min_p is a test on each weight.
  Cutoff find_cut(const float* maxima, int64_t chunks) {
    const auto one = [](int64_t) { return 1.0; };
    const auto weight = [this](int64_t i) -> double { return candidates_.weights[i]; };
    const auto below_best = [this](double nats) {
      return static_cast<float>(best_ - nats / settings_.inv_temperature);
    };
    Cutoff cut;
    if (settings_.top_k > 0) {
      gather(maxima, chunks, bound_of_top_k(maxima, chunks));
      cut = select(one, static_cast<double>(settings_.top_k), cut);
      if (settings_.top_p < 1) {
        cut.intersect(select(weight, settings_.top_p * mass(cut), cut));
      }
    } else if (settings_.top_p < 1) {
      // Most mass is near the maximum: look further below it only while what was found is not enough.
      const double all = total_.sum * std::exp((total_.reference - best_) * settings_.inv_temperature);
      const double target = settings_.top_p * all;
      for (double depth = 8; depth < 2 * kDeepest; depth *= 2) {
        gather(maxima, chunks, below_best(std::min(depth, kDeepest)));
        if (mass(cut) >= target) {
          break;
        }
      }
      cut = select(weight, target, cut);
    } else {
      // A little lower than min_p asks: the test on the weight decides.
      gather(maxima, chunks, below_best(std::min(kDeepest, 1e-3 - std::log(settings_.min_p))));
    }
    return cut;
  }

  // A bound that at least top_k logits reach: as high as a few halvings find one that top_k chunk maxima reach.
  float bound_of_top_k(const float* maxima, int64_t chunks) const {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const auto reached = [&](float bound) {
      int64_t count = 0;
      count_at_least_(maxima, chunks, bound, count);
      return count >= settings_.top_k;
    };
    float low = std::max(*std::min_element(maxima, maxima + chunks), -std::numeric_limits<float>::max());
    if (!reached(low)) {
      return kNone;
    }
    float high = best_;
    for (int halving = 0; halving < 12; ++halving) {
      const float middle = low + (high - low) / 2;
      (reached(middle) ? low : high) = middle;
    }
    return low;
  }

  // Candidates are the logits >= bound, without -inf.
  void gather(const float* maxima, int64_t chunks, float bound) {
    bound = std::max(bound, -std::numeric_limits<float>::max());
    candidates_.size = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (maxima[chunk] < bound) {
        continue;
      }
      const int64_t column = chunk * kChunk, n = std::min(kChunk, x_.vocabulary - column);
      candidates_.make_room(kChunk);
      float* logits = &candidates_.logits[candidates_.size];
      int64_t* ids = &candidates_.ids[candidates_.size];
      int64_t found = 0;
      select_(x_.at(row_, column), x_.dtype, n, bound, ids, logits, found);
      for (int64_t i = 0; i < found; ++i) {
        ids[i] += column;
      }
      candidates_.size += found;
    }
    weigh_(
        candidates_.logits.data(), DType::kFloat32, candidates_.size, best_, settings_.inv_temperature,
        candidates_.weights.data());
  }

  // body(candidate) for those inside a cut.
  template <class Body>
  void for_each_kept(const Cutoff& cut, const Body& body) const {
    int64_t ties = 0;
    for (int64_t i = 0; i < candidates_.size; ++i) {
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
    // A few candidates deserve few digits: they are cleared and searched at every level.
    const int most_bits = candidates_.size < 1024 ? 6 : 11;
    uint32_t prefix = 0, fixed = 0; // the digits found so far, and a mask of their bits
    double before = 0;
    for (int shift = 32; shift > 0;) {
      const int bits = std::min(most_bits, shift);
      shift -= bits;
      const uint32_t digits = 1u << bits;
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
    }
    // All that is left has one logit.
    int64_t ties = 0;
    double each = 0;
    for_each_kept(within, [&](int64_t i, uint32_t key) {
      if (key == prefix) {
        ++ties;
        each = weight_of(i);
      }
    });
    return {prefix, each > 0 ? kept_ties(before, each, target, ties) : ties};
  }

  static constexpr double kDeepest = 105; // nats below the best token, from where on float32 weights are 0

  const LogitRows& x_;
  const Settings& settings_;
  decltype(FASTPPO_PICK(softmax_weights)) weigh_ = FASTPPO_PICK(softmax_weights);
  decltype(FASTPPO_PICK(chunk_weights)) weigh_chunks_ = FASTPPO_PICK(chunk_weights);
  decltype(FASTPPO_PICK(count_at_least)) count_at_least_ = FASTPPO_PICK(count_at_least);
  decltype(FASTPPO_PICK(select_at_least)) select_ = FASTPPO_PICK(select_at_least);
  int64_t row_ = 0;
  SoftmaxSums total_;
  float best_ = 0; // the highest logit of the row
  Candidates& candidates_;
  std::vector<Digit>& digits_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(
    const Tensor& logits, double temperature, int64_t top_k, double top_p, double min_p, int64_t seed,
    const Tensor& counters) {
  check_sample(logits, temperature, top_k, top_p, min_p, counters);
  const LogitRows x(logits);
  const Settings settings{1 / temperature, top_k < x.vocabulary ? top_k : 0, top_p, min_p, static_cast<uint64_t>(seed)};
  const Tensor held_counters = contiguous_ids(counters);
  const int64_t* counter = id_data(held_counters);

  const Tensor ids = empty_tensor(counters.sizes(), ScalarType::Long);
  const Tensor policy = empty_float(counters.sizes()), sampling = empty_float(counters.sizes());
  const Tensor entropy = empty_float(counters.sizes());
  auto* id_out = static_cast<int64_t*>(ids.mutable_data_ptr());
  float *policy_out = float_data(policy), *sampling_out = float_data(sampling), *entropy_out = float_data(entropy);

  const int64_t tiles = tiles_of(x.vocabulary), detail = settings.truncates() ? kChunk : kPart;
  const int64_t details = (x.vocabulary + detail - 1) / detail;
  thread_local Shared kept;
  Shared& shared = kept; // a thread_local named inside the region would be another thread's
  shared.sums.resize(x.rows * tiles);
  shared.details.resize(x.rows * details);
  shared.tiles_left.assign(x.rows, static_cast<int32_t>(tiles));

  const auto total_of = [&](int64_t row) {
    SoftmaxSums total;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      total.merge(shared.sums[row * tiles + tile], settings.inv_temperature);
    }
    return total;
  };
  std::atomic<bool> all_are_distributions = true;
  const auto draw = [&](RowSampler& sampler, int64_t row) {
    const SoftmaxSums total = total_of(row);
    if (not_a_distribution(total)) {
      all_are_distributions.store(false, std::memory_order_relaxed);
      return;
    }
    const Drawn drawn = sampler.draw(
        row, total, &shared.sums[row * tiles], &shared.details[row * details],
        philox_uniform(settings.seed, static_cast<uint64_t>(counter[row])));
    id_out[row] = drawn.id;
    policy_out[row] = static_cast<float>(total.logprob(x.value(row, drawn.id), settings.inv_temperature));
    sampling_out[row] = static_cast<float>(drawn.log_probability);
    entropy_out[row] = static_cast<float>(total.entropy());
  };

  const auto tile_sums = FASTPPO_PICK(softmax_sums);
  torch::stable::parallel_for(0, x.rows * tiles, kTilesPerThread, [&](int64_t begin, int64_t end) {
    thread_local Workspace workspace;
    RowSampler sampler(x, settings, workspace);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tiles, column = task % tiles * kTile;
      float* wanted = &shared.details[row * details + column / detail];
      const TileDetails tile_details =
          settings.truncates() ? TileDetails{nullptr, wanted} : TileDetails{wanted, nullptr};
      tile_sums(
          x.at(row, column), x.dtype, std::min(kTile, x.vocabulary - column), settings.inv_temperature,
          shared.sums[task], &tile_details);
      if (std::atomic_ref(shared.tiles_left[row]).fetch_sub(1, std::memory_order_acq_rel) == 1) {
        draw(sampler, row);
      }
    }
  });

  for (int64_t row = 0; !all_are_distributions && row < x.rows; ++row) {
    if (const char* why = not_a_distribution(total_of(row))) {
      fail("sample", "logits row ", row, " ", why);
    }
  }
  return {ids, policy, sampling, entropy};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

} // namespace fastppo
