# SPDX-License-Identifier: Apache-2.0
"""The steps of a pipeline: what happens to a row between two memories.

Each is said once and done twice, in NumPy, which is the specification, and as CUDA text with
``cuda_src/steps.cuh``, with the same bits. A row is the elements of one token and head, held as
float32 from its load to its one rounding at the end.
"""

from __future__ import annotations

from pagedcache.steps.base import Around, RowShape, Step
from pagedcache.steps.element import cuda
from pagedcache.steps.named import cast, hadamard, rms_norm, rope
from pagedcache.steps.pipeline import Pipeline, ResolvedPipeline
from pagedcache.steps.quantizer import quantize

__all__ = [
    "Around",
    "Pipeline",
    "ResolvedPipeline",
    "RowShape",
    "Step",
    "cast",
    "cuda",
    "hadamard",
    "quantize",
    "rms_norm",
    "rope",
]
