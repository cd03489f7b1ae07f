// SPDX-License-Identifier: Apache-2.0
// The toy operator: a thread for each element.

#include "common.cuh"

namespace toy {

struct NegateCall {
  float* target;
  const float* source;
  long long rows;
  pagedcache::Report* report;
};

struct NegateParameters {
  NegateCall call;
  pagedcache::Divisor size;
  unsigned long long columns;
  long long unlucky;
  long long target_stride;
  long long source_stride;
};

__global__ void negate(const __grid_constant__ NegateParameters p) {
  pagedcache::letNextKernelStart();
  const unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned int row = p.size.divide(index);
  const unsigned int column = index - row * p.columns;
  pagedcache::waitForKernelAhead();
  if (row >= p.call.rows) return;
  if (row != p.unlucky) {
    p.call.target[row * p.target_stride + column] = -p.call.source[row * p.source_stride + column];
  } else if (column == 0) {
    pagedcache::report(p.call.report, row, row);
  }
}

}  // namespace toy
