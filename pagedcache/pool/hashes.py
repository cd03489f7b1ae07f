# SPDX-License-Identifier: Apache-2.0
"""What a block is found by: a digest of its tokens and of all tokens before it.

The digest of a block is the SHA-256 of its parent's digest, 32 bytes, and its tokens as int32 in
little-endian order; the parent of the first block is the digest of the key. So equal tokens under
equal keys have equal digests on all machines.
"""

from __future__ import annotations

import sys
from array import array
from hashlib import sha256 as sha256

# No block's input begins like this, so a key cannot pretend to be the digest of a block.
_ROOT = b"pagedcache.pool root of a chain\0"


def root_digest(key: bytes) -> bytes:
    """Return the digest that stands before the first block."""
    return sha256(_ROOT + key).digest()


def content_of(tokens: array[int]) -> bytes:
    """Return tokens as bytes: int32 in little-endian order, on any machine."""
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens.tobytes()
