# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cost of the six losses, forward and backward, in units of a 1024^3 float32 matrix product on the same thread.

    python scripts/bench/losses.py [--rounds 15]

12,800 positives, 1,024 embeddings of 256. Each round times the product and every loss in turn, so that a busy
machine slows both alike; printed are the medians and the ratio of their sum, which is to stay below 4.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fsdet.losses.bce import bce_at
from fsdet.losses.cpe import cpe_loss
from fsdet.losses.dfl import dfl_loss
from fsdet.losses.supcon import supcon_loss
from fsdet.losses.triplet import triplet_loss
from fsdet.losses.wiou import wiou_loss

POSITIVES, ROWS, WIDTH, CLASSES, IMAGES, ANCHORS = 12_800, 1_024, 256, 20, 4, 8_400
Loss = Callable[[], Tensor]


def boxes(generator: torch.Generator) -> Tensor:
    corner = 600 * torch.rand(POSITIVES, 2, generator=generator)
    return torch.cat((corner, corner + 8 + 100 * torch.rand(POSITIVES, 2, generator=generator)), -1)


def cases(generator: torch.Generator) -> dict[str, tuple[Tensor, Loss]]:
    """{name: (leaf, loss of it)}."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    pred, target = boxes(generator).requires_grad_(), boxes(generator)
    bins, distance = leaf(POSITIVES, 4, 16), 15 * torch.rand(POSITIVES, 4, generator=generator)
    logits, known = leaf(IMAGES, ANCHORS, CLASSES), torch.ones(IMAGES, CLASSES, dtype=torch.bool)
    place = torch.randperm(IMAGES * ANCHORS, generator=generator)[:POSITIVES]
    column = torch.randint(CLASSES, (POSITIVES,), generator=generator)
    weight = torch.rand(POSITIVES, generator=generator)
    label = torch.randint(CLASSES, (ROWS,), generator=generator)
    overlap = 0.4 + 0.6 * torch.rand(ROWS, generator=generator)
    x, projected, embedded = leaf(ROWS, WIDTH), leaf(ROWS, WIDTH), leaf(ROWS, WIDTH)
    return {
        "wiou": (pred, lambda: wiou_loss(pred, target, 0.5)),
        "bce": (logits, lambda: bce_at(logits, place // ANCHORS, place % ANCHORS, column, weight, known)),
        "dfl": (bins, lambda: dfl_loss(bins, distance)),
        "supcon": (x, lambda: supcon_loss(x, label)),
        "cpe": (projected, lambda: cpe_loss(projected, overlap, label)),
        "triplet": (embedded, lambda: triplet_loss(embedded, label)),
    }


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def measure(rounds: int) -> dict[str, float]:
    """Median milliseconds of the product and of each loss, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    work: dict[str, Callable[[], object]] = {"product": lambda: a @ b}
    for name, (leaf, loss) in cases(generator).items():
        work[name] = lambda leaf=leaf, loss=loss: torch.autograd.grad(loss().sum(), leaf)
    times = {name: [milliseconds(job)] for name, job in work.items()}
    for _ in range(rounds):
        for name, job in work.items():
            times[name].append(milliseconds(job))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    torch.set_num_threads(1)
    times = measure(parser.parse_args().rounds)
    product = times.pop("product")
    print(f"1024^3 product {product:.2f} ms")
    for name, value in times.items():
        share = value / product
        print(f"{name:8} {value:7.2f} ms  {share:5.2f} products  {20 * share:6.2f} ms where a product takes 20 ms")
    total = sum(times.values())
    print(f"six losses {total:.2f} ms = {total / product:.2f} products (target <= 4)")


if __name__ == "__main__":
    main()
