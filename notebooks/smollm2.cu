// SPDX-License-Identifier: Apache-2.0
// The operations of a step, in float32. Arrays are contiguous unless a stride is given.

constexpr int kRows = 16;      // of x, in a block of `product`
constexpr int kOutputs = 4;    // of the matrix, in a block of `product`
constexpr int kThreads = 192;  // of `product`
constexpr int kHeadSize = 64;
constexpr int kLanes = kHeadSize / 4;  // that hold a head, four elements each
constexpr int kGroups = 16;            // of so many lanes, in a block of `attention`

__device__ inline float dot(float4 a, float4 b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// Adds up 64 sums over the lanes of a warp, and leaves two of them in each lane: lane i has those
// of 2 * i and 2 * i + 1. In each step a lane keeps half of its sums, and gives the others to its
// partner, which keeps those.
template <int kHalf>
__device__ inline void fold(float* sums) {
  const bool upper = threadIdx.x & kHalf / 2;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float kept = upper ? sums[i + kHalf] : sums[i];
    const float given = upper ? sums[i] : sums[i + kHalf];
    sums[i] = kept + __shfl_xor_sync(~0u, given, kHalf / 2);
  }
  if constexpr (kHalf > 2) fold<kHalf / 2>(sums);
}

// out[row] = x[row] / sqrt(mean(x[row]^2) + epsilon) * weight, for each row, which has a warp.
extern "C" __global__ void rms_norm(float4* out, const float4* x, const float4* weight, int length,
                                    float epsilon) {
  const int vectors = length / 4;
  x += blockIdx.x * vectors;
  out += blockIdx.x * vectors;
  float sum = 0;
  for (int i = threadIdx.x; i < vectors; i += 32) sum += dot(x[i], x[i]);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const float scale = 1 / sqrtf(sum / length + epsilon);
  for (int i = threadIdx.x; i < vectors; i += 32) {
    const float4 a = x[i], w = weight[i];
    out[i] = {a.x * scale * w.x, a.y * scale * w.y, a.z * scale * w.z, a.w * scale * w.w};
  }
}

// out[row, output] = sum of x[row, i] * matrix[output, i] over i, plus plus[row, output] if there
// is one. The numbers of outputs and of i must be multiples of 4.
extern "C" __global__ void __launch_bounds__(kThreads)
    product(float* out, const float4* x, const float4* matrix, const float* plus, int rows,
            int outputs, int length) {
  // Threads share the length, so that even a small matrix is read by many of them at once.
  constexpr int kSums = kRows * kOutputs;
  const int vectors = length / 4;
  const int first_output = blockIdx.x * kOutputs, first_row = blockIdx.y * kRows;
  float sums[kSums] = {};
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    float4 weights[kOutputs];
#pragma unroll
    for (int output = 0; output < kOutputs; ++output) {
      weights[output] = matrix[(long long)(first_output + output) * vectors + i];
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float4 a = x[min(first_row + row, rows - 1) * vectors + i];
#pragma unroll
      for (int output = 0; output < kOutputs; ++output) {
        sums[row * kOutputs + output] += dot(a, weights[output]);
      }
    }
  }
  fold<kSums / 2>(sums);
  const int lane = threadIdx.x % 32;
  __shared__ float of_warps[kThreads / 32][kSums];
  of_warps[threadIdx.x / 32][lane * 2] = sums[0];
  of_warps[threadIdx.x / 32][lane * 2 + 1] = sums[1];
  __syncthreads();
  const int row = first_row + threadIdx.x / kOutputs;
  if (threadIdx.x >= kSums || row >= rows) return;
  const int place = row * outputs + first_output + threadIdx.x % kOutputs;
  float total = plus ? plus[place] : 0;
  for (const auto& of_warp : of_warps) total += of_warp[threadIdx.x];
  out[place] = total;
}

// out = gate / (1 + exp(-gate)) * up, where a row of gate_up is one of gate, followed by one of up.
extern "C" __global__ void gated(float* out, const float* gate_up, int length) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (i >= length) return;
  const float gate = gate_up[row * 2 * length + i], up = gate_up[(row * 2 + 1) * length + i];
  out[row * length + i] = gate / (1 + expf(-gate)) * up;
}

// Let each row attend to the tokens of its block table, up to its own position. A block of threads
// has one head of one row. Groups of lanes take positions in turn, and read K and V where they are.
extern "C" __global__ void __launch_bounds__(kGroups* kLanes)
    attention(float* out, const float* q, const float* k, const float* v, const int* tables,
              const int* positions, int q_stride, int block_stride, int block_size, int kv_heads,
              int table_length) {
  const int head = blockIdx.x, heads = gridDim.x, row = blockIdx.y;
  const int kv_head = head / (heads / kv_heads);  // query heads of a group share a KV head
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const unsigned int mask = 0xffffu << threadIdx.x % 32 / kLanes * kLanes;
  q += (long long)row * q_stride + head * kHeadSize;
  tables += row * table_length;
  const float4 query = reinterpret_cast<const float4*>(q)[lane];
  // Of the positions so far: the highest score, and sums of exp(score - highest) and of that times
  // V. Where a score is higher, what was summed shrinks.
  float highest = -1e38f, sum = 0;
  float4 mixed = {0, 0, 0, 0};
  const int last = positions[row];
#pragma unroll 4
  for (int position = group; position <= last; position += kGroups) {
    const int offset = position % block_size * kv_heads + kv_head;
    const long long block = tables[position / block_size];
    const long long place = block * block_stride + offset * kHeadSize;
    const float4 key = reinterpret_cast<const float4*>(k + place)[lane];
    const float4 value = reinterpret_cast<const float4*>(v + place)[lane];
    float score = dot(query, key);
    for (int step = kLanes / 2; step; step /= 2) score += __shfl_xor_sync(mask, score, step);
    score /= 8;  // the root of the head size
    const float before = highest;
    highest = fmaxf(highest, score);
    const float shrink = expf(before - highest), weight = expf(score - highest);
    sum = sum * shrink + weight;
    mixed.x = mixed.x * shrink + weight * value.x;
    mixed.y = mixed.y * shrink + weight * value.y;
    mixed.z = mixed.z * shrink + weight * value.z;
    mixed.w = mixed.w * shrink + weight * value.w;
  }
  __shared__ float4 mixed_of[kGroups][kLanes];
  __shared__ float highest_of[kGroups], sum_of[kGroups];
  mixed_of[group][lane] = mixed;
  if (lane == 0) highest_of[group] = highest, sum_of[group] = sum;
  __syncthreads();
  if (threadIdx.x >= kHeadSize) return;
  for (int other = 0; other < kGroups; ++other) highest = fmaxf(highest, highest_of[other]);
  float total = 0, result = 0;
  for (int other = 0; other < kGroups; ++other) {
    const float scale = expf(highest_of[other] - highest);
    total += scale * sum_of[other];
    result += scale * reinterpret_cast<const float*>(mixed_of[other])[threadIdx.x];
  }
  out[(row * heads + head) * kHeadSize + threadIdx.x] = result / total;
}
