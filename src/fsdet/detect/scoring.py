# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which column of which branch speaks for which class, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdet.detect.postprocess import PROTOTYPE, STANDARD
from fsdet.models.detector import DualDetector
from fsdet.models.heads import Dense, unit


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What to look for. standard: classes read from the standard branch, as its columns; labels they get.

    prototypes: [N, D] unit rows with `prototype_labels` [N]; `proxies`: learnt prototypes read as classes, as rows of
    the model's proxies, with their labels.
    """

    standard: tuple[int, ...] = ()
    standard_labels: tuple[int, ...] = ()
    prototypes: Tensor | None = None
    prototype_labels: tuple[int, ...] = ()
    proxies: tuple[int, ...] = ()
    proxy_labels: tuple[int, ...] = ()

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(branch [T] uint8, labels [T] int64) of the score columns."""
        learnt = len(self.prototype_labels) + len(self.proxy_labels)
        branch = [STANDARD] * len(self.standard) + [PROTOTYPE] * learnt
        labels = [*self.standard_labels, *self.prototype_labels, *self.proxy_labels]
        return (torch.tensor(branch, dtype=torch.uint8, device=device),
                torch.tensor(labels, dtype=torch.int64, device=device))  # fmt: skip


def class_scores(model: DualDetector, dense: Dense, words: Vocabulary) -> Tensor:
    """[B, A, T] scores in [0, 1] in the order of `Vocabulary.columns`.

    A standard column scores its sigmoid. A column of the prototype branch scores its sigmoid times its share in a
    softmax over all columns: what a base class explains better is no find of a new class (docs/notebook.md).
    """
    own = dense.standard[..., list(words.standard)]
    rows = []
    if words.prototypes is not None and len(words.prototypes):
        rows.append(words.prototypes)
    if words.proxies:
        rows.append(unit(model.head.proxies[list(words.proxies)]))
    if not rows:
        return own.sigmoid()
    logits = model.head.similarity_logits(dense.embeddings, torch.cat(rows))
    share = torch.cat((own, logits), -1).softmax(-1)[..., own.shape[-1] :]
    return torch.cat((own.sigmoid(), logits.sigmoid() * share), -1)


def own_classes(classes: Sequence[int], base: int, mode: str = "dual") -> Vocabulary:
    """The model's own classes, by their numbers: base ones (below `base`) from the standard branch, novel ones that
    stage 3 added from their proxies; a model in prototype mode has never trained its standard branch, so all from
    proxies."""
    standard = tuple(c for c in classes if c < base and mode != "prototype")
    proxies = tuple(c for c in classes if c not in standard)
    return Vocabulary(standard, standard, proxies=proxies, proxy_labels=proxies)
