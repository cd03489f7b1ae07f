// SPDX-License-Identifier: Apache-2.0
//
// Where the rows of a paged cache are: one token of one KV head each. Shared by all kernels on
// them.

#pragma once

namespace pagedcache {

// Strides are in bytes.
struct TokenRows {
  long long token_stride;
  long long head_stride;
};

struct CacheRows {
  long long slot_stride;
  long long block_step;  // block stride - block size * slot stride: what blocks add to slots
  long long head_stride;
};

constexpr unsigned int kLine = 128;  // bytes of one prefetch

// The most threads in a block that the host asks for.
constexpr int kMostThreads = 512;

}  // namespace pagedcache
