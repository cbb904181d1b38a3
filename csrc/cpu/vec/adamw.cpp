/*
Loop of adamw_step_: see csrc/adamw.h for the formula. 18 bytes move per weight (bfloat16 grad and moments), against 60
and more when a float32 master, its bfloat16 copy and float32 moments are stepped one tensor operation at a time.
The loops are plain C++ without branches: the compiler puts them into vector registers by itself.
*/
#include "cpu/vec/adamw.h"

#include "cpu/vec/vec.h"

namespace fastppo::CPU_CAPABILITY {

// A moment back to where it lies; the noise of element i is its hash, shifted right by `shift`.
static void store_moment(
    const Block& moment, void* out, DType dtype, int64_t begin, int64_t n, uint32_t step, int shift) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(out) + begin, moment.data, n * sizeof(float));
    return;
  }
  uint16_t* __restrict bits = static_cast<uint16_t*>(out) + begin;
  const auto first = static_cast<uint32_t>(begin);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t noise = (rounding_bits(step, first + static_cast<uint32_t>(i)) >> shift) & 0xffffu;
    bits[i] = round_by_chance(moment.data[i], noise);
  }
}

void adamw_block(const AdamwArgs& args, int64_t begin, int64_t n) {
  Block grad, exp_avg, exp_avg_sq;
  load(args.grad, 0, begin, n, grad);
  load(Rows{args.exp_avg, 0, args.exp_avg_dtype}, 0, begin, n, exp_avg);
  load(Rows{args.exp_avg_sq, 0, args.exp_avg_sq_dtype}, 0, begin, n, exp_avg_sq);
  uint16_t* __restrict param = args.param + begin;
  int16_t* __restrict residual = args.residual + begin;
  const AdamwSettings settings = args.settings;
  for (int64_t i = 0; i < n; ++i) {
    const float master = join_master(param[i], residual[i]);
    split_master(
        adamw_update(master, grad.data[i], exp_avg.data[i], exp_avg_sq.data[i], settings), param[i], residual[i]);
  }
  store_moment(exp_avg, args.exp_avg, args.exp_avg_dtype, begin, n, settings.step, 0);
  store_moment(exp_avg_sq, args.exp_avg_sq, args.exp_avg_sq_dtype, begin, n, settings.step, 16);
}

} // namespace fastppo::CPU_CAPABILITY
