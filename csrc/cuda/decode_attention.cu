// decode_attention on CUDA: checks, one launch, registration.
#include "cuda/decode_attention.cuh"

#include "csrc/decode_attention.h"
#include "cuda/tensor.h"

namespace fastppo::cuda {
namespace {

template <class T>
Span<const T> whole(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.numel()};
}

// From the first to the last element that the strides reach.
template <class T>
DecodeCache<T> cache_of(const Tensor& x) {
  int64_t extent = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    extent += (x.size(i) - 1) * x.stride(i);
  }
  return {{static_cast<T*>(x.mutable_data_ptr()), x.numel() == 0 ? 0 : extent}, x.stride(0), x.stride(1), x.stride(2)};
}

Tensor decode_attention_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& slots, const Tensor& lengths, double scale, std::optional<int64_t> window) {
  check_decode_attention(query, key, value, key_cache, value_cache, slots, lengths, scale, window);
  const int64_t width = query.size(2);
  if (width > kDecodeWidth) {
    fail("decode_attention", "query must have at most ", kDecodeWidth, " columns per head on CUDA, got ", width);
  }
  const Tensor out = torch::stable::new_empty(query, query.sizes());
  if (out.numel() == 0) {
    return out;
  }
  const OnDevice on(query);
  const Tensor held[] = {
      torch::stable::contiguous(query), torch::stable::contiguous(key), torch::stable::contiguous(value),
      torch::stable::contiguous(slots), torch::stable::contiguous(lengths)};
  with_element(query.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    const DecodeAttentionArgs<T> args{
        whole<T>(held[0]),
        whole<T>(held[1]),
        whole<T>(held[2]),
        cache_of<T>(key_cache),
        cache_of<T>(value_cache),
        whole<int64_t>(held[3]),
        whole<int64_t>(held[4]),
        elements<T>(out),
        query.size(0),
        key.size(1),
        query.size(1) / key.size(1),
        width,
        key_cache.size(0),
        key_cache.size(2),
        window.value_or(0),
        static_cast<float>(scale)};
    const auto blocks = static_cast<unsigned>(args.rows * args.heads * args.chunks());
    const int64_t shared = decode_attention_shared(args) * static_cast<int64_t>(sizeof(float));
    FASTPPO_LAUNCH((decode_attention_kernel<T>), blocks, kDecodeThreads, shared, on.stream, args);
  });
  return out;
}

} // namespace

FASTPPO_CUDA_IMPL(m) { m.impl("decode_attention", TORCH_BOX(&decode_attention_cuda)); }

} // namespace fastppo::cuda
