# SPDX-License-Identifier: AGPL-3.0-or-later
"""Several processes that train one model, started by torchrun. The only user of torch.distributed.

Two kinds of exchange. Meetings go over the host (gloo) in messages of one size: whatever a process has come to, the
next message of it says so, which is how one that is out of memory gets all others out of the forward they are in. Sums
and rows go over the devices (nccl, or gloo). Nothing waits for ever: a process that fails leaves a note in the store
that all look into while they wait, and one that is not there in time is named.
"""

import io
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fsdet.errors import ConfigError, RunFailed, Stopped, explain
from fsdet.peers import PeerOutOfMemory, Peers

log = logging.getLogger("fsdet")
LOOK_SECONDS = 0.5  # between two looks for notes of failure
GRACE_SECONDS = 1.5  # for the others to say that they are there
WORDS = 6  # numbers in a message: kind, up to four values, state
TOTAL, ROWS, TELL, GIVEN, MOST, ADD, WAIT = range(1, 8)
NAMES = dict(zip(range(1, 8), ("a sum", "rows", "words", "a gift", "a vote", "gradients", "a barrier"), strict=True))
OUT_OF_MEMORY = 1


class Ranks(Peers):
    """The processes of a run.

    Args:
        rank, world: which one this is, of how many. store: shared, for notes. host: a gloo group. group: of the device.
        timeout: seconds that one waits for another.
    """

    def __init__(self, rank: int, world: int, store: dist.Store, host: dist.ProcessGroup, group: dist.ProcessGroup,
                 timeout: float) -> None:  # fmt: skip
        super().__init__(rank, world)
        self.store, self.host, self.group, self.timeout = store, host, group, timeout
        self.met = 0  # meetings so far

    def __reduce__(self) -> tuple:
        return Peers, (self.rank, self.world)  # what a loader worker needs

    def total(self, values: Tensor) -> Tensor:
        self._meet(TOTAL, values.numel())
        out = values.detach().clone()
        self._done(dist.all_reduce(out, group=self.group, async_op=True), self.group)
        return out

    def rows(self, *blocks: Tensor) -> list[tuple[Tensor, slice]]:
        if len(blocks) > WORDS - 2:
            raise ValueError(f"rows takes {WORDS - 2} blocks at most, got {len(blocks)}")
        counts = [message[1 : 1 + len(blocks)] for message in self._meet(ROWS, *map(len, blocks))]
        most = [max(column) for column in zip(*counts, strict=True)]
        sizes = [n * block.shape[1] for n, block in zip(most, blocks, strict=True)]
        flat = torch.cat([_padded(block.detach(), n) for block, n in zip(blocks, most, strict=True)])
        heard = [torch.empty_like(flat) for _ in range(self.world)]
        self._done(dist.all_gather(heard, flat, group=self.group, async_op=True), self.group)
        parts = [one.split(sizes) for one in heard]
        return [self._joined(block, [p[i] for p in parts], [c[i] for c in counts]) for i, block in enumerate(blocks)]

    def _joined(self, own: Tensor, parts: list[Tensor], counts: list[int]) -> tuple[Tensor, slice]:
        rows = [part.view(-1, own.shape[1])[:n] for part, n in zip(parts, counts, strict=True)]
        rows[self.rank] = own
        start = sum(counts[: self.rank])
        return torch.cat(rows), slice(start, start + len(own))

    def tell(self, value: Any) -> list[Any]:
        said = json.dumps(value).encode()
        longest = max(length for _, length, *_ in self._meet(TELL, len(said)))
        own = torch.frombuffer(bytearray(said.ljust(max(1, longest))), dtype=torch.uint8)
        heard = [torch.empty_like(own) for _ in range(self.world)]
        self._done(dist.all_gather(heard, own, group=self.host, async_op=True), self.host)
        return [json.loads(one.numpy().tobytes()) for one in heard]

    def given(self, value: Any, rank: int = 0) -> Any:
        data = bytearray(_packed(value) if rank == self.rank else b"")
        length = self._meet(GIVEN, len(data), rank)[rank][1]
        gift = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(length, dtype=torch.uint8)
        self._done(dist.broadcast(gift, rank, group=self.host, async_op=True), self.host)
        return torch.load(io.BytesIO(gift.numpy().tobytes()), weights_only=True)

    def most(self, number: int) -> int:
        return max(message[1] for message in self._meet(MOST, number))

    def add_up(self, gradients: Sequence[Tensor], extra: Tensor) -> Tensor:
        sizes = [*(g.numel() for g in gradients), extra.numel()]
        self._meet(ADD, sum(sizes), zlib.crc32(repr(sizes).encode()), alike=True)
        flat = torch.cat([*(g.reshape(-1) for g in gradients), extra])  # by element, whatever the layout in memory
        self._done(dist.all_reduce(flat, group=self.group, async_op=True), self.group)
        *parts, out = flat.split(sizes)
        torch._foreach_copy_(list(gradients), [p.view(g.shape) for p, g in zip(parts, gradients, strict=True)])
        return out

    def confess(self) -> None:
        self._exchange(0, state=OUT_OF_MEMORY)

    def wait(self, what: str) -> None:
        self._meet(WAIT, zlib.crc32(what.encode()), alike=True, what=what)

    def fail(self, reason: str) -> None:
        """Leave the note that ends the others; the first one stays."""
        try:
            self.store.compare_set("failed", "", f"process {self.rank} of {self.world} failed: {reason}")
        except RuntimeError as error:  # whoever kept the store is gone, and with it the run
            log.debug("no note left: %s", error)

    def _meet(self, kind: int, *values: int, alike: bool = False, what: str = "") -> list[list[int]]:
        """Messages [kind, values...] of all processes, by rank. alike: all have to say the same.

        Raises:
            PeerOutOfMemory: one of them is, and has not come to this meeting. RunFailed: they are not at one place.
        """
        messages = self._exchange(kind, *values, what=what)
        out = [rank for rank, message in enumerate(messages) if message[-1] == OUT_OF_MEMORY]
        if out:
            raise PeerOutOfMemory(f"process {', '.join(map(str, out))} of {self.world} is out of memory")
        own = messages[self.rank]
        odd = [r for r, m in enumerate(messages) if (m[:-1] != own[:-1] if alike else m[0] != own[0])]
        if odd:
            told = ", ".join(f"process {r} is at {NAMES.get(messages[r][0], '?')} {messages[r][1:-1]}" for r in odd)
            here = f"{NAMES[kind]} {own[1:-1]} in process {self.rank}"
            raise RunFailed(explain(f"all processes at {here}", told, f"meeting {self.met}",
                                    "this is a fault of fsdet: report it with the run's config.yaml"))  # fmt: skip
        return messages

    def _exchange(self, kind: int, *values: int, state: int = 0, what: str = "") -> list[list[int]]:
        self.met += 1
        own = torch.zeros(WORDS, dtype=torch.int64)
        own[: 1 + len(values)] = torch.tensor([kind, *values])
        own[-1] = state
        heard = [torch.empty_like(own) for _ in range(self.world)]
        self._done(dist.all_gather(heard, own, group=self.host, async_op=True), self.host, what)
        return [message.tolist() for message in heard]

    def _done(self, work: dist.Work, group: dist.ProcessGroup, what: str = "") -> None:
        """Wait for an exchange: here, and not within torch, so that signals and notes are heard meanwhile."""
        if dist.get_backend(group) == "nccl":
            work.wait()  # the device's stream waits, this process does not
            return
        begun = looked = time.monotonic()
        pause = 1e-5
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 5e-4)
            now = time.monotonic()
            if now - looked > LOOK_SECONDS:
                looked = now
                self._look()
            if now - begun > self.timeout:
                self._miss(f"{what or 'the others'} within {self.timeout:g} s (guard.rank_timeout)", "no sign of them")
        try:
            work.wait()
        except RuntimeError as error:  # a connection that broke
            self._miss(what or "an answer", str(error).partition("\n")[0][:120], GRACE_SECONDS)

    def _look(self) -> None:
        """Say that this process waits; raise RunFailed where another has left a note."""
        try:
            self.store.set(f"here/{self.rank}", str(self.met))
            note = self.store.get("failed").decode() if self.store.check(["failed"]) else ""
        except RuntimeError as error:
            raise RunFailed(f"torchrun's store, through which the processes meet, is gone ({error})") from error
        if note:
            raise RunFailed(note)

    def _miss(self, expected: str, got: str, grace: float = 0.0) -> NoReturn:
        """Name the processes that are not at this meeting: all who are have said so by now, or do within `grace`."""
        self._look()
        time.sleep(grace)
        self._look()
        present = [self.store.get(key) if self.store.check([key]) else b"" for key in map("here/{}".format, self._all)]
        gone = [str(rank) for rank, at in enumerate(present) if at != str(self.met).encode()]
        cure = (
            "look at the log of that process; a slow one needs a larger guard.rank_timeout; then fsdet train --resume"
        )
        raise RunFailed(explain(expected, f"{got}: process {', '.join(gone) or '?'} of {self.world} is missing",
                                f"process {self.rank}, meeting {self.met}", cure))  # fmt: skip

    @property
    def _all(self) -> range:
        return range(self.world)


def _padded(block: Tensor, rows: int) -> Tensor:
    """[n, F] -> [rows * F], zeros behind."""
    return torch.cat((block, block.new_zeros(rows - len(block), block.shape[1]))).reshape(-1)


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """The processes that torchrun has started, until the end of the block, which they leave together.

    Args:
        device: run.device; each process takes the GPU of its place on the machine. timeout: seconds one waits for
        another.
    Raises:
        ConfigError: a device that the processes would have to share by name.
    """
    backend = _place(device)
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("fsdet", store)
    limit = timedelta(seconds=timeout + 60)  # ours ends first, and knows who is missing
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    own = dist.group.WORLD
    peers = Ranks(rank, world, store, dist.new_group(backend="gloo", timeout=limit) if backend == "nccl" else own,
                  own, timeout)  # fmt: skip
    _prefix(peers)
    try:
        yield peers
        peers.wait("the end of the run")
    except Stopped:
        raise  # all of them, after the same step
    except BaseException as error:
        peers.fail(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        raise
    finally:
        dist.destroy_process_group()


def _place(name: str) -> str:
    """Make the GPU of this process the current one; returns the backend, nccl where each process has its own."""
    local, beside = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kind, _, number = name.partition(":")
    if number:
        cure = "set run.device=cuda: each process takes the GPU of its place on the machine"
        raise ConfigError(explain("a kind of device for several processes", name, "run.device", cure))
    if kind not in ("auto", "cuda") or not torch.cuda.is_available():
        return "gloo"
    count = torch.cuda.device_count()
    torch.cuda.set_device(local % count)
    return "nccl" if beside <= count else "gloo"


def _prefix(peers: Ranks) -> None:
    """Of the processes that do not lead only warnings reach the console, with their rank."""
    for handler in log.handlers if not peers.leads else ():
        handler.setLevel(max(handler.level, logging.WARNING))
        handler.setFormatter(logging.Formatter(f"process {peers.rank}: %(message)s"))
