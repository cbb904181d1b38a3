/*
Every op's schema, on one page, and the Python module fastppo._C with the facts of this build.

To add an op, for example gae:
  1. fastppo/reference/gae.py   the function in plain torch: its definition.
  2. here                       its schema. (a!) marks exactly what it writes.
  3. csrc/gae.h                 the formula as templates over float or a vector register, and check_gae().
  4. csrc/cpu/vec/gae.{h,cpp}   the loops on raw pointers (no torch but ATen/cpu/vec); FASTPPO_KERNEL declares them.
  5. csrc/cpu/gae.cpp           check, allocate, split over threads, FASTPPO_PICK the loops, register. "gae" joins
                                CONCEPTS in CMakeLists.txt.
  6. fastppo/ops/gae.py         the public function with its docstring, the fake, the gradient.
  7. tests/ops/test_gae.py and bench/gae.py.

Threads only ever change who computes a block, never what is in it (cpu/rows.h), so sums keep their order.
*/
#include "check.h"
#include "cpu/capability.h"

#include <torch/csrc/stable/library.h>

#include <pybind11/pybind11.h>

STABLE_TORCH_LIBRARY(fastppo, m) {
  // gae
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor response_mask, float gamma, float lam, "
      "Tensor? bootstrap_values=None) -> (Tensor advantages, Tensor returns)");
  m.def("whiten(Tensor x, Tensor mask) -> Tensor");
  m.def("scale_to_unit_std(Tensor x, Tensor mask) -> Tensor");
  m.def(
      "rewards_and_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, "
      "Tensor response_mask, float kl_coef, str estimator, float? reward_clip, bool whiten_rewards, "
      "bool whiten_advantages, float gamma, float lam, Tensor? bootstrap_values=None) "
      "-> (Tensor rewards, Tensor kl, Tensor advantages, Tensor returns)");

  // kl
  m.def("kl_penalty(Tensor logprobs, Tensor ref_logprobs, str estimator) -> Tensor");
  m.def("kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, str estimator) -> Tensor");

  // ppo_loss
  m.def(
      "ppo_loss(Tensor new_logprobs, Tensor logprobs, Tensor advantages, Tensor response_mask, Tensor? new_values, "
      "Tensor? values, Tensor? returns, Tensor? entropy, Tensor? ref_logprobs, Tensor? normalizer, float clip_range, "
      "float clip_range_high, float? dual_clip, float value_clip_range, float vf_coef, float entropy_coef, "
      "float kl_coef, str kl_estimator) "
      "-> (Tensor loss, Tensor stats, Tensor grad_new_logprobs, Tensor grad_new_values, Tensor grad_entropy)");

  // adamw
  m.def(
      "adamw_step_(Tensor(a!) param, Tensor(b!) residual, Tensor grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, int step, float grad_scale=1.0, "
      "Tensor? grad_scale_tensor=None) -> ()");

  // logprobs
  m.def(
      "logprobs(Tensor logits, Tensor ids, float temperature) "
      "-> (Tensor logprobs, Tensor entropy, Tensor reference, Tensor log_sum)");
  m.def(
      "logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor ids, Tensor entropy, "
      "Tensor reference, Tensor log_sum, float temperature) -> Tensor");

  // linear_logprobs
  m.def(
      "linear_logprobs(Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float temperature, float? softcap, "
      "float logit_scale) -> (Tensor logprobs, Tensor entropy, Tensor reference, Tensor log_sum)");
  m.def(
      "linear_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, "
      "Tensor ids, Tensor? bias, Tensor entropy, Tensor reference, Tensor log_sum, float temperature, float? softcap, "
      "float logit_scale, bool needs_hidden, bool needs_weight, bool needs_bias) "
      "-> (Tensor hidden, Tensor weight, Tensor bias)");

  // distribution_kl
  m.def("distribution_kl(Tensor logits, Tensor ref_logits, float temperature) -> (Tensor kl, Tensor stats)");
  m.def(
      "distribution_kl_backward(Tensor grad_kl, Tensor logits, Tensor ref_logits, Tensor kl, Tensor stats, "
      "float temperature, bool needs_logits, bool needs_ref_logits) -> (Tensor logits, Tensor ref_logits)");

  // sample
  m.def(
      "sample(Tensor logits, float temperature, int top_k, float top_p, float min_p, int seed, Tensor counters) "
      "-> (Tensor token_ids, Tensor logprobs, Tensor sampling_logprobs, Tensor entropy)");
}

namespace {

pybind11::list split(const std::string& text) {
  pybind11::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    parts.append(part);
  }
  return parts;
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

} // namespace

PYBIND11_MODULE(_C, m) {
  if (const auto& error = fastppo::capability_error(); !error.empty()) {
    throw std::runtime_error(error);
  }
  m.doc() = "Registers the ops under torch.ops.fastppo; holds the facts of this build.";
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["torch"] = FASTPPO_TORCH_VERSION;
    facts["compiler"] = compiler();
    facts["instruction_sets"] = split(FASTPPO_INSTRUCTION_SETS);
    facts["cuda"] = FASTPPO_CUDA_CHOICE;
    facts["cuda_archs"] = split(FASTPPO_CUDA_ARCHS);
    return facts;
  });
  m.def("cpu_capability", [] { return fastppo::capability_name(fastppo::active_capability()); });
}
