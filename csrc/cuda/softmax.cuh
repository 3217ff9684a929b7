// The online softmax (arXiv 1805.02867, equation 3) of the attention kernels, in base 2: x = score * scale * log2(e), a
// weight is 2^(x - reference). Any reference cancels out in the end; the running maximum is one that cannot overflow.
//
// First what all kernels share, then the softmax of the kernels on mma.sync over their C fragments (device.cuh),
// [row tile of 16][column tile of 8][4]: lane 4 g + t holds rows g and g + 8 of a tile, so that a row lies in the four
// lanes of one g, a quad. So do wgmma's accumulators (hopper.cuh).
#pragma once

#include "common.cuh"

namespace gafext::cuda {

// A reference for rows whose scores are all -inf: weights are 2^(-inf - 0) = 0, where -inf - -inf would be NaN.
__device__ inline float finite_reference(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }
// The reference before the first score where it only moves up (move_references): finite for the same reason.
constexpr float kNoReference = -3.402823466e38f;

// score * scale - reference is one FMA, which does not round the product as the reference was rounded: an error of
// 2^-24 |reference| in the exponent. Beyond this reference the product is rounded first, and equal scores cancel out
// exactly. The kernels on mma.sync had this limit and keep their bits; that on wgmma had 2^24, an error of up to 1.
constexpr float kHugeReference = 4096.0f;

// |scale| log2(e), for scores that negate has given the sign. Never 0, whose product with a masked score is NaN.
__host__ __device__ inline float base_2_scale(float scale) {
  const float positive = fabsf(scale) * kLog2E;
  return positive < 1.17549435e-38f ? 1.17549435e-38f : positive;
}

// What sums and outputs under the old reference are multiplied by under the new one.
__device__ inline float rescale_factor(float old_reference, float new_reference) {
  return exp2_approximate(old_reference - new_reference);
}

// 1 / sum of the weights; 0, and so an output of zeros, where there was no key or every score was -inf.
__device__ inline float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }
__device__ inline float inverse_sum_approximate(float sum) { return sum == 0.0f ? 0.0f : reciprocal_approximate(sum); }

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// A row's reference moves, and what the row has accumulated is rescaled, only when the maximum exceeds it by more than
// kSlack: weights then reach 2^8, far below the 65504 of float16, and after the first tile a warp almost never has to
// rescale its outputs.
constexpr float kSlack = 8.0f;

template <int kRowTiles>
struct Softmax {
  float reference[kRowTiles][2], sum[kRowTiles][2];  // of rows g and g + 8; the sum over this lane's columns alone
  bool huge;                                         // whether any reference of the warp is

  __device__ Softmax() : huge(false) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) reference[i / 2][i % 2] = kNoReference, sum[i / 2][i % 2] = 0.0f;
  }
};

template <int kRowTiles, int kTiles>
__device__ inline void negate(float (&score)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kTiles * 4; ++i) {
    float& x = score[i / (4 * kTiles)][i / 4 % kTiles][i % 4];
    x = -x;
  }
}

// Hides the keys from end_key on and, where is_causal, those that come after their row: -inf. The fragments' first row
// and first key have the indices `row` and `key`.
template <int kRowTiles, int kTiles>
__device__ inline void mask(float (&score)[kRowTiles][kTiles][4], int row, int key, int end_key, bool is_causal) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int m = i / 2, r = i % 2, row_end = row + 16 * m + 8 * r + lane / 4 + 1;
    const int limit = (is_causal ? min(end_key, row_end) : end_key) - key - lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (8 * n >= limit) score[m][n][2 * r] = -INFINITY;
      if (8 * n + 1 >= limit) score[m][n][2 * r + 1] = -INFINITY;
    }
  }
}

// The maximum of each row over the tiles, in the four lanes of the row.
template <int kRowTiles, int kTiles>
__device__ inline void row_maxima(const float (&score)[kRowTiles][kTiles][4], float (&maximum)[kRowTiles][2]) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int m = i / 2, r = i % 2;
    float x = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) x = fmaxf(x, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
    maximum[m][r] = quad_max(x);
  }
}

// Moves the references that the maxima of new scores ask for, with the sums and the outputs so far.
template <int kRowTiles, int kTiles>
__device__ inline void move_references(const float (&maximum)[kRowTiles][2], float scale, Softmax<kRowTiles>& softmax,
                                       float (&out)[kRowTiles][kTiles][4]) {
  bool moves = false;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    moves |= maximum[i / 2][i % 2] * scale - softmax.reference[i / 2][i % 2] > kSlack;
  }
  if (!__any_sync(kAllLanes, moves)) return;

  bool huge = false;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int m = i / 2, r = i % 2;
    const float old = softmax.reference[m][r], x = maximum[m][r] * scale;
    const bool moves_row = x - old > kSlack;
    const float factor = moves_row ? rescale_factor(old, x) : 1.0f;
    if (moves_row) softmax.reference[m][r] = x;
    huge |= fabsf(softmax.reference[m][r]) > kHugeReference;
    softmax.sum[m][r] *= factor;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) out[m][n][2 * r] *= factor, out[m][n][2 * r + 1] *= factor;
  }
  softmax.huge = __any_sync(kAllLanes, huge);
}

// Returns by what the scores are still to be multiplied: `scale`, or 1 where references are huge and it was done here.
template <int kRowTiles, int kTiles>
__device__ inline float remaining_scale(float (&score)[kRowTiles][kTiles][4], float scale, bool huge) {
  if (!huge) return scale;
#pragma unroll
  for (int i = 0; i < kRowTiles * kTiles * 4; ++i) score[i / (4 * kTiles)][i / 4 % kTiles][i % 4] *= scale;
  return 1.0f;
}

// The weights of 16 columns, n and n + 1 of the tiles, as the A fragment of the product with the values.
template <typename T, int kRowTiles, int kTiles>
__device__ inline void weigh(const float (&score)[kRowTiles][kTiles][4], int n, float scale,
                             Softmax<kRowTiles>& softmax, uint32_t (&weight)[kRowTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // as the A fragment has it: rows g and g + 8 of the first tile, then of the second
      const float reference = softmax.reference[m][i % 2];
      const float low = exp2_approximate(fmaf(score[m][n + i / 2][i % 2 * 2], scale, -reference));
      const float high = exp2_approximate(fmaf(score[m][n + i / 2][i % 2 * 2 + 1], scale, -reference));
      softmax.sum[m][i % 2] += low + high;
      weight[m][i] = pack_pair(low, high, T());
    }
  }
}

}  // namespace gafext::cuda
