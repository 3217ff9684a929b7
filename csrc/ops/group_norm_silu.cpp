#include "group_norm_silu.h"

#include <utility>

#include "../cpu/dispatch.h"
#include "../tensors.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, group_norm_silu, const GroupNormSiluArgs& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def(
      "group_norm_silu(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
      "bool silu=True) -> Tensor");
}

GroupNormSiluArgs check_group_norm_silu(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, double eps, bool silu) {
  const char* op = "group_norm_silu";
  require(x.dim() == 3 || x.dim() == 4, op,
          ": x must have shape (batch, channels, length) or (batch, channels, height, width), got ", shape_of(x));
  const int64_t channels = x.size(1);
  require(num_groups >= 1 && channels % num_groups == 0, op, ": num_groups must divide the channels of x ", shape_of(x),
          ", got ", num_groups);
  for (const auto& [name, tensor] : {std::pair{"weight", &weight}, std::pair{"bias", &bias}}) {
    if (!*tensor) continue;
    require((*tensor)->dim() == 1 && (*tensor)->size(0) == channels, op, ": ", name, " must have shape (", channels,
            ",) to go with x ", shape_of(x), ", got ", shape_of(**tensor));
    check_same_kind(op, {"x", x}, {name, **tensor});
  }

  GroupNormSiluArgs args{};
  args.dtype = check_dtype(op, x);
  require(channels / num_groups <= kMaxGroupChannels, op, ": a group must have at most ", kMaxGroupChannels,
          " channels, got ", channels / num_groups);
  check_channels_last(op, {"x", x});
  const int64_t height = x.dim() == 4 ? x.size(2) : 1, width = x.size(x.dim() - 1);
  args.position_stride = width == 1 ? x.stride(2) : x.stride(x.dim() - 1);
  require(height == 1 || width == 1 || x.stride(2) == width * args.position_stride, op, ": x must have a stride of ",
          width * args.position_stride, " from row to row, got ", x.stride(2));
  args.batch = x.size(0), args.channels = channels, args.positions = height * width, args.groups = num_groups;
  args.image_stride = args.batch == 1 ? 0 : x.stride(0);  // of one image anything, which must not decide its alignment
  args.eps = static_cast<float>(eps);
  args.silu = silu;
  return args;
}

// (batch, channels, length) or (batch, channels, height, width) like x, channels-last.
Tensor empty_channels_last(const Tensor& x) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.dim() == 4 ? x.size(3) : 1;
  const int64_t column = at_least_one(channels), row = at_least_one(width) * column;
  return empty_strided(x, {x.size(0), channels, height, width}, {at_least_one(height) * row, 1, row, column}, x.dim());
}

// Calls kernel(args) with the tensors' memory.
template <typename Kernel>
Tensor normalize(GroupNormSiluArgs args, const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                 const Kernel& kernel) {
  if (weight) weight = torch::stable::contiguous(*weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor out = empty_channels_last(x);
  args.x = x.const_data_ptr();
  args.weight = weight ? weight->const_data_ptr() : nullptr;
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  kernel(args);
  return out;
}

Tensor group_norm_silu_on_cpu(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double eps, bool silu) {
  return normalize(check_group_norm_silu(x, num_groups, weight, bias, eps, silu), x, weight, bias,
                   cpu::group_norm_silu);
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_on_cpu)); }

#ifdef GAFEXT_WITH_CUDA

Tensor group_norm_silu_on_cuda(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, double eps, bool silu) {
  const GroupNormSiluArgs checked = check_group_norm_silu(x, num_groups, weight, bias, eps, silu);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return normalize(checked, x, weight, bias, [&](GroupNormSiluArgs args) {
    const int64_t elements = (group_norm_silu_scratch(args) + 1) / 2;  // of 2 bytes at least
    const Tensor scratch = torch::stable::new_empty(x, {elements});
    args.scratch = scratch.mutable_data_ptr();
    check_launch(group_norm_silu_cuda(args, current_stream(x)), "group_norm_silu", "x", x);
  });
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CUDA, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_on_cuda)); }

#endif

}  // namespace
}  // namespace gafext
