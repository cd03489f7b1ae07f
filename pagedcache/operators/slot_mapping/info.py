# SPDX-License-Identifier: Apache-2.0
"""What slot mappings need to know about their tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pagedcache.cache.tables import SLOT_DTYPES
from pagedcache.rules import Rule, Rules

if TYPE_CHECKING:
    from pagedcache.dtypes import Dtype
    from pagedcache.tensors import TensorDescriptor

NAMES = ("block_tables", "query_start_loc", "positions", "out")
PAGE_NAMES = ("batch_indices", "positions", "kv_indices", "kv_indptr", "out")

RULES = Rules(
    tensors=(
        Rule("block_tables", ("num_requests", "max_blocks"), SLOT_DTYPES, loose=True, apart=True),
        Rule("query_start_loc", ("num_requests + 1",), SLOT_DTYPES, loose=True, apart=True),
        Rule("positions", ("num_tokens",), SLOT_DTYPES, loose=True, apart=True),
        Rule("out", ("length",), SLOT_DTYPES, written=True),
    ),
    free="length",
    counted_by="out",
)
PAGE_RULES = Rules(
    tensors=(
        Rule("batch_indices", ("num_tokens",), SLOT_DTYPES),
        Rule("positions", ("num_tokens",), SLOT_DTYPES),
        Rule("kv_indices", ("num_indices",), SLOT_DTYPES, loose=True),
        Rule("kv_indptr", ("num_sequences + 1",), SLOT_DTYPES, loose=True),
        Rule("out", ("num_tokens",), (SLOT_DTYPES[0],), written=True),
    ),
    free="num_tokens",
    counted_by="out",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMappingInfo:
    """Sizes and dtypes of a slot mapping.

    Attributes
    ----------
    dtypes : tuple of numpy.dtype
        Of the tensors, in their order.
    table_length, table_stride : int
        Entries of a block table, and from one to the next.
    rules : Rules
        The table that the tensors were checked against.
    """

    dtypes: tuple[Dtype, ...]
    table_length: int
    table_stride: int
    rules: Rules = field(default=RULES, repr=False, compare=False)

    @classmethod
    def create(cls, **described: TensorDescriptor) -> SlotMappingInfo:
        """Check tensor descriptors, by the names in `NAMES`, against each other.

        Raises
        ------
        PagedCacheError
            The message names the tensor, the rule and what was found.
        """
        sizes = RULES.check(described)
        tables = described["block_tables"]
        return cls(
            dtypes=tuple(described[name].dtype for name in NAMES),
            table_length=sizes["max_blocks"],
            table_stride=RULES.steps("block_tables", tables)[0],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSlotsInfo:
    """The dtypes of a slot mapping for tables that follow one another.

    Attributes
    ----------
    dtypes : tuple of numpy.dtype
        Of the tensors, in their order.
    rules : Rules
        The table that the tensors were checked against.
    """

    dtypes: tuple[Dtype, ...]
    rules: Rules = field(default=PAGE_RULES, repr=False, compare=False)

    @classmethod
    def create(cls, **described: TensorDescriptor) -> PageSlotsInfo:
        """Check tensor descriptors, by the names in `PAGE_NAMES`, against each other.

        Raises
        ------
        PagedCacheError
            The message names the tensor, the rule and what was found.
        """
        PAGE_RULES.check(described)
        return cls(dtypes=tuple(described[name].dtype for name in PAGE_NAMES))
