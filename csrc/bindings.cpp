// Where PyTorch and the kernels meet: the operations' schemas, their registration for CPU and CUDA, and the Python
// module, which carries build_info() and malloc's settings.
//
// LibTorch's stable ABI alone (torch/csrc/stable, torch/headeronly), so that one module runs on every torch >= 2.11,
// with or without CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/runtime.h"
#include "ops.h"

namespace gafext {
namespace {

// Uninitialised, like `like`, of the first `dims` sizes and strides; torch::stable::new_empty takes no strides.
Tensor empty_strided(const Tensor& like, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& strides,
                     int64_t dims = 4) {
  int32_t dtype, device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// (batch, heads, length, head_dim) in the memory of (batch, length, heads, head_dim), so that the caller's transpose
// and reshape to (batch, length, heads * head_dim) are free.
Tensor empty_heads(const Tensor& query) {
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), dim = query.size(3);
  const int64_t row =
      std::max<int64_t>(heads, 1) * std::max<int64_t>(dim, 1);  // as torch.empty counts empty dimensions
  return empty_strided(query, {batch, heads, length, dim},
                       {std::max<int64_t>(length, 1) * row, std::max<int64_t>(dim, 1), row, 1});
}

// The shape of a projection: that of x, with `features` for its last dimension.
std::vector<int64_t> projected_sizes(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(features);
  return sizes;
}

// From row to row, when the tensor is seen as (rows, columns) with contiguous columns; none if that takes a copy.
std::optional<int64_t> row_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t expected = 0;  // of the next dimension outwards
  for (int64_t i = last - 1; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (stride && tensor.stride(i) != expected) return std::nullopt;
    if (!stride) stride = tensor.stride(i);
    expected = tensor.stride(i) * tensor.size(i);
  }
  return stride.value_or(tensor.size(last));
}

Tensor flash_attention_on_cpu(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<double> scale,
                              bool is_causal) {
  FlashAttentionArgs args = check_flash_attention(query, key, value, scale, is_causal);
  Tensor out = empty_heads(query);
  args.out = out.mutable_data_ptr();
  args.out_stride = head_strides(out);
  flash_attention_cpu(args);
  return out;
}

Tensor cross_view_attention_on_cpu(const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_views,
                                   std::optional<double> scale) {
  CrossViewAttentionArgs args = check_cross_view_attention(query, key, value, num_views, scale);
  Tensor out = empty_heads(query);
  args.out = out.mutable_data_ptr();
  args.out_stride = head_strides(out);
  cross_view_attention_cpu(args);
  return out;
}

// aten::linear, through the dispatcher.
Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// The gate's arguments; `projected` is that or a contiguous copy of it.
GegluGateArgs gate_arguments(Tensor& projected, Tensor& out) {
  GegluGateArgs args = check_geglu_gate(projected);
  if (!row_stride(projected)) projected = torch::stable::contiguous(projected);
  out = torch::stable::new_empty(projected, projected_sizes(projected, args.inner));
  args.projected = projected.const_data_ptr();
  args.projected_stride = *row_stride(projected);
  args.out = out.mutable_data_ptr();
  return args;
}

Tensor geglu_gate_on_cpu(Tensor projected) {
  Tensor out;
  geglu_gate_cpu(gate_arguments(projected, out));
  return out;
}

Tensor geglu_on_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  GegluArgs args = check_geglu(x, weight, bias);
  // A few rows are as fast with the kernel, which rounds once instead of twice.
  const bool matrix_units = args.dtype == DType::kBFloat16 && multiplies_bfloat16();
  if (matrix_units && args.rows >= 16 && args.in_features >= 64) return geglu_gate_on_cpu(aten_linear(x, weight, bias));
  const Tensor rows = row_stride(x) ? x : torch::stable::contiguous(x);
  const Tensor columns = row_stride(weight) ? weight : torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor out = torch::stable::new_empty(x, projected_sizes(x, args.inner));
  args.x = rows.const_data_ptr();
  args.weight = columns.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.x_stride = *row_stride(rows);
  args.weight_stride = *row_stride(columns);
  geglu_cpu(args);
  return out;
}

Tensor linear_on_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  LinearArgs args = check_linear(x, weight, bias);
  const Tensor rows = row_stride(x) ? x : torch::stable::contiguous(x);
  const Tensor columns = row_stride(weight) ? weight : torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor out = torch::stable::new_empty(x, projected_sizes(x, args.out_features));
  const auto floats = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  args.x = floats(rows);
  args.weight = floats(columns);
  args.bias = bias ? floats(*bias) : nullptr;
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.x_stride = *row_stride(rows);
  args.weight_stride = *row_stride(columns);
  return linear_cpu(args) ? out : aten_linear(x, weight, bias);
}

Tensor conv3x3_on_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  Conv3x3Args args = check_conv3x3(x, weight, bias);
  const Tensor taps = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  const int64_t channels = args.out_channels, row = channels * args.width;
  Tensor out = empty_strided(x, {args.batch, channels, args.height, args.width}, {row * args.height, 1, row, channels});
  args.weight = static_cast<const float*>(taps.const_data_ptr());
  args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  args.out = static_cast<float*>(out.mutable_data_ptr());
  conv3x3_cpu(args);
  return out;
}

// (batch, channels, length) or (batch, channels, height, width) like x, channels-last.
Tensor empty_channels_last(const Tensor& x) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.dim() == 4 ? x.size(3) : 1;
  const auto step = [](int64_t size) { return std::max<int64_t>(size, 1); };  // as torch.empty counts empty dimensions
  const int64_t row = step(width) * step(channels);
  return empty_strided(x, {x.size(0), channels, height, width}, {step(height) * row, 1, row, step(channels)}, x.dim());
}

// aten::group_norm and aten::silu_, through the dispatcher.
Tensor group_norm_silu_on_cpu(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                              std::optional<Tensor> bias, double eps, bool silu) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  check_group_norm_silu(x, num_groups, weight, bias, eps, silu);
  std::array<StableIValue, 6> norm{from(x), from(num_groups), from(weight), from(bias), from(eps), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::group_norm", "", norm.data(), TORCH_ABI_VERSION));
  Tensor normalized = to<Tensor>(norm[0]);
  if (silu) {
    std::array<StableIValue, 1> stack{from(normalized)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::silu_", "", stack.data(), TORCH_ABI_VERSION));
    normalized = to<Tensor>(stack[0]);
  }
  Tensor out = empty_channels_last(x);
  torch::stable::copy_(out, normalized);
  return out;
}

#ifdef GAFEXT_WITH_CUDA

// In libtorch_cuda; weak, so that the module also loads beside a torch without CUDA, where nothing calls it.
// (torch::stable::accelerator::Stream gives the native stream from 2.13 on only.)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

cudaStream_t current_stream(const Tensor& tensor) {
  require(&aoti_torch_get_current_cuda_stream != nullptr, "gafext: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op, const char* name, const Tensor& tensor) {
  require(error == cudaSuccess, op, ": the CUDA kernel failed to launch: ", cudaGetErrorString(error), " (", name, " ",
          shape_of(tensor), " ", dtype_name(tensor), ")");
}

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
  Tensor out = empty_heads(query);
  args.out = out.mutable_data_ptr();
  args.out_stride = head_strides(out);
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

Tensor cross_view_attention_on_cuda(const Tensor& query, const Tensor& key, const Tensor& value, int64_t num_views,
                                    std::optional<double> scale) {
  CrossViewAttentionArgs args = check_cross_view_attention(query, key, value, num_views, scale);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor out = empty_heads(query);
  args.out = out.mutable_data_ptr();
  args.out_stride = head_strides(out);
  check_launch(cross_view_attention_cuda(args, current_stream(query)), "cross_view_attention", "query", query);
  return out;
}

Tensor geglu_gate_on_cuda(Tensor projected) {
  const torch::stable::accelerator::DeviceGuard guard(projected.get_device_index());
  Tensor out;
  const GegluGateArgs args = gate_arguments(projected, out);
  check_launch(geglu_gate_cuda(args, current_stream(projected)), "geglu_gate", "projected", projected);
  return out;
}

Tensor geglu_on_cuda(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  check_geglu(x, weight, bias);
  return geglu_gate_on_cuda(aten_linear(x, weight, bias));
}

Tensor group_norm_silu_on_cuda(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                               std::optional<Tensor> bias, double eps, bool silu) {
  GroupNormSiluArgs args = check_group_norm_silu(x, num_groups, weight, bias, eps, silu);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (weight) weight = torch::stable::contiguous(*weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor out = empty_channels_last(x);
  args.x = x.const_data_ptr();
  args.weight = weight ? weight->const_data_ptr() : nullptr;
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  const int64_t elements = (group_norm_silu_scratch(args) + 1) / 2;  // of 2 bytes at least
  const Tensor scratch = torch::stable::new_empty(x, {elements});
  args.scratch = scratch.mutable_data_ptr();
  check_launch(group_norm_silu_cuda(args, current_stream(x)), "group_norm_silu", "x", x);
  return out;
}

#endif  // GAFEXT_WITH_CUDA

// "a,b" -> ["a", "b"], "" -> []
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

pybind11::dict build_info() {
  using namespace pybind11::literals;
#ifdef GAFEXT_WITH_CUDA
  const pybind11::object cuda_compiler = pybind11::str("nvcc " GAFEXT_CUDA_COMPILER);
  constexpr bool cuda = true;
#else
  const pybind11::object cuda_compiler = pybind11::none();
  constexpr bool cuda = false;
#endif
#ifdef _OPENMP
  constexpr bool openmp = true;
#else
  constexpr bool openmp = false;
#endif
  return pybind11::dict(
      "version"_a = GAFEXT_VERSION, "torch"_a = TORCH_VERSION, "compiler"_a = GAFEXT_CXX_COMPILER, "openmp"_a = openmp,
      "instruction_sets"_a = split(GAFEXT_INSTRUCTION_SETS), "instruction_set"_a = name_of(instruction_set()),
      "multiplies_bfloat16"_a = multiplies_bfloat16(), "cuda"_a = cuda, "cuda_compiler"_a = cuda_compiler,
      "cuda_architectures"_a = split(cuda ? GAFEXT_CUDA_ARCHITECTURES : ""));
}

}  // namespace

STABLE_TORCH_LIBRARY(gafext, m) {
  m.def(
      "flash_attention(Tensor query, Tensor key, Tensor value, *, float? scale=None, bool is_causal=False) "
      "-> Tensor");
  m.def(
      "cross_view_attention(Tensor query, Tensor key, Tensor value, int num_views, *, float? scale=None) "
      "-> Tensor");
  m.def("geglu(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("geglu_gate(Tensor projected) -> Tensor");
  m.def(
      "group_norm_silu(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
      "bool silu=True) -> Tensor");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) {
  m.impl("flash_attention", TORCH_BOX(&flash_attention_on_cpu));
  m.impl("cross_view_attention", TORCH_BOX(&cross_view_attention_on_cpu));
  m.impl("geglu", TORCH_BOX(&geglu_on_cpu));
  m.impl("linear", TORCH_BOX(&linear_on_cpu));
  m.impl("geglu_gate", TORCH_BOX(&geglu_gate_on_cpu));
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_on_cpu));
  m.impl("conv3x3", TORCH_BOX(&conv3x3_on_cpu));
}

#ifdef GAFEXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gafext, CUDA, m) {
  m.impl("flash_attention", TORCH_BOX(&flash_attention_on_cuda));
  m.impl("cross_view_attention", TORCH_BOX(&cross_view_attention_on_cuda));
  m.impl("geglu", TORCH_BOX(&geglu_on_cuda));
  m.impl("geglu_gate", TORCH_BOX(&geglu_gate_on_cuda));
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_on_cuda));
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "gafext's compiled kernels. Importing it registers torch.ops.gafext.*";
  m.def("keep_freed_memory", &keep_freed_memory, "malloc keeps what is freed, until release_freed_memory().");
  m.def("release_freed_memory", &release_freed_memory, "What malloc has kept goes back to the system.");
  m.def("build_info", &build_info, "How this module was built, and the instruction set that its CPU kernels use.");
}

}  // namespace gafext
