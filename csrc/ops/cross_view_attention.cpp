#include "cross_view_attention.h"

#include "../cpu/dispatch.h"
#include "../heads.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, cross_view_attention, const CrossViewAttentionArgs& args)
GAFEXT_CPU_KERNEL(void, cross_view_attention_backward, const CrossViewAttentionBackwardArgs& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def(
      "cross_view_attention(Tensor query, Tensor key, Tensor value, SymInt num_views, *, float? scale=None) "
      "-> Tensor");
  m.def(
      "cross_view_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, SymInt num_views, *, "
      "float? scale=None) -> (Tensor, Tensor, Tensor)");
}

CrossViewAttentionArgs check_cross_view_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  int64_t num_views, std::optional<double> scale,
                                                  const char* op = "cross_view_attention") {
  const Named q{"query", query}, k{"key", key}, v{"value", value};
  check_heads_shape(op, q);
  check_equal_shape(op, q, k);
  check_equal_shape(op, q, v);
  require(num_views >= 1, op, ": num_views must be at least 1, got ", num_views);
  require(query.size(0) % num_views == 0, op, ": the batch of query must be a multiple of num_views = ", num_views,
          ", got ", shape_of(query));
  check_same_kind(op, q, k);
  check_same_kind(op, q, v);

  CrossViewAttentionArgs args{};
  args.dtype = check_supported_heads(op, q, k, v, kMaxHeadDim);
  require(num_views <= kMaxViews, op, ": num_views must be in 1..", kMaxViews, ", got ", num_views);
  set_inputs(args, query, key, value, scale);
  args.batch = query.size(0) / num_views, args.views = num_views, args.length = query.size(2);
  return args;
}

Tensor cross_view_attention_on_cpu(const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_views,
                                   std::optional<double> scale) {
  CrossViewAttentionArgs args = check_cross_view_attention(query, key, value, num_views, scale);
  const Tensor out = make_output(args, query);
  cpu::cross_view_attention(args);
  return out;
}

// Checks the inputs, and calls kernel(args).
template <typename Kernel>
std::tuple<Tensor, Tensor, Tensor> differentiate(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                 const Tensor& value, int64_t num_views, std::optional<double> scale,
                                                 const Kernel& kernel) {
  const char* op = "cross_view_attention_backward";
  const CrossViewAttentionArgs forward = check_cross_view_attention(query, key, value, num_views, scale, op);
  check_equal_shape(op, {"query", query}, {"grad", grad});
  check_same_kind(op, {"query", query}, {"grad", grad});
  const Tensor rows = grad.size(3) > 1 && grad.stride(3) != 1 ? torch::stable::contiguous(grad) : grad;
  CrossViewAttentionBackwardArgs args{};
  args.grad = rows.const_data_ptr(), args.query = forward.query, args.key = forward.key, args.value = forward.value;
  args.grad_stride = head_strides(rows), args.query_stride = forward.query_stride;
  args.key_stride = forward.key_stride, args.value_stride = forward.value_stride;
  args.batch = forward.batch, args.views = forward.views, args.heads = forward.heads, args.length = forward.length;
  args.head_dim = forward.head_dim, args.scale = forward.scale, args.dtype = forward.dtype;
  const Tensor grad_query = empty_heads(query), grad_key = empty_heads(query), grad_value = empty_heads(query);
  args.grad_query = grad_query.mutable_data_ptr(), args.grad_key = grad_key.mutable_data_ptr();
  args.grad_value = grad_value.mutable_data_ptr(), args.out_stride = head_strides(grad_query);
  kernel(args);
  return {grad_query, grad_key, grad_value};
}

std::tuple<Tensor, Tensor, Tensor> cross_view_attention_backward_on_cpu(const Tensor& grad, const Tensor& query,
                                                                        const Tensor& key, const Tensor& value,
                                                                        int64_t num_views,
                                                                        std::optional<double> scale) {
  return differentiate(grad, query, key, value, num_views, scale, cpu::cross_view_attention_backward);
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) {
  m.impl("cross_view_attention", TORCH_BOX(&cross_view_attention_on_cpu));
  m.impl("cross_view_attention_backward", TORCH_BOX(&cross_view_attention_backward_on_cpu));
}

#ifdef GAFEXT_WITH_CUDA

Tensor cross_view_attention_on_cuda(const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_views,
                                    std::optional<double> scale) {
  CrossViewAttentionArgs args = check_cross_view_attention(query, key, value, num_views, scale);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor out = make_output(args, query);
  check_launch(cross_view_attention_cuda(args, current_stream(query)), "cross_view_attention", "query", query);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> cross_view_attention_backward_on_cuda(const Tensor& grad, const Tensor& query,
                                                                         const Tensor& key, const Tensor& value,
                                                                         int64_t num_views,
                                                                         std::optional<double> scale) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  return differentiate(grad, query, key, value, num_views, scale, [&](const CrossViewAttentionBackwardArgs& args) {
    check_launch(cross_view_attention_backward_cuda(args, current_stream(query)), "cross_view_attention_backward",
                 "query", query);
  });
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CUDA, m) {
  m.impl("cross_view_attention", TORCH_BOX(&cross_view_attention_on_cuda));
  m.impl("cross_view_attention_backward", TORCH_BOX(&cross_view_attention_backward_on_cuda));
}

#endif

}  // namespace
}  // namespace gafext
