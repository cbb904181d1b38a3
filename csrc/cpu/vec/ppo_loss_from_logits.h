// The vector loop that is ppo_loss_from_logits' own; its rows go through those of cpu/vec/logprobs.h.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"

// x *= factor over n elements.
FASTPPO_KERNEL(scale_elements, void* x, DType dtype, int64_t n, float factor);
