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
| BatchNorm            | eps 1e-3, momentum .03         | as the trunk's                                               |
"""

import math

import torch
from torch import nn

from fsdet.models.backbone import NORM_EPS, NORM_MOMENTUM
from fsdet.models.heads import DualHead

PRIOR = 0.001
SCALE = 10.0


def initialise_head(head: DualHead, strides: tuple[int, ...]) -> None:
    """Apply the table above in place; random parts draw from torch's global generator."""
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = NORM_EPS, NORM_MOMENTUM
    for box, standard, stride in zip(head.box, head.standard, strides, strict=True):
        nn.init.constant_(box[-1].bias, 1.0)
        nn.init.normal_(standard.weight, std=0.01)
        nn.init.constant_(standard.bias, math.log(5 / max(head.classes, 1) / (640 / stride) ** 2))
    with torch.no_grad():
        if len(head.proxies):
            head.proxies.copy_(nn.functional.normalize(torch.randn_like(head.proxies), dim=-1))
        head.log_scale.fill_(math.log(SCALE))
        head.bias.fill_(-math.log((1 - PRIOR) / PRIOR))
