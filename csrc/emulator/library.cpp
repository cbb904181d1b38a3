// The schemas of the emulated ops: those of the product, under a name of their own.
#include "schemas.h"

STABLE_TORCH_LIBRARY(fastppo_emulated, m) { fastppo::define_ops(m); }
