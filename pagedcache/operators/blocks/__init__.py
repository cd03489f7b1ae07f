# SPDX-License-Identifier: Apache-2.0
"""Operators on whole blocks: copy them within a cache or between caches, and fill them with zeros.

- `arrays`: lists of arrays, checked once: what a block is made of
- `pairs`: which block goes where: reading, checking, and an order in which it can be done
- `descriptor`: `BlockDescriptor`, checked once and run any number of times
- `one_call`: `copy_blocks` and `zero_blocks`
- `cpu`, `nvidia`: the implementations; `transfers`: between a GPU and pinned host memory
"""
