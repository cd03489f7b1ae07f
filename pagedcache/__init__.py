# SPDX-License-Identifier: Apache-2.0
"""pagedcache: the paged KV-cache write, compiled on first use, on arrays of any library.

In dependency order, each importing only what stands above it:

- `status`, `dtypes`, `tensors`, `rules`: errors, data types, what a tensor is and must be
- `locks`, `environment`, `display`: small helpers
- `arrays`: which array library?
- `backend`: which device?
- `expressions`: what a user says of an element
- `cache`: what a paged cache is
- `steps`: what can happen to a row: named steps and expressions, in NumPy and as CUDA text
- `pool`: which block holds which tokens? Touches no array
- `operators`: which operator? `base` and its neighbours are for any; `paged_caching` is the write,
  `paged_gather` reads back, `programs` do either with steps of the user's; `slot_mapping` says
  where tokens go, and `blocks` are copied whole
- `host_blocks`, `kv_cache`: arrays of all layers, with a pool, and host memory for its blocks
- `infiniop`: the same operator as the C functions of InfiniCore
- `compat`: the same as the Python functions of vLLM, SGLang and FlashInfer
- `torch`: the same as an operator for ``torch.compile``; imported only by name
- `demo`, `bench`, `__main__`: the command line
- `plot`: pictures, for which matplotlib is needed; imported only by name

The kernels are CUDA source in ``cuda_src``. Importing this package imports neither CuPy nor CUDA.
"""

from pagedcache import infiniop, status
from pagedcache.backend.handle import Handle
from pagedcache.backend.protocol import LaunchConfig
from pagedcache.backend.registry import BackendReport, backends, register_backend
from pagedcache.cache.explain import SlotExplanation
from pagedcache.expressions import ExpressionError
from pagedcache.kv_cache import BlockTables, CacheLayer, KVCache, Offloaded
from pagedcache.operators.blocks.descriptor import BlockDescriptor
from pagedcache.operators.blocks.one_call import copy_blocks, zero_blocks
from pagedcache.operators.paged_caching.descriptor import Descriptor
from pagedcache.operators.paged_caching.info import PagedCachingInfo
from pagedcache.operators.paged_caching.one_call import paged_caching
from pagedcache.operators.paged_caching.warmup import WarmedUp, warmup
from pagedcache.operators.paged_gather.descriptor import GatherDescriptor
from pagedcache.operators.paged_gather.info import PagedGatherInfo
from pagedcache.operators.paged_gather.one_call import paged_gather
from pagedcache.operators.programs.kernels import ReadKernel, WriteKernel
from pagedcache.operators.slot_mapping.descriptor import SlotMappingDescriptor
from pagedcache.operators.slot_mapping.one_call import slot_mapping
from pagedcache.pool import BlockPool, EventLog, PoolStatistics, Sequence
from pagedcache.status import (
    CacheOverlapError,
    DuplicateBlockError,
    DuplicateSlotError,
    FreedError,
    InvalidBlockError,
    InvalidIndexError,
    InvalidPositionError,
    InvalidSlotError,
    NonFiniteError,
    PagedCacheError,
    PoolExhaustedError,
    RequiresGradError,
    SourceOverlapError,
    Status,
)
from pagedcache.steps import Step, cast, cuda, hadamard, quantize, rms_norm, rope
from pagedcache.tensors import TensorDescriptor

__version__ = "0.2.0"

__all__ = [
    "BackendReport",
    "BlockDescriptor",
    "BlockPool",
    "BlockTables",
    "CacheLayer",
    "CacheOverlapError",
    "Descriptor",
    "DuplicateBlockError",
    "DuplicateSlotError",
    "EventLog",
    "ExpressionError",
    "FreedError",
    "GatherDescriptor",
    "Handle",
    "InvalidBlockError",
    "InvalidIndexError",
    "InvalidPositionError",
    "InvalidSlotError",
    "KVCache",
    "LaunchConfig",
    "NonFiniteError",
    "Offloaded",
    "PagedCacheError",
    "PagedCachingInfo",
    "PagedGatherInfo",
    "PoolExhaustedError",
    "PoolStatistics",
    "ReadKernel",
    "RequiresGradError",
    "Sequence",
    "SlotExplanation",
    "SlotMappingDescriptor",
    "SourceOverlapError",
    "Status",
    "Step",
    "TensorDescriptor",
    "WarmedUp",
    "WriteKernel",
    "backends",
    "cast",
    "copy_blocks",
    "cuda",
    "hadamard",
    "infiniop",
    "paged_caching",
    "paged_gather",
    "quantize",
    "register_backend",
    "rms_norm",
    "rope",
    "slot_mapping",
    "status",
    "warmup",
    "zero_blocks",
]
