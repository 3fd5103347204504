# SPDX-License-Identifier: AGPL-3.0-or-later
"""Figures of a classifier against their definitions, counted one pair at a time."""

import math

import numpy as np
import pytest

from fsdet.errors import FsdetError, ShapeError
from fsdet.evaluation.classification import auc, confusion, f1, figures


def by_pairs(scores, positive):
    """The share of (positive, negative) pairs in the right order, ties counting one half."""
    pairs = [(a, b) for a in scores[positive] for b in scores[~positive]]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_chance_of_the_right_order(seed):
    rng = np.random.default_rng(seed)
    positive = rng.random(40) < 0.3
    scores = np.round(rng.random(40) + 0.3 * positive, 1)  # many ties
    assert auc(scores, positive) == pytest.approx(by_pairs(scores, positive), abs=1e-12)


def test_auc_at_its_ends():
    ones = np.array([True, True, False])
    assert auc(np.array([2.0, 3.0, 1.0]), ones) == 1 and auc(np.array([1.0, 0.0, 2.0]), ones) == 0
    assert auc(np.ones(3), ones) == 0.5
    assert math.isnan(auc(np.ones(3), np.ones(3, bool)))
    with pytest.raises(FsdetError, match="scores that are numbers"):
        auc(np.array([1.0, np.nan, 0.0]), ones)


def test_two_classes_are_judged_by_the_positive_one():
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    true = np.array([0, 0, 1, 1])
    found, matrix = figures(scores, true, positive=1)
    assert matrix.tolist() == [[1, 0], [1, 2]], "row predicted, column true"
    assert found["accuracy"] == 0.75 and found["f1"] == pytest.approx(2 * (2 / 3) / (1 + 2 / 3))
    assert found["auc"] == by_pairs(scores[:, 1], true == 1) == 0.5
    other, _ = figures(scores, true, positive=0)
    assert other["f1"] == pytest.approx(2 / 3) and other["auc"] == 0.5


def test_more_classes_are_means_over_those_that_occur():
    rng = np.random.default_rng(0)
    scores, true = rng.random((60, 4)), rng.integers(0, 3, 60)  # the fourth never occurs
    found, matrix = figures(scores, true)
    said = scores.argmax(1)
    f = [2 * ((said == c) & (true == c)).sum() / ((said == c).sum() + (true == c).sum()) for c in range(3)]
    assert found["f1"] == pytest.approx(np.mean(f))
    assert found["auc"] == pytest.approx(np.mean([by_pairs(scores[:, c], true == c) for c in range(3)]))
    assert matrix.sum() == 60 and matrix[:, 3].sum() == 0


def test_a_class_that_nobody_has_or_names_has_no_f1():
    assert np.isnan(f1(confusion(np.array([0]), np.array([0]), 2))).tolist() == [False, True]


@pytest.mark.parametrize(("scores", "true"), [(np.zeros((0, 2)), np.zeros(0, int)), (np.zeros(3), np.zeros(3, int))])
def test_no_image_and_no_columns_are_refused(scores, true):
    with pytest.raises(ShapeError, match="figures expects"):
        figures(scores, true)
