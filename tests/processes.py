# SPDX-License-Identifier: AGPL-3.0-or-later
"""Several processes of this one, joined over loopback as torchrun would join them."""

import os
import pickle
import signal
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

JOINING, SECONDS = 20, 50  # after which forks that do not find one another, or a test that hangs, are ended
DIGITS = 5  # of a port, as the forks read it
ATTEMPTS = 3  # all of them within the time limit of a test


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

    A fork of a process with threads may be born with a lock that nobody will open: where one has ended without a word,
    or has not joined the others in time, all are made again.
    """
    for _ in range(ATTEMPTS):
        with tempfile.TemporaryDirectory() as folder:
            found = _forked(function, world, timeout, Path(folder))
            if not any(_mute(Path(folder), rank) for rank in range(world)):
                break
    return found


def _forked(function: Callable[[Peers], Any], world: int, timeout: float, folder: Path) -> list[Any]:
    heard, said = pipe = os.pipe()
    children = [_fork(function, rank, world, pipe, timeout, folder) for rank in range(world)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps it
    os.write(said, f"{store.port:{DIGITS}d}".encode() * world)  # only now: a fork beside the store's thread may hang
    ends = _ends(children, folder)
    os.close(heard)
    os.close(said)
    files = [folder / str(rank) for rank in range(world)]
    return [pickle.loads(file.read_bytes()) if file.exists() else Raised(ChildProcessError(f"process {rank} {end}"))
            for rank, (file, end) in enumerate(zip(files, ends, strict=True))]  # fmt: skip


def _ends(children: list[int], folder: Path) -> list[str]:
    """How the children ended, in words, by rank; those that take too long, to join or afterwards, are killed."""
    ends: dict[int, str] = {}
    limit, joined = time.monotonic() + JOINING, False
    while len(ends) < len(children):
        late = time.monotonic() > limit or any(_mute(folder, rank) for rank in ends)
        for rank, child in enumerate(children):
            if rank in ends:
                continue
            if late:
                os.kill(child, signal.SIGKILL)
            pid, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if pid:
                ends[rank] = f"{'hung and was killed: ' if late else ''}ended with {os.waitstatus_to_exitcode(status)}"
        if not joined and all((folder / f"{rank}.joined").exists() for rank in range(len(children))):
            limit, joined = time.monotonic() + SECONDS, True
        time.sleep(0.01)
    return [ends[rank] for rank in range(len(children))]


def _mute(folder: Path, rank: int) -> bool:
    """Neither has it joined the others nor said why."""
    return not (folder / f"{rank}.joined").exists() and not (folder / str(rank)).exists()


def _fork(function: Callable, rank: int, world: int, pipe: tuple, timeout: float, folder: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of the parent are not used by the fork
        child = os.fork()
    if child:
        return child
    code, begun = 1, time.monotonic()
    try:
        os.close(pipe[1])  # so that a parent that is gone ends the reading
        port = os.read(pipe[0], DIGITS).decode().strip()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank),
                       "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
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
