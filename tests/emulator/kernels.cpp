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
#include "cuda/decode_attention.cuh"
#include "cuda/distribution_kl.cuh"
#include "cuda/gae.cuh"
#include "cuda/kl.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear_logprobs.cuh"
#include "cuda/logprobs.cuh"
#include "cuda/ppo_loss.cuh"
#include "cuda/ppo_loss_from_logits.cuh"
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

// Two rows in three slots, five query heads on one key head: two blocks a row; one token, and more than a tile.
Results decode_attention() {
  constexpr int64_t kRows = 2, kGroup = 5, kWidth = 11, kSlots = 3, kCapacity = 140;
  Inputs in(kRows, kGroup * kWidth), cached(2 * kSlots, kCapacity * kWidth);
  Outputs out(kRows * kGroup * kWidth);
  const int64_t slots[] = {2, 0}, lengths[] = {kCapacity - 1, 0};
  constexpr int64_t kCached = kSlots * kCapacity * kWidth;
  for (const int64_t window : {0, 3}) {
    const DecodeAttentionArgs<float> args{
        {in.x.data(), kRows * kGroup * kWidth},
        {in.x.data(), kRows * kWidth},
        {in.x.data() + kRows * kWidth, kRows * kWidth},
        {{cached.x.data(), kCached}, kCapacity * kWidth, kCapacity * kWidth, kWidth},
        {{cached.x.data() + kCached, kCached}, kCapacity * kWidth, kCapacity * kWidth, kWidth},
        {slots, kRows},
        {lengths, kRows},
        out.add(),
        kRows,
        1,
        kGroup,
        kWidth,
        kSlots,
        kCapacity,
        window,
        0.3f};
    FASTPPO_LAUNCH(
        (decode_attention_kernel<float>), static_cast<unsigned>(kRows * args.chunks()), kDecodeThreads,
        decode_attention_shared(args) * sizeof(float), nullptr, args);
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

// Rows of logits: whole and in parts, aligned and not, and the numbers that go with each row.
template <class T>
struct LogitInputs {
  int64_t rows, columns, offset;
  std::vector<T> x, y;
  std::vector<int64_t> id;
  std::vector<float> number;
  std::vector<char> room;
  std::vector<unsigned> counters;

  LogitInputs(int64_t rows, int64_t columns, int64_t offset)
      : rows(rows),
        columns(columns),
        offset(offset),
        x(rows * columns + offset),
        y(rows * columns + offset),
        id(rows),
        number(rows),
        room(1 << 12),
        counters(rows) {
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = from_float<T>(5 * std::sin(static_cast<float>(i)));
      y[i] = from_float<T>(5 * std::cos(static_cast<float>(i)));
    }
    for (int64_t i = 0; i < rows; ++i) {
      id[i] = columns - 1 - i;
      number[i] = 0.5f * static_cast<float>(i); // the first row is without gradient
    }
  }
  LogitRows<T> logits(const std::vector<T>& from) const {
    return {from.data() + offset, rows, columns, leading(columns)};
  }
  PerRow<int64_t> ids() const { return {id.data(), rows, leading(1)}; }
  PerRow<float> numbers() const { return {number.data(), rows, leading(1)}; }
  RowSplit split() const { return {rows, columns}; }
  template <class Sums>
  Span<Sums> parts() {
    return {reinterpret_cast<Sums*>(room.data()), static_cast<int64_t>(room.size() / sizeof(Sums))};
  }

 private:
  Leading leading(int64_t stride) const {
    Leading out;
    out.dims = 1;
    out.sizes[0] = rows;
    out.strides[0] = stride;
    return out;
  }
};

// In the results as floats, so that they are compared.
template <class T>
Span<T> add_as(Outputs& out) {
  return {reinterpret_cast<T*>(out.add().data), out.size};
}

#if defined(FASTPPO_EMULATOR_THREADS)
constexpr int64_t kLogitColumns = 2060; // two parts
#else
constexpr int64_t kLogitColumns = 9001;
#endif

template <class Body>
Results for_logits(const Body& body) {
  Results results;
  const auto run = [&](auto type, int64_t rows, int64_t columns, int64_t offset) {
    using T = typename decltype(type)::type;
    LogitInputs<T> in(rows, columns, offset);
    Outputs out(2 * rows * columns);
    body(in, out);
    results.insert(results.end(), out.held.begin(), out.held.end());
  };
  run(std::type_identity<float>(), 3, 19, 1);
  run(std::type_identity<__nv_bfloat16>(), 2, kLogitColumns, 0);
  run(std::type_identity<__nv_bfloat16>(), 1, kLogitColumns, 3);
  return results;
}

Results logprobs() {
  return for_logits([]<class T>(LogitInputs<T>& in, Outputs& out) {
    const RowSplit split = in.split();
    FASTPPO_LAUNCH(
        logprobs_kernel<T>, split.blocks(), kRowThreads, 0, nullptr,
        LogprobsArgs<T>{
            in.logits(in.x), in.ids(), 1.3, 1.3f * static_cast<float>(kLog2E), split, in.template parts<SoftmaxSums>(),
            in.counters.data(), out.add(), out.add(), out.add(), out.add()});
    FASTPPO_LAUNCH(
        logprobs_backward_kernel<T>, split.blocks(), kRowThreads, 0, nullptr,
        LogprobsBackwardArgs<T>{
            in.numbers(), PerRow<float>(), in.logits(in.x), in.ids(), in.numbers(), in.numbers(), in.numbers(), 1.3,
            split, add_as<T>(out)});
  });
}

Results distribution_kl() {
  return for_logits([]<class T>(LogitInputs<T>& in, Outputs& out) {
    const RowSplit split = in.split();
    const Span<float> stats = out.add();
    FASTPPO_LAUNCH(
        distribution_kl_kernel<T>, split.blocks(), kRowThreads, 0, nullptr,
        DistributionKlArgs<T>{
            in.logits(in.x), in.logits(in.y), 1.3, 1.3f * static_cast<float>(kLog2E), split,
            in.template parts<KlSums>(), in.counters.data(), out.add(), stats});
    FASTPPO_LAUNCH(
        distribution_kl_backward_kernel<T>, split.blocks(), kRowThreads, 0, nullptr,
        DistributionKlBackwardArgs<T>{
            in.numbers(), in.logits(in.x), in.logits(in.y), in.numbers(), Span<const float>{stats.data, stats.size},
            1.3, split, add_as<T>(out), add_as<T>(out)});
  });
}

// The second tile and the second block of rows of a larger whole.
Results linear_logprobs() {
  return for_logits([]<class T>(LogitInputs<T>& in, Outputs& out) {
    const int64_t columns = in.columns, whole = 2 * in.columns;
    const std::vector<T> bias(whole, from_float<T>(0.25f));
    const HeadRows<T> head{{-0.5f, in.offset == 0 ? 0.0f : 30.0f}, {bias.data(), whole}};
    const Span<T> products = add_as<T>(out);
    std::copy(in.x.begin() + in.offset, in.x.end(), products.data);
    const Tile<T> tile{products.part(0, in.rows * columns), in.rows, columns, 0, columns};
    const RowGrads grads{in.numbers(), PerRow<float>()};
    FASTPPO_LAUNCH(
        fold_kernel<T>, in.rows, kRowThreads, 0, nullptr,
        FoldArgs<T>{
            tile, head, in.ids(), whole, 1.3, 1.3f * static_cast<float>(kLog2E), in.template parts<SoftmaxSums>(),
            Span<float>{in.number.data(), in.rows}, out.add(), out.add(), out.add(), out.add()});
    FASTPPO_LAUNCH(
        tile_grad_kernel<T>, in.rows, kRowThreads, 0, nullptr,
        TileGradArgs<T>{tile, head, grads, in.ids(), in.numbers(), in.numbers(), in.numbers(), 1.3});
    std::vector<float> sum(whole, 0.5f);
    for (const bool is_last : {false, true}) {
      Tile<T> block = tile;
      block.first_row = is_last ? in.rows : 0;
      const Span<T> dbias = is_last ? Span<T>{add_as<T>(out).data, whole} : Span<T>();
      FASTPPO_LAUNCH(
          column_sums_kernel<T>, 2, kRowThreads, 0, nullptr, ColumnSumsArgs<T>{block, {sum.data(), whole}, dbias});
    }
    const Span<float> total = out.add();
    const Span<const T> product{products.data, in.rows * columns};
    FASTPPO_LAUNCH(
        accumulate_kernel<T>, 2, kRowThreads, 0, nullptr,
        AccumulateArgs<T>{product, total, {}, true, columns, 0, false, {}});
    FASTPPO_LAUNCH(
        accumulate_kernel<T>, 2, kRowThreads, 0, nullptr,
        AccumulateArgs<T>{product, total, add_as<T>(out), false, columns, 0, true, grads});
    FASTPPO_LAUNCH(
        active_rows_kernel<T>, 2, kRowThreads, 0, nullptr, ActiveRowsArgs<T>{in.logits(in.x), grads, add_as<T>(out)});
  });
}

// One block of two warps for a row, and two blocks of one; with and without truncation.
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
          {maxima.data(), static_cast<int64_t>(maxima.size())}};
      const int64_t bytes = truncates ? kHistogramBytes : 0;
      const auto kernel = truncates ? sample_kernel<float, true> : sample_kernel<float, false>;
      FASTPPO_LAUNCH(
          kernel, static_cast<unsigned>(kRows * splits), static_cast<unsigned>(32 * split.warps), bytes, nullptr, args);
      out.held.emplace_back(ids.begin(), ids.end());
    }
  }
  return out.held;
}

// The suite asks for each of these; a concept with kernels that is not here is an error (test_sanitize.py).
const std::map<std::string, std::function<Results()>> concepts = {
    {"adamw", adamw},
    {"decode_attention", decode_attention},
    {"distribution_kl", distribution_kl},
    {"gae", gae},
    {"kl", kl},
    {"linear_logprobs", linear_logprobs},
    {"logprobs", logprobs},
    {"ppo_loss", ppo_loss},
    {"ppo_loss_from_logits", [] { return ppo_loss_from_logits(); }},
    {"sample", sample}};

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
