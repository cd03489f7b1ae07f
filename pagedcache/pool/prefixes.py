# SPDX-License-Identifier: Apache-2.0
"""Which blocks can be found, and by what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from pagedcache.pool import hashes

# What is known about the content of a full block: its digest, its tokens as bytes, and the record
# of the block before it, or the key. Records are compared by identity, never by value: equal tokens
# after different ones are different contents, whatever their digests, and a chain may be long.
Record: TypeAlias = "tuple[bytes, bytes, Record | bytes]"
Link: TypeAlias = "Record | bytes"


class Prefixes:
    """The blocks that can be found by their tokens and all tokens before them.

    Each content is found in one block, the first that had it. Others with the same content are its
    twins: the next of them is found when the first is evicted.
    """

    def __init__(self, num_blocks: int, width: int) -> None:
        self.width = width  # bytes of the tokens of a block
        self.found: dict[bytes, int] = {}
        self.records: list[Record | None] = [None] * num_blocks  # of blocks that are found
        self.twins: dict[bytes, dict[int, None]] = {}  # in order, by digest
        self.twin_of: dict[int, bytes] = {}

    def search(self, content: bytes, most: int, key: bytes) -> tuple[list[int], Link, bytes]:
        """Return the blocks that hold the front of a content.

        Parameters
        ----------
        content : bytes
            Tokens as bytes.
        most : int
            How many blocks may be found.
        key : bytes
            The key of the chain.

        Returns
        -------
        blocks : list of int
        link : tuple or bytes
            The record of the last of them, or the key.
        digest : bytes
            Its digest.
        """
        sha256, width = hashes.sha256, self.width
        found, records = self.found, self.records
        blocks: list[int] = []
        link: Link = key
        digest = hashes.root_digest(key)
        for start in range(0, most * width, width):
            part = content[start : start + width]
            wanted = sha256(digest + part).digest()
            block = found.get(wanted)
            if block is None:
                break
            record = records[block]
            assert record is not None
            # A digest alone is not proof: another content may have the same.
            if record[1] != part or not (
                record[2] is link or (start == 0 and record[2] == link)  # an equal key
            ):
                break
            blocks.append(block)
            link, digest = record, wanted
        return blocks, link, digest

    def chain(
        self, content: bytes, first: int, last: int, link: Link, digest: bytes
    ) -> list[Record]:
        """Return the records of blocks ``first`` to ``last`` of a content, after a link."""
        sha256, width = hashes.sha256, self.width
        found, records = self.found, self.records
        chain: list[Record] = []
        for start in range(first * width, last * width, width):
            part = content[start : start + width]
            digest = sha256(digest + part).digest()
            block = found.get(digest)
            known = None if block is None else records[block]
            if (
                known is not None
                and known[1] == part
                and (known[2] is link or (isinstance(link, bytes) and known[2] == link))
            ):
                link = known
            else:
                link = (digest, part, link)
            chain.append(link)
        return chain

    def publish(self, blocks: Iterable[int], chain: Iterable[Record]) -> list[tuple[int, bytes]]:
        """Make blocks findable by their records, or twins of those that are.

        Returns
        -------
        list of (int, bytes)
            The blocks that cannot be found any more, since another content has their digest.
        """
        found, records = self.found, self.records
        replaced: list[tuple[int, bytes]] = []
        for block, record in zip(blocks, chain, strict=True):
            digest = record[0]
            first = found.setdefault(digest, block)
            if first == block:
                records[block] = record
            elif records[first] is record:
                self.twins.setdefault(digest, {})[block] = None
                self.twin_of[block] = digest
            else:
                # It has lost its parent, or SHA-256 collides. The newer one is worth more.
                self.forget(first)
                replaced.append((first, digest))
                found[digest] = block
                records[block] = record
        return replaced

    def is_found(self, link: Link) -> bool:
        """Return whether blocks after this link can be found."""
        if isinstance(link, bytes):
            return True
        block = self.found.get(link[0])
        return block is not None and self.records[block] is link

    def evict(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """Make room in blocks that are found.

        Returns
        -------
        list of (int, int)
            Blocks whose content is found in a twin from now on, and the twin.
        """
        found, records = self.found, self.records
        if not self.twins:
            for block in blocks:
                record = records[block]
                assert record is not None
                del found[record[0]]
                records[block] = None
            return []
        moved = []
        for block in blocks:
            record = records[block]
            assert record is not None
            records[block] = None
            twins = self.twins.get(record[0])
            if twins is None:
                del found[record[0]]
            else:
                twin = next(iter(twins))
                self.forget_twin(twin)
                found[record[0]] = twin
                records[twin] = record
                moved.append((block, twin))
        return moved

    def forget(self, block: int) -> None:
        """Forget a block and its twins, so that they are never found again."""
        record = self.records[block]
        assert record is not None
        self.records[block] = None
        del self.found[record[0]]
        for twin in self.twins.pop(record[0], ()):
            del self.twin_of[twin]

    def forget_twin(self, twin: int) -> int:
        """Remove a block from the twins, and return the one that is found."""
        digest = self.twin_of.pop(twin)
        twins = self.twins[digest]
        del twins[twin]
        if not twins:
            del self.twins[digest]
        return self.found[digest]

    def clear(self) -> None:
        """Forget all blocks."""
        self.found.clear()
        self.records[:] = [None] * len(self.records)
        self.twins.clear()
        self.twin_of.clear()
