# SPDX-License-Identifier: AGPL-3.0-or-later
"""Scores of both branches: a standard column is a sigmoid, a prototype column also has to win against all others."""

import math

import pytest
import torch

from fsdet.detect.scoring import Vocabulary, class_scores, own_classes
from fsdet.models.build import build_model, model_spec
from fsdet.models.heads import Dense, unit

D = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(model_spec("yolov8n", "P3-P5", 3, D, 16, "anchors", True, 3)).eval()


def dense_of(standard, embeddings):
    points = torch.zeros(len(standard), 2)
    return Dense(points, torch.ones(len(standard)), torch.zeros(1, len(standard), 4, 16),
                 torch.zeros(1, len(standard), 4), unit(embeddings)[None], standard[None])  # fmt: skip


def by_hand(model, dense, words):
    """One point and one column at a time, in float64."""
    scale, bias = float(model.head.log_scale.exp().detach()), float(model.head.bias.detach())
    rows = [*words.prototypes.double().tolist()] if words.prototypes is not None else []
    rows += [unit(model.head.proxies[i]).detach().double().tolist() for i in words.proxies]
    out = []
    for z, logits in zip(dense.embeddings[0].double().tolist(), dense.standard[0].double().tolist(), strict=True):
        own = [logits[c] for c in words.standard]
        learnt = [scale * sum(a * b for a, b in zip(z, row, strict=True)) + bias for row in rows]
        whole = sum(math.exp(v) for v in own + learnt)
        out.append([1 / (1 + math.exp(-v)) for v in own]
                   + [math.exp(v) / whole / (1 + math.exp(-v)) for v in learnt])  # fmt: skip
    return torch.tensor(out, dtype=torch.float64)[None]


@pytest.mark.parametrize("own", [(), (0, 2), (0, 1, 2)])
def test_scores_are_the_definition(model, own):
    torch.manual_seed(1)
    dense = dense_of(3 * torch.randn(5, 3), torch.randn(5, D))
    prototypes = torch.nn.functional.normalize(torch.randn(2, D), dim=-1)
    words = Vocabulary(own, own, prototypes, (3, 4), proxies=(1,), proxy_labels=(1,))
    torch.testing.assert_close(class_scores(model, dense, words).double(), by_hand(model, dense, words),
                               rtol=1e-5, atol=1e-7)  # fmt: skip


def test_what_a_base_class_explains_better_is_no_find_of_a_new_one(model):
    z = torch.nn.functional.normalize(torch.randn(1, D), dim=-1)
    words = Vocabulary((0,), (0,), z, (3,))
    sure, doubtful = (
        class_scores(model, dense_of(torch.tensor([[v, -20.0, -20.0]]), z), words)[0, 0] for v in (20.0, -20.0)
    )
    assert sure[1] < 0.001 * doubtful[1] and sure[0] > 0.999


def test_without_prototypes_scores_are_sigmoids_and_without_anything_empty(model):
    dense = dense_of(torch.tensor([[0.0, -50.0, 50.0]]), torch.ones(1, D))
    assert class_scores(model, dense, own_classes((0, 1, 2), 3))[0, 0].tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert class_scores(model, dense, Vocabulary()).shape == (1, 1, 0)


def test_no_logit_is_too_large(model):
    dense = dense_of(torch.tensor([[1e4, -1e4, 0.0]]), torch.ones(1, D))
    words = Vocabulary((0, 1, 2), (0, 1, 2), unit(torch.ones(1, D)), (3,))
    assert class_scores(model, dense, words).isfinite().all()
