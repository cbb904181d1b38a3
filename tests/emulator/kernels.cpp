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

#include "cuda/adamw.cuh"
#include "cuda/gae.cuh"
#include "cuda/kl.cuh"
#include "cuda/launch.cuh"
#include "cuda/ppo_loss.cuh"
#include "cuda/ppo_loss_from_logits.cuh"

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

Results adamw() {
  constexpr int64_t n = 299; // the last group is cut off
  Inputs in(1, n);
  Outputs out(n);
  std::vector<uint16_t> param(n, 0x3f80), moment(n, 0x3f80);
  std::vector<int16_t> residual(n, 7);
  const Span<float> full = out.add();
  std::fill(full.data, full.data + n, 1.0f);
  const double grad_scale = 0.5;
  for (const Rows& grad : {in.floats(), in.halves()}) {
    FASTPPO_LAUNCH(
        adamw_kernel, 2, kAdamwThreads, 0, nullptr,
        AdamwArgs{
            {param.data(), n},
            {residual.data(), n},
            grad,
            {{moment.data(), n}, {}},
            {{}, full},
            adamw_settings(0.1, 0.9, 0.99, 1e-8, 0.1, 1),
            1,
            Number{&grad_scale, NumberType::kDouble}});
  }
  const Span<float> master = out.add();
  for (int64_t i = 0; i < n; ++i) {
    master.data[i] = join_master(param[i], residual[i]);
  }
  return out.held;
}

Results ppo_loss() {
  Results results;
  const PpoSettings settings{0.2, 0.3, 2, 0.2, 0.5, 0.01, 0.1, KlEstimator::k3};
  for (const int64_t columns : kColumns) {
    const Inputs in(3, columns);
    Outputs out(3 * columns);
    std::vector<PpoSums> parts(2);
    std::vector<long long> counts(2);
    unsigned counter = 0;
    for (const int blocks : {1, 2}) {
      const PpoArgs args{
          in.floats(),
          in.halves(),
          in.floats(),
          in.floats(),
          in.halves(),
          in.floats(),
          in.floats(),
          in.halves(),
          in.counts(),
          settings,
          true,
          Number{},
          {out.add(), out.add(), out.add(), out.add(), out.add()},
          {counts.data(), blocks},
          {parts.data(), blocks},
          &counter};
      if (blocks == 1) {
        FASTPPO_LAUNCH(ppo_loss_kernel, 1, kPpoThreads, 0, nullptr, args, kPpoPrepare, kPpoLoss);
      } else {
        FASTPPO_LAUNCH(ppo_loss_kernel, 2, kPpoThreads, 0, nullptr, args, kPpoPrepare, kPpoPrepare);
        FASTPPO_LAUNCH(ppo_loss_kernel, 2, kPpoThreads, 0, nullptr, args, kPpoLoss, kPpoLoss);
      }
    }
    results.insert(results.end(), out.held.begin(), out.held.end());
  }
  return results;
}

template <class T>
void ppo_loss_from_logits(const std::vector<T>& x, Results& results) {
  constexpr int64_t rows = 3, vocabulary = 299;
  const Inputs tokens(1, rows);
  const std::vector<int64_t> ids{5, 0, vocabulary - 1};
  std::vector<T> dlogits(rows * vocabulary);
  std::vector<float> found(2 * rows);
  long long count = 0;
  double normalizer = 0;
  FASTPPO_LAUNCH(
      count_tokens_kernel, 1, kPpoThreads, 0, nullptr, tokens.counts(), Span<long long>{&count, 1},
      Span<double>{&normalizer, 1});
  for (const int64_t held : {int64_t{0}, int64_t{64}, int64_t{304}}) {
    const PpoRowsArgs<T> args{
        {x.data(), rows, vocabulary, {1, {rows}, {vocabulary}}},
        {ids.data(), rows, {1, {rows}, {1}}},
        tokens.floats(),
        tokens.halves(),
        tokens.floats(),
        tokens.counts(),
        {0.2, 0.3, 2, 0.2, 0.5, 0.01, 0.1, KlEstimator::k3},
        Number{&normalizer, NumberType::kDouble},
        2.0,
        base_2_scale(2.0),
        held,
        {dlogits.data(), rows * vocabulary},
        {found.data(), rows},
        {found.data() + rows, rows}};
    FASTPPO_LAUNCH((ppo_rows_kernel<T>), 2, kRowThreads, held * static_cast<int64_t>(sizeof(T)), nullptr, args);
    FASTPPO_LAUNCH(
        (scale_kernel<T>), 2, kScaleThreads, 0, nullptr, args.dlogits, Number{nullptr, NumberType::kGiven, 0.3});
    results.push_back(found);
    results.emplace_back(dlogits.begin(), dlogits.end());
  }
}

Results ppo_loss_from_logits() {
  const Inputs in(3, 299);
  Results results;
  ppo_loss_from_logits(in.x, results);
  ppo_loss_from_logits(in.y, results);
  return results;
}

// The suite asks for each of these; a concept with kernels that is not here is an error (test_sanitize.py).
const std::map<std::string, std::function<Results()>> concepts = {
    {"adamw", adamw}, {"gae", gae}, {"kl", kl}, {"ppo_loss", ppo_loss}, {"ppo_loss_from_logits", [] {
                                                                           return ppo_loss_from_logits();
                                                                         }}};

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
