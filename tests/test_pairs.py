# SPDX-License-Identifier: AGPL-3.0-or-later
"""Rows of the pairwise losses: balanced over classes, confident background; several processes choose what one would."""

import torch

from fsdet.pairs import PairRows, background, balanced, pooled
from fsdet.peers import Peers


def by_turns(label, weight, rows):
    """Classes in order take turns, each giving its heaviest row that is left, the earlier of equals."""
    own = {c: sorted((i for i, x in enumerate(label) if x == c), key=lambda i: -weight[i]) for c in sorted(set(label))}
    turns = [of[turn] for turn in range(len(label)) for c, of in own.items() if c >= 0 and turn < len(of)]
    return turns[:rows]


def test_classes_take_turns_and_unlabelled_rows_none():
    g = torch.Generator().manual_seed(0)
    for rows in (0, 1, 7, 100):
        label = torch.randint(-1, 5, (40,), generator=g)
        weight = torch.randint(0, 6, (40,), generator=g) / 5  # some are equal
        assert balanced(label, weight, rows).tolist() == by_turns(label.tolist(), weight.tolist(), rows)
    assert balanced(torch.full((3,), -1), torch.ones(3), 5).tolist() == []


def test_background_is_the_most_confident_first_and_never_what_is_ruled_out():
    score = torch.tensor([[0.1, -torch.inf, 3.0], [2.0, -torch.inf, -1.0]])
    assert [where.tolist() for where in background(score, 3)] == [[0, 1, 0], [2, 0, 0]]
    image, anchor = background(score, 9)
    assert len(image) == 4 and score[image, anchor].isfinite().all()


class Beside(Peers):
    """Process 1 of two, whose peer has said its blocks beforehand."""

    def __init__(self, *theirs):
        super().__init__(1, 2)
        self.theirs = theirs

    def rows(self, *blocks):
        return [(torch.cat((t, b)), slice(len(t), None)) for t, b in zip(self.theirs, blocks, strict=True)]


def drawn(image, label, seed):
    g = torch.Generator().manual_seed(seed)
    n = len(label)
    z, p, back_z, back_p = (torch.randn(k, d, generator=g, requires_grad=True) for k in (n, 4) for d in (5, 3))
    iou = torch.rand(n, generator=g)
    return PairRows(torch.tensor(image), torch.tensor(label), iou, z, p, back_z, back_p)


def blocks(own, weight, score):
    """What a process hands to its peers."""
    facts = torch.stack([v.float() for v in (own.image, own.label, own.iou, weight)], 1)
    return torch.cat((own.z, own.p, facts), 1).detach(), torch.cat((own.back_z, own.back_p, score[:, None]), 1).detach()


def test_two_processes_choose_what_one_with_all_rows_would_and_train_their_own():
    theirs, own = drawn([0, 0, 1], [3, 3, 8], 1), drawn([0, 1], [3, 5], 2)
    weights, scores = (torch.tensor([0.9, 0.2, 0.5]), torch.tensor([0.8, 0.4])), torch.rand(2, 4)
    found = pooled(own, weights[1], scores[1], 7, Beside(*blocks(theirs, weights[0], scores[0])))
    chosen = balanced(torch.cat((theirs.label, own.label)), torch.cat(weights), 6)
    both = {name: torch.cat((getattr(theirs, name), getattr(own, name))) for name in ("label", "iou", "z", "p")}
    for name, values in both.items():
        torch.testing.assert_close(getattr(found, name), values[chosen])
    best = scores.flatten().argmax()
    torch.testing.assert_close(found.back_z, torch.cat((theirs.back_z, own.back_z))[best][None])
    assert found.image.tolist() == [[-1, -1, -1, 0, 1][k] for k in chosen], "-1: an image of the other process"
    found.z.sum().backward()
    assert own.z.grad is not None and theirs.z.grad is None
