# SPDX-License-Identifier: Apache-2.0
"""``python -m pagedcache bench --transfer``: blocks to another process of this host."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
import zlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np

import pagedcache as pc
from pagedcache.transfer import Agent, Peer
from pagedcache.transfer.link import MINE

SIZES = (4096, 32768, 262144)  # bytes of a block
TOTAL = 1 << 25  # bytes in each turn
TURNS = 15
LIMIT = 120.0  # seconds, for the other process

SOCKET = "socket, blocks one by one"
WRITE, READ = "NIXL, write one buffer", "NIXL, read one buffer"
WRITE_SAME, READ_SAME = "NIXL, write these blocks", "NIXL, read these blocks"
SEND, FETCH = "pagedcache, send", "pagedcache, fetch"
ROWS = (WRITE, WRITE_SAME, SEND, READ, READ_SAME, FETCH, SOCKET)
# What each is a share of.
CEILINGS = {SOCKET: WRITE, WRITE_SAME: WRITE, SEND: WRITE, READ_SAME: READ, FETCH: READ}


def run(arguments: Namespace) -> int:
    """Measure, and print a table.

    Returns
    -------
    int
        0, or 2 if NIXL is not installed.
    """
    results: dict[str, Any] = {"about": _about(), "bytes": TOTAL, "seconds": {}}
    try:
        for size in SIZES:
            results["seconds"][size] = _with_other(size)
    except pc.PagedCacheError as error:
        print(f"pagedcache bench: {error}")
        return 2
    print(f"{TOTAL / 1e6:.0f} MB from one process of this host to another, on the CPU")
    print(", ".join(f"{name} {value}" for name, value in results["about"].items()))
    print(
        "Blocks are scattered on both sides. GB/s, median of "
        f"{TURNS} turns, all in turn; in brackets, the share of NIXL's rate with one buffer"
    )
    sizes = "".join(f"{f'{size // 1024} KiB':>16}" for size in SIZES)
    print(f"\n  {'block':28}{sizes}")
    for name in ROWS:
        cells = ""
        for seconds in results["seconds"].values():
            share = seconds[CEILINGS[name]] / seconds[name] if name in CEILINGS else None
            rate = f"{TOTAL / seconds[name] / 1e9:.2f}"
            cells += f"{rate:>9} " + (f"{f'({share:.2f})':>6}" if share is not None else " " * 6)
        print(f"  {name:28}{cells}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"Results: {arguments.json}")
    return 0


def _about() -> dict[str, str]:
    try:
        nixl = importlib.metadata.version("nixl")
    except importlib.metadata.PackageNotFoundError:
        nixl = "not installed"
    about = {"pagedcache": pc.__version__, "NIXL": nixl, "NumPy": np.__version__}
    about |= {"Python": platform.python_version(), "CPUs": str(os.cpu_count())}
    return about | {
        name: os.environ.get(name, "not set") for name in ("UCX_TLS", "UCX_NET_DEVICES")
    }


def _with_other(size: int) -> dict[str, float]:
    """Start the other process, and return the median time of each way, in seconds."""
    memory = np.random.default_rng(0).integers(0, 256, (2, TOTAL // size, size), np.uint8)
    with Agent("here", [memory.reshape(-1, size)]) as agent:
        spawn = multiprocessing.get_context("spawn")
        pipe, there = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(there, size, TOTAL), daemon=True)
        process.start()
        there.close()
        try:
            return _measure(agent, memory, pipe)
        finally:
            process.kill()
            process.join()


def _measure(agent: Agent, memory: Any, pipe: Any) -> dict[str, float]:
    card, port, address = _answer(pipe)
    peer = agent.connect(card)
    count, size = memory.shape[1:]
    blocks = memory.reshape(-1, size)
    make = np.random.default_rng(1)
    # Every other block, so that NIXL cannot join neighbours, in any order.
    here = 2 * make.permutation(count)
    theirs = 2 * make.permutation(count) + 1
    first = np.zeros(1, np.int32)
    buffer = [
        side
        for whose, place in ((MINE, memory.ctypes.data), (peer._id, address))
        for side in (_whole(peer, whose, place), first)
    ]
    there = peer._blocks_there
    assert there is not None
    same = agent._blocks_here.handle, here.astype(np.int32), there.handle, theirs.astype(np.int32)
    with socket.create_connection(("127.0.0.1", port), LIMIT) as connection:
        ways: dict[str, Callable[[], None]] = {
            WRITE: _nixl("WRITE", peer, *buffer),
            WRITE_SAME: _nixl("WRITE", peer, *same),
            SEND: lambda: peer.send(here, theirs).wait(LIMIT),
            READ: _nixl("READ", peer, *buffer),
            READ_SAME: _nixl("READ", peer, *same),
            FETCH: lambda: peer.fetch(theirs, here).wait(LIMIT),
            SOCKET: lambda: _by_socket(connection, pipe, blocks, here, theirs),
        }
        for name in (SEND, SOCKET, FETCH):
            _check(name, ways[name], blocks, here, theirs, pipe)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(TURNS + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if turn:  # the first one connects
                    times[name].append(time.perf_counter() - began)
        return {name: statistics.median(found) for name, found in times.items()}


def _whole(peer: Peer, whose: str, place: int) -> Any:
    rows = np.array([[place, TOTAL, 0]], np.uint64)
    return peer.agent._link.nixl.prep_xfer_dlist(whose, rows, "DRAM")


def _nixl(operation: str, peer: Peer, *sides: Any) -> Callable[[], None]:
    """Return what NIXL does alone."""
    nixl = peer.agent._link.nixl

    def move() -> None:
        handle = nixl.make_prepped_xfer(operation, *sides)
        state = nixl.transfer(handle)
        while state == "PROC":
            state = nixl.check_xfer_state(handle)
        if state != "DONE":
            raise AssertionError(f"NIXL says {state}")

    return move


def _by_socket(connection: Any, pipe: Any, blocks: Any, here: Any, theirs: Any) -> None:
    pipe.send(("socket", theirs))
    for block in here:
        connection.sendall(blocks[block])
    if connection.recv(1) != b"!":
        raise AssertionError("the other process has ended")


def _check(
    name: str, way: Callable[[], None], blocks: Any, here: Any, theirs: Any, pipe: Any
) -> None:
    """Raise unless the right bytes arrive."""
    blocks[here] = np.random.default_rng(len(name)).integers(0, 256, (len(here), 1), np.uint8)
    pipe.send(("checksum", theirs))
    before = _answer(pipe)
    way()
    pipe.send(("checksum", theirs))
    there, ours = _answer(pipe), zlib.crc32(blocks[here])
    if there != ours or (name != FETCH and there == before):
        raise AssertionError(f"{name} moved wrong bytes")


def _answer(pipe: Any) -> Any:
    if not pipe.poll(LIMIT):
        raise AssertionError("the other process does not answer")
    return pipe.recv()


def _serve(pipe: Any, size: int, total: int) -> None:
    """Be the other process."""
    memory = np.zeros((2 * total // size, size), np.uint8)
    with (
        Agent("there", [memory]) as agent,
        socket.create_server(("127.0.0.1", 0)) as server,
        contextlib.suppress(EOFError),
    ):
        pipe.send((agent.card, server.getsockname()[1], memory.ctypes.data))
        connection, _ = server.accept()
        while True:
            what, blocks = pipe.recv()
            if what == "checksum":
                pipe.send(zlib.crc32(memory[blocks]))
                continue
            for block in blocks:
                view = memoryview(memory[block])
                while view:
                    got = connection.recv_into(view)
                    if not got:
                        return
                    view = view[got:]
            connection.sendall(b"!")
