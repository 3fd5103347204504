# SPDX-License-Identifier: AGPL-3.0-or-later
"""How the head starts, in one table with reasons. The trunk starts as Ultralytics builds it.

| what                 | value                          | why                                                          |
| box bias             | 1.0                            | as Ultralytics: no side starts at a dead bin                 |
| standard weight      | std .01                        | logits start at their bias: no class is preferred            |
| standard bias        | log(5 / C / (640 / stride)^2)  | about five objects in a 640 px image: the BCE starts small   |
| embedding            | torch default                  | only directions matter                                       |
| proxies              | unit normal rows               | near-orthogonal in D >= 64                                   |
| log scale            | ln 10                          | cosines of .5 already separate, gradients do not vanish      |
| prototype bias       | -log((1 - .001) / .001) = -6.9 | same kind of prior in the cosine branch                      |
| refine, objectness   | last layers 0                  | a prototype as it is, no place above another                 |
| BatchNorm            | eps 1e-3, momentum .03         | as the trunk's                                               |
"""

import itertools
import math

import torch
from torch import nn

from fsdet.models.backbone import NORM_EPS, NORM_MOMENTUM
from fsdet.models.heads import DualHead

PRIOR = 0.001
SCALE = 10.0
OBJECTS, SIDE = 5, 640  # so many objects in an image of that side, in px, are expected before anything is seen


def initialise_head(head: DualHead, strides: tuple[int, ...]) -> None:
    """Apply the table above in place; random parts draw from torch's global generator."""
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = NORM_EPS, NORM_MOMENTUM
    for box, standard, stride in zip(head.box, head.standard, strides, strict=True):
        nn.init.constant_(box[-1].bias, 1.0)
        nn.init.normal_(standard.weight, std=0.01)
        nn.init.constant_(standard.bias, math.log(standard_prior(head.classes, stride)))
    with torch.no_grad():
        if len(head.proxies):
            head.proxies.copy_(nn.functional.normalize(torch.randn_like(head.proxies), dim=-1))
        for last in [*(head.objectness or ()), *([head.refine[-1]] if head.refine is not None else [])]:
            last.weight.zero_()
            last.bias.zero_()
        head.log_scale.fill_(math.log(SCALE))
        head.bias.fill_(-math.log((1 - PRIOR) / PRIOR))


def standard_prior(classes: int, stride: int) -> float:
    """Probability that a point of a level shows a given class, before anything is seen."""
    return OBJECTS / max(classes, 1) / (SIDE / stride) ** 2


def expected_cls(head: DualHead, strides: tuple[int, ...], size: int, images: int, normaliser: float,
                 branches: tuple[str, ...] = ("standard", "prototype")) -> float:  # fmt: skip
    """What BCE over all anchors costs a fresh head without ways: what every column says of the background, and
    -log prior for what is there. Measured within 5 % on the drawn set and on chess.

    Args:
        size: px of the square images. images: B. normaliser: the sum of target scores that the loss was divided by;
            where it was raised to 1, this says too much.
    """
    points = [(size / s) ** 2 for s in strides]
    cost = 0.0
    if "standard" in branches and head.classes:
        priors = [standard_prior(head.classes, s) for s in strides]
        background = sum(n * head.classes * p for n, p in zip(points, priors, strict=True))
        cost += images * background / normaliser - sum(map(math.log, priors)) / len(priors)
    if "prototype" in branches and len(head.proxies):
        spread = mean_exponential(SCALE, head.proxies.shape[1])
        cost += images * sum(points) * len(head.proxies) * PRIOR * spread / normaliser - math.log(PRIOR)
    return cost


def mean_exponential(scale: float, dims: int) -> float:
    """Mean of exp(scale cos) over two random directions in `dims` dimensions: 0F1(; dims / 2; scale^2 / 4), the
    normaliser of von Mises and Fisher (Mardia & Jupp 2000). e^(scale^2 / 2 / dims) where dims is large.
    """
    term = total = 1.0
    for k in itertools.count():
        term *= scale**2 / 4 / (k + 1) / (dims / 2 + k)
        total += term
        if term < 1e-9 * total:
            return total
