# SPDX-License-Identifier: AGPL-3.0-or-later
"""Figures of a classifier: accuracy, F1, area under the ROC curve, confusion matrix."""

from collections.abc import Mapping

import numpy as np

from fsdet.errors import FsdetError, ShapeError, explain


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a random positive scores above a random negative, ties counting one half (Mann and Whitney).

    scores [n]; positive [n] bool. nan unless there are both. Raises FsdetError for a score that is no number.
    """
    if np.isnan(scores).any():
        raise FsdetError(explain("scores that are numbers", "nan", "auc", "check the weights that made them"))
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[inverse]  # from 1; equal scores share their mean rank
    return float((rank[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def confusion(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """[C, C] int64 counts, row = predicted, column = true."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (predicted, true), 1)
    return matrix


def f1(matrix: np.ndarray) -> np.ndarray:
    """[C] harmonic mean of precision and recall of each class; nan where a class neither occurs nor is predicted."""
    found, said, there = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):
        return 2 * found / (said + there)


def figures(scores: np.ndarray, true: np.ndarray, positive: int = 1) -> tuple[Mapping[str, float], np.ndarray]:
    """({accuracy, f1, auc}, confusion matrix) of scores [n, C] against classes [n]; the largest score is the answer.

    Of two classes f1 and auc are those of class `positive`; of more they are means over the classes that occur.
    Raises:
        ShapeError: unless there is a row of scores for each of at least one image.
    """
    if scores.ndim != 2 or not len(scores) == len(true) > 0:
        raise ShapeError(f"figures expects scores [n, C] and classes [n], got {scores.shape} and {true.shape}")
    classes = scores.shape[1]
    matrix = confusion(scores.argmax(1), true, classes)
    harmonic = f1(matrix)
    if classes == 2:
        one, area = float(harmonic[positive]), auc(scores[:, positive], true == positive)
    else:
        there = np.flatnonzero(matrix.sum(0))
        one = float(harmonic[there].mean())
        areas = np.array([auc(scores[:, c], true == c) for c in there])
        area = float(areas[~np.isnan(areas)].mean()) if not np.isnan(areas).all() else float("nan")
    return {"accuracy": float(np.diag(matrix).sum() / len(true)), "f1": one, "auc": area}, matrix
