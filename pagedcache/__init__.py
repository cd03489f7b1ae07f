"""pagedcache: the paged KV-cache write, compiled on first use, on NumPy and CuPy arrays.

In dependency order, each importing only what stands above it:

- `status`, `dtypes`, `tensors`: error codes, data types, and what a tensor is
- `arrays`: how an object of any array library becomes an address
- `info`: every rule that the five tensors must obey, and the sizes and strides that follow
- `backend`: one folder for each type of device, found through its `registry`
- `interface`: what callers hold: handle and descriptor
- `infiniop`: the same operator behind InfiniCore's C functions
- `compat`: the same behind the Python functions of vLLM, SGLang and FlashInfer
- `torch`: the same as an operator for ``torch.compile``; imported only when asked for
- `demo`, `bench`, `__main__`: the command line
- `plot`: pictures; needs matplotlib, so it is imported by name only

The kernels are CUDA source in ``cuda_src``. Importing this package imports neither CuPy nor CUDA.
"""

from pagedcache import infiniop, status
from pagedcache.backend.protocol import LaunchConfig
from pagedcache.backend.registry import BackendReport, backends, register_backend
from pagedcache.info import PagedCachingInfo
from pagedcache.interface.descriptor import Descriptor
from pagedcache.interface.explain import SlotExplanation
from pagedcache.interface.handle import Handle
from pagedcache.interface.one_call import paged_caching
from pagedcache.interface.warmup import WarmedUp, warmup
from pagedcache.status import (
    CacheOverlapError,
    DuplicateSlotError,
    InvalidSlotError,
    NonFiniteError,
    PagedCacheError,
    SourceOverlapError,
    Status,
)
from pagedcache.tensors import TensorDescriptor

__version__ = "0.1.0"

__all__ = [
    "BackendReport",
    "CacheOverlapError",
    "Descriptor",
    "DuplicateSlotError",
    "Handle",
    "InvalidSlotError",
    "LaunchConfig",
    "NonFiniteError",
    "PagedCacheError",
    "PagedCachingInfo",
    "SlotExplanation",
    "SourceOverlapError",
    "Status",
    "TensorDescriptor",
    "WarmedUp",
    "backends",
    "infiniop",
    "paged_caching",
    "register_backend",
    "status",
    "warmup",
]
