# SPDX-License-Identifier: Apache-2.0
"""Transfers that are going on: steps, taken whenever somebody looks."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, TypeAlias

from pagedcache.transfer.errors import TransferError, wait_for

if TYPE_CHECKING:
    from pagedcache.transfer.link import Flight
    from pagedcache.transfer.peer import Peer

Steps: TypeAlias = "Generator[None, None, None]"


class Job:
    """Blocks on their way. `Peer.send` and `Peer.fetch` make it.

    It cannot be taken back: until it is done or has failed, or its agent is closed, memory is read
    and written, whether or not anyone waits. Its agent keeps it until then.

    Attributes
    ----------
    peer : Peer
    num_blocks : int
    nbytes : int
    error : Exception or None
        Why it failed, as far as is known; usually a `TransferError`.
    """

    def __init__(self, peer: Peer, steps: Steps, num_blocks: int, nbytes: int) -> None:
        self.peer, self.num_blocks, self.nbytes = peer, num_blocks, nbytes
        self.error: Exception | None = None
        self._steps: Steps | None = steps
        self._left_behind: list[Flight] = []  # by an interruption
        peer.agent._jobs.add(self)

    @property
    def done(self) -> bool:
        """Whether all blocks are there. It does not wait for them.

        Where blocks are packed, this works on all that goes on, as `Agent.progress` does.

        Raises
        ------
        TransferError
            The job failed.
        """
        if self._steps is not None:
            if self.peer.agent.packs:
                self.peer.agent.progress()
            else:
                self._step()
        if self.error is not None:
            raise self.error
        return self._steps is None

    def _step(self) -> None:
        if self._steps is None:
            return
        try:
            next(self._steps)
        except StopIteration:
            self._release()
        except Exception as error:
            self._fail(error)
        except BaseException:  # the generator has ended, and what it was waiting for has not
            rule = "was interrupted, so what arrived may be anything"
            self._left_behind = [*self.peer.agent._link.flights]
            self.peer.agent._free_later(lambda: None)
            self._fail(TransferError(repr(self), rule, "agent"))
            raise

    def _running(self) -> bool:
        """Return whether memory may still be read and written."""
        if not self.peer.agent.packs:
            self._step()
        self._left_behind = [each for each in self._left_behind if not each.ended]
        return self._steps is not None or bool(self._left_behind)

    def wait(self, timeout: float | None = None) -> None:
        """Return once all blocks are there.

        Parameters
        ----------
        timeout : float, optional
            In seconds. By default, there is none: a host that is switched off is noticed after some
            time, and one that is only stopped never.

        Raises
        ------
        TransferTimeoutError
            The job is not done by then. It goes on, and keeps its blocks: do not use them. Wait
            again, or close the agent, which ends it on this side. What `send` has sent may still
            arrive after that.
        TransferError
            The job failed; ``error.side`` says on which side. What is in the targets is not known.
        """
        wait_for(lambda: self.done, timeout, repr(self), self.peer.agent._pause)

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._release()

    def _release(self) -> None:
        self.peer.agent._jobs.discard(self)
        self._steps = None

    def __repr__(self) -> str:
        state = "going on" if self._steps is not None else "failed" if self.error else "done"
        return (
            f"<Job with peer {self.peer.name!r}: {self.num_blocks} blocks, {self.nbytes} bytes, "
            f"{state}>"
        )
