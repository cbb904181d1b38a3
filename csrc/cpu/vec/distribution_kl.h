// The vector loops of distribution_kl, for csrc/cpu/distribution_kl.cpp. The formulas are in csrc/distribution_kl.h.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/distribution_kl.h"

// The sums over n logits of both rows.
FASTPPO_KERNEL(
    kl_sums, const void* logits, const void* ref_logits, DType dtype, int64_t n, double inv_temperature, KlSums& out);

// The gradients of n logits of both rows, of their type; a null pointer is a gradient nobody asked for.
FASTPPO_KERNEL(
    kl_grad, const KlGrad& row, const void* logits, const void* ref_logits, DType dtype, int64_t n, void* dlogits,
    void* dref_logits);
