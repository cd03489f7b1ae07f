# SPDX-License-Identifier: Apache-2.0
"""Which array library? The one place that knows how arrays are read, each library in a file.

Everything outside sees a `pagedcache.tensors.Tensor`, which is plain numbers. Nothing is copied,
and no library is imported to find out whether an array belongs to it: if an array exists, its
library has been imported.

- `library`: what is asked of a library, and `adopt`, which reads any array
- `numpy`, `cupy`, `torch`, `jax`: arrays that are known by their type
- `dlpack`, `interfaces`: arrays that are known by the protocol that they export
- `find`: from an array to its library
- `matching`: matchers, which compare arrays with some that have been checked
"""
