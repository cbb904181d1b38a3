/*
Loop of adamw_step_: see csrc/adamw.h for the formula. 22 bytes move per weight (bfloat16 grad and exp_avg), against 60
and more when a float32 master, its bfloat16 copy and float32 moments are stepped one tensor operation at a time.
The middle loop is plain C++ without branches: the compiler puts it into vector registers by itself.
*/
#include "cpu/vec/adamw.h"

#include "cpu/vec/vec.h"

namespace fastppo::CPU_CAPABILITY {

void adamw_block(const AdamwArgs& args, int64_t begin, int64_t n) {
  Block grad, exp_avg;
  const Rows exp_avg_rows{args.exp_avg, 0, args.exp_avg_dtype};
  load(args.grad, 0, begin, n, grad);
  load(exp_avg_rows, 0, begin, n, exp_avg);
  uint16_t* __restrict param = args.param + begin;
  int16_t* __restrict residual = args.residual + begin;
  float* __restrict exp_avg_sq = args.exp_avg_sq + begin;
  const AdamwSettings settings = args.settings;
  for (int64_t i = 0; i < n; ++i) {
    const float master = join_master(param[i], residual[i]);
    split_master(adamw_update(master, grad.data[i], exp_avg.data[i], exp_avg_sq[i], settings), param[i], residual[i]);
  }
  if (args.exp_avg_dtype == DType::kFloat32) {
    narrow(exp_avg.data, n, static_cast<float*>(args.exp_avg) + begin);
  } else {
    narrow(exp_avg.data, n, static_cast<c10::BFloat16*>(args.exp_avg) + begin);
  }
}

} // namespace fastppo::CPU_CAPABILITY
