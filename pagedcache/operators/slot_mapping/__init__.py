# SPDX-License-Identifier: Apache-2.0
"""The slot mapping operator: from the position of each token in its request to its slot.

- `info`: the tables of its tensors, padded block tables, and FlashInfer's that follow one another
- `descriptor`: `SlotMappingDescriptor`, checked once and run any number of times
- `one_call`: `slot_mapping`, one function, and `page_slots`
- `cpu`, `nvidia`: the implementations
"""
