# SPDX-License-Identifier: Apache-2.0
"""Writes and reads whose rows go through steps of the user's.

- `kernels`: `WriteKernel` and `ReadKernel`, what users hold
- `operation`: the operation for parameters of some kinds, which they keep
- `info`: its table of tensors, and what follows from them
- `cpu`, `nvidia`: the implementations
- `text`: the CUDA text around the steps, and which thread holds which elements
"""
