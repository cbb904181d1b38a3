// varlen_attention on the CPU: checks, threads, registration. Other devices have FlashAttention (fastppo/attention.py).
#include "cpu/vec/varlen_attention.h"

#include "cpu/tensor.h"
#include "csrc/varlen_attention.h"

#include <atomic>
#include <numeric>

namespace fastppo {
namespace {

constexpr int64_t kVarlenGrain = 1 << 18; // multiplications that are worth waking a second thread

// A tensor (N, heads, D) held for the length of a call; it may be a copy with D of unit stride.
struct HeldHeads {
  Tensor held;
  Rows tokens;
  int64_t head;

  explicit HeldHeads(const Tensor& x)
      : held(with_unit_last_stride(x)),
        tokens{held.const_data_ptr(), held.stride(0), dtype_of(held)},
        head(held.stride(1)) {}

  Heads at(int64_t token, int64_t h) const {
    const int64_t place = (token * tokens.stride + h * head) * element_size(tokens.dtype);
    const auto* data = static_cast<const char*>(tokens.data) + place;
    return {{data, tokens.stride, tokens.dtype}, head};
  }
};

// Where sequences begin, and the last one ends.
std::vector<int64_t> borders(const char* name, const Tensor& cu_seqlens, int64_t tokens) {
  const Tensor held = torch::stable::contiguous(cu_seqlens);
  const auto* data = static_cast<const int64_t*>(held.const_data_ptr());
  std::vector<int64_t> found(data, data + held.size(0));
  const char* op = "varlen_attention";
  if (found.front() != 0 || found.back() != tokens) {
    fail(op, name, " must go from 0 to ", tokens, ", got ", found.front(), " and ", found.back());
  }
  for (size_t s = 1; s < found.size(); ++s) {
    if (found[s] < found[s - 1]) {
      fail(op, name, " must not fall, got ", found[s - 1], " and ", found[s], " at ", s - 1);
    }
  }
  return found;
}

struct Sequences {
  std::vector<int64_t> queries, keys; // borders
  std::vector<int64_t> order;         // by work, most first: threads then end together

  Sequences(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const Tensor& query, const Tensor& key)
      : queries(borders("cu_seqlens_q", cu_seqlens_q, query.size(0))),
        keys(borders("cu_seqlens_k", cu_seqlens_k, key.size(0))),
        order(queries.size() - 1) {
    for (size_t s = 0; s < order.size(); ++s) {
      if (queries_of(s) > keys_of(s)) {
        fail(
            "varlen_attention", "a sequence must have at least as many keys as queries, got ", keys_of(s), " and ",
            queries_of(s), " in sequence ", s);
      }
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work(a) > work(b); });
  }

  int64_t queries_of(int64_t s) const { return queries[s + 1] - queries[s]; }
  int64_t keys_of(int64_t s) const { return keys[s + 1] - keys[s]; }
  int64_t work(int64_t s) const { return queries_of(s) * keys_of(s); }
};

// What forward and backward both have, by sequence and key head.
struct Attention {
  HeldHeads query, key, value, out;
  Tensor lse; // contiguous
  Sequences sequences;
  double scale;
  std::optional<int64_t> window;
  int64_t tokens = query.held.size(0), heads = key.held.size(1), width = query.held.size(2);
  int64_t group = query.held.size(1) / heads;

  VarlenAttentionArgs args(int64_t s, int64_t h) const {
    const int64_t first = sequences.queries[s], first_key = sequences.keys[s];
    return {
        query.at(first, h * group),
        key.at(first_key, h),
        value.at(first_key, h),
        sequences.queries_of(s),
        sequences.keys_of(s),
        group,
        width,
        window.value_or(sequences.keys_of(s)),
        static_cast<float>(scale),
        float_data(lse) + h * group * tokens + first,
        tokens,
        out.at(first, h * group)};
  }

  // Runs f(sequence, key head, scratch) for all of them. Threads take the next one when they are done with theirs; each
  // writes places of its own, so who does what changes no bit.
  template <class Function>
  void for_each_head(bool backward, const Function& f) const {
    int64_t longest = 0, work = 0;
    for (const int64_t s : sequences.order) {
      longest = std::max(longest, sequences.keys_of(s));
      work += sequences.work(s);
    }
    const int64_t tasks = static_cast<int64_t>(sequences.order.size()) * heads;
    const int64_t worth = work * heads * group * width / kVarlenGrain + 1;
    const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), tasks, worth});
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      std::vector<float> scratch(varlen_attention_scratch(group, width, longest, backward));
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
        f(sequences.order[task / heads], task % heads, scratch.data());
      }
    });
  }
};

std::tuple<Tensor, Tensor> varlen_attention_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    double scale, std::optional<int64_t> window) {
  check_varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, window);
  Sequences sequences(cu_seqlens_q, cu_seqlens_k, query, key);
  const Tensor out = empty_tensor(query.sizes(), query.scalar_type());
  const Tensor lse = empty_float({query.size(1), query.size(0)});
  const Attention attention{
      HeldHeads(query), HeldHeads(key), HeldHeads(value), HeldHeads(out), lse, std::move(sequences), scale, window};
  auto* head_forward = FASTPPO_PICK(varlen_attention_forward);
  attention.for_each_head(
      false, [&](int64_t s, int64_t h, float* scratch) { head_forward(attention.args(s, h), scratch); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward_cpu(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale,
    std::optional<int64_t> window) {
  check_varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, window);
  check_varlen_attention_backward(grad, query, out, lse);
  const Attention attention{
      HeldHeads(query),
      HeldHeads(key),
      HeldHeads(value),
      HeldHeads(out),
      torch::stable::contiguous(lse),
      Sequences(cu_seqlens_q, cu_seqlens_k, query, key),
      scale,
      window};
  const Tensor grad_query = empty_tensor(query.sizes(), query.scalar_type());
  const Tensor grad_key = empty_tensor(key.sizes(), query.scalar_type());
  const Tensor grad_value = empty_tensor(key.sizes(), query.scalar_type());
  const HeldHeads g(grad), gq(grad_query), gk(grad_key), gv(grad_value);
  auto* head_backward = FASTPPO_PICK(varlen_attention_backward);
  attention.for_each_head(true, [&](int64_t s, int64_t h, float* scratch) {
    const int64_t first = attention.sequences.queries[s], first_key = attention.sequences.keys[s];
    VarlenAttentionArgs args = attention.args(s, h);
    args.grad = g.at(first, h * attention.group);
    args.grad_query = gq.at(first, h * attention.group);
    args.grad_key = gk.at(first_key, h);
    args.grad_value = gv.at(first_key, h);
    head_backward(args, scratch);
  });
  return {grad_query, grad_key, grad_value};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention_cpu));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward_cpu));
}

} // namespace fastppo
