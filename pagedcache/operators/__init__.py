# SPDX-License-Identifier: Apache-2.0
"""Which operator? Each in a folder of its own, on what all operators share.

- `rules`: what the tensors of an operator must look like, as a table
- `arguments`: the arguments of one call, checked in full
- `careful`: calls that inspect their data, and wait for it
- `base`: `Operation`, from creation to destruction, for any operator
- `one_call`: operations that are found again by the signatures of their arrays

An operator's folder has its table of rules, its public functions, and an implementation for each
type of device that it runs on. Nothing above knows any of them.
"""
