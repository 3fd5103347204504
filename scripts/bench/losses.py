# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cost of the six losses, forward and backward, in units of a 1024^3 float32 matrix product on the same thread.

    python scripts/bench/losses.py [--rounds 25]

12,800 positives, 33,600 anchors of 20 classes, 1,024 embeddings of 256; CPE also with every row an anchor, triplet
also with 1,536 rows. Each round times every loss between two products. Times are those of the thread, so other work on
the machine does not count, though it spoils caches: printed are medians, and the median of each loss over the products
beside it. Limits are in products, from milliseconds on a machine whose product takes 20. The last column is what the
forward keeps for the backward: MB, and for pairwise losses in matrices of N x N float32. Exit code 1 above a limit.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fsdet.engine.allocator import keep_freed_memory
from fsdet.losses.bce import bce_at
from fsdet.losses.ciou import ciou_loss
from fsdet.losses.cpe import cpe_loss
from fsdet.losses.dfl import dfl_loss
from fsdet.losses.supcon import supcon_loss
from fsdet.losses.triplet import triplet_loss
from fsdet.losses.wiou import wiou_loss

POSITIVES, ROWS, TRIPLETS, WIDTH, CLASSES, IMAGES, ANCHORS = 12_800, 1_024, 1_536, 256, 20, 4, 8_400
PRODUCT = 20.0  # ms, of the machine that the limits were set on
LIMITS = {"wiou": 1.2, "dfl": 4.0, "supcon": 30.0, "cpe": 35.0, "cpe, all rows": 35.0, "triplet": 35.0,
          "triplet, 1,536": 35.0}  # ms there  # fmt: skip
SIX = ("wiou", "bce", "dfl", "supcon", "cpe", "triplet")
TOGETHER = 4.0  # products: what the six may cost
PAIRWISE = {"supcon": ROWS, "cpe": ROWS, "cpe, all rows": ROWS, "triplet": ROWS, "triplet, 1,536": TRIPLETS}
MATRICES = 2.5  # of N x N that a pairwise loss may keep beside its rows; a vector or two of N are no matter
Loss = Callable[[], Tensor]


def boxes(generator: torch.Generator) -> Tensor:
    corner = 600 * torch.rand(POSITIVES, 2, generator=generator)
    return torch.cat((corner, corner + 8 + 100 * torch.rand(POSITIVES, 2, generator=generator)), -1)


def cases(generator: torch.Generator) -> dict[str, tuple[Tensor, Loss]]:
    """{name: (leaf, loss of it)}."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    def labels(rows: int) -> Tensor:
        return torch.randint(CLASSES, (rows,), generator=generator)

    pred, target = boxes(generator).requires_grad_(), boxes(generator)
    bins, distance = leaf(POSITIVES, 4, 16), 15 * torch.rand(POSITIVES, 4, generator=generator)
    logits, known = leaf(IMAGES, ANCHORS, CLASSES), torch.ones(IMAGES, CLASSES, dtype=torch.bool)
    place = torch.randperm(IMAGES * ANCHORS, generator=generator)[:POSITIVES]
    column, weight = labels(POSITIVES), torch.rand(POSITIVES, generator=generator)
    label, many = labels(ROWS), labels(TRIPLETS)
    overlap, all_over = 0.4 + 0.6 * torch.rand(ROWS, generator=generator), torch.ones(ROWS)
    x, more = leaf(ROWS, WIDTH), leaf(TRIPLETS, WIDTH)
    return {
        "wiou": (pred, lambda: wiou_loss(pred, target, 0.5)),
        "ciou": (pred, lambda: ciou_loss(pred, target)),
        "bce": (logits, lambda: bce_at(logits, place // ANCHORS, place % ANCHORS, column, weight, known)),
        "dfl": (bins, lambda: dfl_loss(bins, distance)),
        "supcon": (x, lambda: supcon_loss(x, label)),
        "cpe": (x, lambda: cpe_loss(x, overlap, label)),
        "cpe, all rows": (x, lambda: cpe_loss(x, all_over, label)),
        "triplet": (x, lambda: triplet_loss(x, label)),
        "triplet, 1,536": (more, lambda: triplet_loss(more, many)),
    }


def milliseconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - start)


def kept(leaf: Tensor, loss: Loss) -> int:
    """Bytes that the forward keeps for the backward, the leaf not counted."""
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss().sum()
    del total
    return sum(held.values()) - held.get(leaf.untyped_storage().data_ptr(), 0)


def measure(rounds: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """Median milliseconds of the product, and of each loss {name: (milliseconds, share of the products beside it)}."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    work = {name: lambda leaf=leaf, loss=loss: torch.autograd.grad(loss().sum(), leaf)
            for name, (leaf, loss) in cases(generator).items()}  # fmt: skip
    for job in work.values():
        job()
    products: list[float] = [milliseconds(lambda: a @ b)]
    times: dict[str, list[float]] = {name: [] for name in work}
    shares: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, job in work.items():
            times[name].append(milliseconds(job))
            products.append(milliseconds(lambda: a @ b))
            shares[name].append(2 * times[name][-1] / sum(products[-2:]))
    middle = {name: (statistics.median(times[name]), statistics.median(shares[name])) for name in work}
    return statistics.median(products), middle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    product, found = measure(parser.parse_args().rounds)
    print(f"1024^3 product {product:.2f} ms")
    print(f"{'loss':<15}{'ms':>8}{'products':>10}{'limit':>8}{f'ms of {PRODUCT:.0f}':>10}  {'':<16}{'kept'}")
    late, jobs = [], cases(torch.Generator().manual_seed(0))
    for name, (value, share) in found.items():
        limit = LIMITS.get(name, 0.0) / PRODUCT
        verdict = "" if not limit else "ok" if share <= limit else "above its limit"
        shown = f"{limit:8.3f}" if limit else f"{'-':>8}"
        held, n = kept(*jobs[name]), PAIRWISE.get(name)
        matrices = (held - 4 * n * WIDTH) / (4 * n * n) if n else 0.0
        memory = f"{held / 1e6:.1f} MB" + (f", {matrices:.2f} N x N beside the rows" if n else "")
        print(f"{name:<15}{value:8.2f}{share:10.3f}{shown}{PRODUCT * share:10.2f}  {verdict:<16}{memory}")
        late += [name] if (limit and share > limit) or matrices > MATRICES else []
    total = sum(found[name][1] for name in SIX)
    print(f"six losses {total:.2f} products (at most {TOGETHER:g}): {'ok' if total <= TOGETHER else 'above'}")
    return int(bool(late) or total > TOGETHER)


if __name__ == "__main__":
    sys.exit(main())
