/*
Every kernel of csrc/cuda on small inputs, without torch, for the sanitizers: `kernels CONCEPT ORDER`. Whether the
numbers are right is for tests/ops to say; here they only have to be the same twice, and no sanitizer may find anything.
*/
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/gae.cuh"
#include "cuda/kl.cuh"
#include "cuda/launch.cuh"
#include "cuda/sample.cuh"

namespace fastppo::cuda {
namespace {

// Three rows of 19: shorter and longer than a lane's group, aligned and not. 300 would take two steps of a warp.
struct Inputs {
  int64_t rows, columns;
  std::vector<float> x;
  std::vector<__nv_bfloat16> y;
  std::unique_ptr<bool[]> mask;

  Inputs(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), x(rows * columns), y(rows * columns), mask(new bool[rows * columns]) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      x[i] = std::sin(static_cast<float>(i));
      y[i] = __float2bfloat16(std::cos(static_cast<float>(i)));
      mask[i] = i % 5 != 3;
    }
  }
  Rows floats() const { return {x.data(), rows, columns, columns, DType::kFloat32}; }
  Rows halves() const { return {y.data(), rows, columns, columns, DType::kBFloat16}; }
  Rows column() const { return {x.data(), rows, 1, columns, DType::kFloat32}; }
  MaskRows counts() const { return {mask.get(), rows, columns, columns}; }
};

struct Outputs {
  std::vector<std::vector<float>> held;
  int64_t size;

  explicit Outputs(int64_t size) : size(size) {}
  Span<float> add() {
    held.emplace_back(size, NAN);
    return {held.back().data(), size};
  }
};

// Threads are slow; what a second step of a warp could add, fibers see.
#if defined(FASTPPO_EMULATOR_THREADS)
constexpr int64_t kColumns[] = {19};
#else
constexpr int64_t kColumns[] = {19, 300};
#endif

using Results = std::vector<std::vector<float>>;

Results gae() {
  Results results;
  for (const int64_t columns : kColumns) {
    const Inputs in(3, columns);
    Outputs out(3 * columns);
    std::vector<Moments> parts(4);
    const Span<Moments> first{parts.data(), 2}, second{parts.data() + 2, 2};
    FASTPPO_LAUNCH(
        gae_kernel, 1, kGaeThreads, 0, nullptr,
        GaeArgs{in.floats(), in.halves(), in.counts(), in.column(), 0.9f, 0.8f, out.add(), out.add()});
    const StandardizeArgs standardize{in.halves(), in.counts(), true, out.add(), first};
    FASTPPO_LAUNCH(standardize_kernel, 2, kGaeThreads, 0, nullptr, standardize, kMeasure, kMeasure);
    FASTPPO_LAUNCH(standardize_kernel, 2, kGaeThreads, 0, nullptr, standardize, kStandardize, kStandardize);
    const Span<Moments> one{parts.data(), 1}, other{parts.data() + 1, 1};
    const RewardsAndAdvantagesArgs all{
        in.column(), in.floats(), in.halves(), in.halves(), in.counts(), Rows{},    KlEstimator::k3, 0.1f, 1.0f, true,
        true,        0.9f,        0.8f,        out.add(),   out.add(),   out.add(), out.add(),       one,  other};
    FASTPPO_LAUNCH(rewards_and_advantages_kernel, 1, kGaeThreads, 0, nullptr, all, kShapeRewards, kWhitenAdvantages);
    RewardsAndAdvantagesArgs several = all;
    several.reward_parts = first;
    several.advantage_parts = second;
    for (int phase = kShapeRewards; phase <= kWhitenAdvantages; ++phase) {
      FASTPPO_LAUNCH(rewards_and_advantages_kernel, 2, kGaeThreads, 0, nullptr, several, phase, phase);
    }
    results.insert(results.end(), out.held.begin(), out.held.end());
  }
  return results;
}

Results kl() {
  const Inputs in(3, 300);
  Outputs out(900);
  for (const Rows& grad : {Rows{}, in.floats()}) {
    FASTPPO_LAUNCH(
        kl_kernel, 2, kKlThreads, 0, nullptr, KlArgs{in.floats(), in.halves(), grad, KlEstimator::k3, out.add()});
  }
  return out.held;
}

// One block of two warps for a row, and two blocks of one; with and without truncation, maxima in either memory.
Results sample() {
  constexpr int64_t kRows = 3, kVocabulary = 300;
  const Inputs in(kRows, kVocabulary);
  Leading leading;
  leading.dims = 1;
  leading.sizes[0] = kRows;
  leading.strides[0] = kVocabulary;
  const std::vector<int64_t> counters{7, 8, 9};
  Leading of_counters = leading;
  of_counters.strides[0] = 1;
  Outputs out(kRows);
  for (const int splits : {1, 2}) {
    SampleSplit split(kRows, kVocabulary);
    split.warps = 3 - splits;
    split.splits = splits;
    split.tiles = 2;
    split.tile = 256;
    split.batches = 1;
    std::vector<TileSums> tiles(kRows * split.tiles);
    std::vector<unsigned> arrived(kRows, 0);
    std::vector<float> maxima(kRows * split.maxima());
    std::vector<int64_t> ids(kRows);
    for (const bool truncates : {false, true}) {
      const SampleArgs<float> args{
          {in.x.data(), kRows, kVocabulary, leading},
          {counters.data(), kRows, of_counters},
          split,
          1.25,
          base_2_scale(1.25),
          truncates ? 50 : 0,
          truncates ? 0.9 : 1.0,
          truncates ? 0.1f : 0.0f,
          0x1p44f,
          11,
          {ids.data(), kRows},
          out.add(),
          out.add(),
          out.add(),
          {tiles.data(), static_cast<int64_t>(tiles.size())},
          arrived.data(),
          splits == 1 ? Span<float>() : Span<float>{maxima.data(), static_cast<int64_t>(maxima.size())}};
      const int64_t bytes = truncates ? kHistogramBytes + split.maxima() * static_cast<int64_t>(sizeof(float)) : 0;
      const auto kernel = truncates ? sample_kernel<float, true> : sample_kernel<float, false>;
      FASTPPO_LAUNCH(
          kernel, static_cast<unsigned>(kRows * splits), static_cast<unsigned>(32 * split.warps), bytes, nullptr, args);
      out.held.emplace_back(ids.begin(), ids.end());
    }
  }
  return out.held;
}

// The suite asks for each of these; a concept with kernels that is not here is an error (test_sanitize.py).
const std::map<std::string, std::function<Results()>> concepts = {{"gae", gae}, {"kl", kl}, {"sample", sample}};

} // namespace
} // namespace fastppo::cuda

int main(int count, char** arguments) {
  using namespace fastppo::cuda;
  if (count != 3) {
    for (const auto& [name, run] : concepts) {
      std::printf("%s\n", name.c_str());
    }
    return 0;
  }
  fastppo::emulator::machine.order = static_cast<fastppo::emulator::Order>(std::atoi(arguments[2]));
  const auto run = concepts.at(arguments[1]);
  const Results first = run(), second = run();
  for (size_t i = 0; i < first.size(); ++i) {
    if (std::memcmp(first[i].data(), second[i].data(), first[i].size() * sizeof(float)) != 0) {
      std::printf("result %zu differs from run to run\n", i);
      return 1;
    }
  }
  std::printf("ok\n");
  return 0;
}
