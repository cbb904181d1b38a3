#include "cpu/vec/ppo_loss_from_logits.h"

#include "cpu/vec/softmax.h"

namespace fastppo::CPU_CAPABILITY {

void scale_elements(void* x, DType dtype, int64_t n, float factor) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    T* elements = static_cast<T*>(x);
    const Vec factors(factor);
    map_steps(elements, elements, n, [&](const Step& v) { return Step{v.low * factors, v.high * factors}; });
  });
}

} // namespace fastppo::CPU_CAPABILITY
