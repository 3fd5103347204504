# SPDX-License-Identifier: AGPL-3.0-or-later
"""Several processes of this one, joined over loopback as torchrun would join them."""

import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fsdet.engine import ranks
from fsdet.peers import Peers

SECONDS = 50  # after which a test that hangs is ended


class Raised:
    """What a process raised, and how many seconds after it had joined the others."""

    def __init__(self, error: BaseException, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.kind, self.text = type(error).__name__, str(error)
        self.trace = "".join(traceback.format_exception(error))

    def __repr__(self) -> str:
        return self.trace


def together(function: Callable[[Peers], Any], world: int = 2, timeout: float = 30) -> list[Any]:
    """What `function(peers)` returns in each of `world` forks, by rank; Raised where it raised.

    A fork of a process with threads may be born with a lock that nobody will open: where one ends without a word
    before it has joined the others, all are made again, once.
    """
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        found = _forked(function, world, timeout, Path(first))
        stillborn = any(not Path(first, f"{rank}.joined").exists() and isinstance(part, Raised)
                        and part.kind == ChildProcessError.__name__ for rank, part in enumerate(found))  # fmt: skip
        return _forked(function, world, timeout, Path(second)) if stillborn else found


def _forked(function: Callable[[Peers], Any], world: int, timeout: float, folder: Path) -> list[Any]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps it
    children = [_fork(function, rank, world, store.port, timeout, folder) for rank in range(world)]
    ends = [_end(child, time.monotonic() + SECONDS) for child in children]
    files = [folder / str(rank) for rank in range(world)]
    return [pickle.loads(file.read_bytes()) if file.exists() else Raised(ChildProcessError(f"process {rank} {end}"))
            for rank, (file, end) in enumerate(zip(files, ends, strict=True))]  # fmt: skip


def _end(child: int, limit: float) -> str:
    """How a child ended, in words; killed where it has not by `limit`."""
    hung = ""
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > limit:
            hung = f"hung for {SECONDS} s and was "
            os.kill(child, 9)
        time.sleep(0.01)
    return f"{hung}ended with {os.waitstatus_to_exitcode(found[1])}"


def _fork(function: Callable, rank: int, world: int, port: int, timeout: float, folder: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of the parent are not used by the fork
        child = os.fork()
    if child:
        return child
    code, begun = 1, time.monotonic()
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank),
                       "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        try:
            with ranks.joined("cpu", timeout) as peers:
                (folder / f"{rank}.joined").touch()
                begun = time.monotonic()  # what a busy machine needs to fork and to join is nobody's delay
                found = function(peers)
        except Exception as error:
            found = Raised(error, time.monotonic() - begun)
        (folder / "part").with_suffix(f".{rank}").write_bytes(pickle.dumps(found))
        (folder / "part").with_suffix(f".{rank}").rename(folder / str(rank))
        code = 0
    finally:
        os._exit(code)  # nothing of the test session that was forked with it
    return 0
