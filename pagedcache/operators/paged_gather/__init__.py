# SPDX-License-Identifier: Apache-2.0
"""The paged gather operator: read the K and V of slots back, one row after the other.

- `info`: the table of its tensors, and the sizes and strides that follow
- `descriptor`: `GatherDescriptor`, checked once and run any number of times
- `one_call`: `paged_gather`, one function
- `cpu`, `nvidia`: the implementations
"""
