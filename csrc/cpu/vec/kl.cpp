// Vector loops of kl_penalty: see csrc/kl.h for the formulas.
#include "cpu/vec/kl.h"

#include "cpu/vec/vec.h"

namespace fastppo::CPU_CAPABILITY {

void kl_block(const KlArgs& args, int64_t row, int64_t begin, int64_t n, float* out) {
  Block logprobs, ref_logprobs;
  load(args.logprobs, row, begin, n, logprobs);
  load(args.ref_logprobs, row, begin, n, ref_logprobs);
  with_estimator(args.estimator, [&](auto estimator) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec kl = kl_estimate<decltype(estimator)::value>(logprobs.get(i) - ref_logprobs.get(i));
      kl.store(out + i, lanes_left(n, i));
    }
  });
}

void kl_backward_block(const KlArgs& args, int64_t row, int64_t begin, int64_t n, float* out) {
  Block logprobs, ref_logprobs, grad;
  load(args.logprobs, row, begin, n, logprobs);
  load(args.ref_logprobs, row, begin, n, ref_logprobs);
  load(args.grad, row, begin, n, grad);
  with_estimator(args.estimator, [&](auto estimator) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec slope = kl_slope<decltype(estimator)::value>(logprobs.get(i) - ref_logprobs.get(i));
      (grad.get(i) * slope).store(out + i, lanes_left(n, i));
    }
  });
}

} // namespace fastppo::CPU_CAPABILITY
