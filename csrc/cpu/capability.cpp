#include "cpu/capability.h"

#include <cstdlib>

namespace fastppo {
namespace {

Capability best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kDefault;
#else
  return Capability::kDefault;
#endif
}

struct Choice {
  Capability capability = best();
  std::string error;

  Choice() {
    const char* asked = std::getenv("FASTPPO_CPU_CAPABILITY");
    if (asked == nullptr || *asked == '\0') {
      return;
    }
    for (const auto known : {Capability::kDefault, Capability::kAvx2, Capability::kAvx512}) {
      if (std::string(asked) != capability_name(known)) {
        continue;
      }
      if (known > capability) {
        error = std::string("FASTPPO_CPU_CAPABILITY: this processor runs at most ") + capability_name(capability) +
                ", got " + asked;
      } else {
        capability = known;
      }
      return;
    }
    error = std::string("FASTPPO_CPU_CAPABILITY must be default, avx2 or avx512, got ") + asked;
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

} // namespace

Capability active_capability() { return choice().capability; }

const std::string& capability_error() { return choice().error; }

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

} // namespace fastppo
