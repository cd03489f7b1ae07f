# SPDX-License-Identifier: Apache-2.0
"""The paged caching operator: write the K and V of each token to its slot.

- `info`: the table of its five tensors, and the sizes and strides that follow
- `descriptor`: `Descriptor`, checked once and run any number of times
- `one_call`: `paged_caching`, one function
- `inspect`: what debug mode looks for
- `explain`: where a slot is, in words
- `warmup`: compiling ahead of time
- `cpu`, `nvidia`: the implementations
"""
