# SPDX-License-Identifier: Apache-2.0
"""Words that grant others access to this side's memory, and revoke it at once.

A transfer cannot be taken back, and the side whose memory it is does nothing in it. So that side
puts a random word on its board, and clears it before it uses the memory for something else. The
other side reads the word: before it writes, or after it has read. A word that was cleared says that
what was read may be anything.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numpy as np

from pagedcache.status import BadParamError

PLACES = 4096  # for each side's own words, and as many for those that it is reading


class Grant(NamedTuple):
    """Access to memory: where the word is, and what it is."""

    place: int
    word: int


class Board:
    """The words of one agent, and those of others that it reads.

    Attributes
    ----------
    words : array of uint64
        ``[2, PLACES]``: others read the first row; this side reads theirs into the second.
    """

    def __init__(self) -> None:
        self.words = np.zeros((2, PLACES), np.uint64)
        self._free: tuple[list[int], list[int]] = [*range(PLACES)], [*range(PLACES)]

    def grant(self) -> Grant:
        """Return a new grant to others."""
        grant = Grant(self._take(0), secrets.randbits(63) + 1)
        self.words[0, grant.place] = grant.word
        return grant

    def revoke(self, grant: Grant) -> None:
        """Clear a word: from now on, others do not use the memory, or know that they should not.

        Twice is allowed.
        """
        if self.words[0, grant.place] != grant.word:
            return
        self.words[0, grant.place] = 0
        self._free[0].append(grant.place)

    def take_place(self) -> int:
        """Return where a word of another board can be read to."""
        place = self._take(1)
        self.words[1, place] = 0
        return place

    def give_back(self, place: int) -> None:
        """Let another word be read to a place."""
        self._free[1].append(place)

    def _take(self, row: int) -> int:
        if not self._free[row]:
            rule = "must have fewer transfers and offers going on; wait for some"
            raise BadParamError("agent", rule, PLACES)
        return self._free[row].pop()
