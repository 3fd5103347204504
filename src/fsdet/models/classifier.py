# SPDX-License-Identifier: AGPL-3.0-or-later
"""An image classifier: torchvision's residual trunk, and a small head that pools with or without attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

TRUNKS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
SMALL = 0.01  # standard deviation of the last layer: logits start near 0, where no class is preferred


class Trunk(ResNet):
    """torchvision's ResNet without its classifier, its stages as wide as `width` says; parameters keep their names."""

    def __init__(self, name: str, width: float = 1.0) -> None:
        self._width = width
        block, layers = TRUNKS[name]
        super().__init__(block, list(layers), num_classes=1)
        self.channels = self.inplanes
        self.fc = nn.Identity()

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, max(8, round(planes * self._width)), *args, **options)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, H / 32, W / 32]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Attention(nn.Module):
    """One weight a place, a softmax over all of them: where to look, learnt with the rest. Uniform at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Conv2d(channels, max(8, channels // 8), 1), nn.Tanh(),
                                   nn.Conv2d(max(8, channels // 8), 1, 1))  # fmt: skip
        nn.init.zeros_(self.score[-1].weight)
        nn.init.zeros_(self.score[-1].bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C]; the softmax is taken in float32."""
        weight = self.score(features).float().flatten(2).softmax(-1)
        return (features.float().flatten(2) * weight).sum(-1)


class Average(nn.Module):
    """The mean over all places."""

    def forward(self, features: Tensor) -> Tensor:
        return features.float().mean((2, 3))


class ImageClassifier(nn.Module):
    """Logits of whole images: one column for two classes, else a column a class, each against the others.

    spec: backbone, width, head, dropout, columns; plain values, stored in checkpoints.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.backbone = Trunk(spec["backbone"], spec["width"])
        self.attention = Attention(self.backbone.channels) if spec["head"] == "attention" else Average()
        self.classifier = nn.Sequential(nn.Dropout(spec["dropout"]), nn.Linear(self.backbone.channels, spec["columns"]))
        nn.init.normal_(self.classifier[1].weight, std=SMALL)
        nn.init.zeros_(self.classifier[1].bias)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1))

    def pooled(self, images: Tensor) -> Tensor:
        """RGB in [0, 1], [B, 3, H, W] -> [B, C] float32."""
        return self.attention(self.backbone((images - self.mean) / self.std))

    def forward(self, images: Tensor) -> Tensor:
        """RGB in [0, 1], [B, 3, H, W] -> [B, columns] logits."""
        return self.classifier(self.pooled(images))

    def groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        """Parameters by part: backbone, attention (empty where the head has none), classifier."""
        named = list(self.named_parameters())
        return {part: [(n, p) for n, p in named if n.startswith(f"{part}.")]
                for part in ("backbone", "attention", "classifier")}  # fmt: skip
