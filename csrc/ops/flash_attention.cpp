#include "flash_attention.h"

#include "../cpu/dispatch.h"
#include "../heads.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, flash_attention, const FlashAttentionArgs& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def(
      "flash_attention(Tensor query, Tensor key, Tensor value, *, float? scale=None, bool is_causal=False) "
      "-> Tensor");
}

int64_t max_head_dim(const Tensor& query) {
  const bool wide = !query.is_cuda() || (query.scalar_type() != ScalarType::Float && query.size(3) % 8 == 0);
  return wide ? kMaxWideHeadDim : kMaxHeadDim;
}

FlashAttentionArgs check_flash_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                         std::optional<double> scale, bool is_causal) {
  const char* op = "flash_attention";
  const Named q{"query", query}, k{"key", key}, v{"value", value};
  for (const Named* named : {&q, &k, &v}) check_heads_shape(op, *named);
  require(key.size(0) == query.size(0) && key.size(1) == query.size(1) && key.size(3) == query.size(3), op,
          ": key must have the batch, heads and head_dim of query, ", shape_of(query), ", got ", shape_of(key));
  check_equal_shape(op, k, v);
  check_same_kind(op, q, k);
  check_same_kind(op, q, v);

  FlashAttentionArgs args{};
  args.dtype = check_supported_heads(op, q, k, v, max_head_dim(query));
  set_inputs(args, query, key, value, scale);
  args.batch = query.size(0), args.query_length = query.size(2), args.key_length = key.size(2);
  args.is_causal = is_causal;
  return args;
}

Tensor flash_attention_on_cpu(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<double> scale,
                              bool is_causal) {
  FlashAttentionArgs args = check_flash_attention(query, key, value, scale, is_causal);
  const Tensor out = make_output(args, query);
  cpu::flash_attention(args);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) { m.impl("flash_attention", TORCH_BOX(&flash_attention_on_cpu)); }

#ifdef GAFEXT_WITH_CUDA

// For heads so wide that no kernel takes rows of any alignment.
void align_rows(Tensor& tensor) {
  if (!has_aligned_rows(tensor.const_data_ptr(), head_strides(tensor))) tensor = torch::stable::clone(tensor);
}

Tensor flash_attention_on_cuda(Tensor query, Tensor key, Tensor value, std::optional<double> scale, bool is_causal) {
  FlashAttentionArgs args = check_flash_attention(query, key, value, scale, is_causal);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  if (args.head_dim > kMaxHeadDim) {
    for (Tensor* tensor : {&query, &key, &value}) align_rows(*tensor);
    args = check_flash_attention(query, key, value, scale, is_causal);
  }
  const Tensor out = make_output(args, query);
  int64_t bytes = 0;
  check_launch(flash_attention_cuda_workspace(args, bytes), "flash_attention", "query", query);
  Tensor workspace;
  if (bytes > 0) {
    workspace = torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
    args.workspace = workspace.mutable_data_ptr();
  }
  check_launch(flash_attention_cuda(args, current_stream(query)), "flash_attention", "query", query);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CUDA, m) { m.impl("flash_attention", TORCH_BOX(&flash_attention_on_cuda)); }

#endif

}  // namespace
}  // namespace gafext
