/*
Every op's schema, on one page. (a!) marks exactly what an op writes. csrc/library.cpp registers them as fastppo; the
library of emulated CUDA kernels (csrc/emulator/library.cpp) as fastppo_emulated.
*/
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastppo {

inline void define_ops(torch::stable::detail::StableLibrary& m) {
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
      "float kl_coef, str kl_estimator, float? normalizer_number) "
      "-> (Tensor loss, Tensor stats, Tensor grads)");

  // ppo_loss_from_logits
  m.def(
      "ppo_loss_from_logits(Tensor logits, Tensor ids, Tensor logprobs, Tensor advantages, Tensor response_mask, "
      "Tensor? new_values, Tensor? values, Tensor? returns, Tensor? ref_logprobs, Tensor? normalizer, "
      "float temperature, float clip_range, float clip_range_high, float? dual_clip, float value_clip_range, "
      "float vf_coef, float entropy_coef, float kl_coef, str kl_estimator, bool needs_logits, "
      "float? normalizer_number) "
      "-> (Tensor loss, Tensor stats, Tensor grad_logits, Tensor grad_new_values)");
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");

  // adamw
  m.def(
      "adamw_step_(Tensor(a!) param, Tensor(b!) residual, Tensor grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, int step, float grad_scale=1.0, "
      "Tensor? grad_scale_tensor=None) -> ()");

  // decode_attention
  m.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slots, Tensor lengths, float scale, int? window) -> Tensor");

  // varlen_attention
  m.def(
      "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, "
      "int? window) -> (Tensor out, Tensor lse)");
  m.def(
      "varlen_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, int? window) "
      "-> (Tensor query, Tensor key, Tensor value)");

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

} // namespace fastppo
