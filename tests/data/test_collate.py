# SPDX-License-Identifier: AGPL-3.0-or-later
"""Collation: padding, the labels of both branches, what is known, and the host's check of the boxes."""

import numpy as np
import pytest
import torch

from fsdet.data.collate import collate, targets_of, to_tensor
from fsdet.data.transforms import Sample
from fsdet.errors import DataError
from fsdet.types import BACKGROUND, IGNORED


def sample(labels, known=None, size=8):
    boxes = np.tile(np.array([[1, 1, 5, 5]], np.float32), (len(labels), 1))
    return Sample(np.zeros((size, size, 3), np.uint8), boxes.reshape(-1, 4), np.array(labels, np.int64), known)


def test_each_branch_gets_its_own_label():
    t = targets_of([sample([0, 2, 7])], num_base=5, class_ids=(2, 7), image_ids=["a"])
    assert t.base_labels.tolist() == [[0, 2, BACKGROUND]]
    assert t.way_labels.tolist() == [[BACKGROUND, 0, 1]]
    assert t.valid.all() and t.base_known.all() and t.way_known.all()


def test_images_are_padded_to_the_longest_and_to_one_row_at_least():
    t = targets_of([sample([]), sample([1, 1])], 3, (), ["a", "b"])
    assert t.boxes.shape == (2, 2, 4) and t.valid.tolist() == [[False, False], [True, True]]
    assert t.base_labels[0].tolist() == [IGNORED, IGNORED]
    alone = targets_of([sample([])], 3, (), ["a"])
    assert alone.boxes.shape == (1, 1, 4) and not alone.valid.any() and alone.way_known.shape == (1, 0)


def test_classes_not_exhaustively_labelled_are_unknown():
    t = targets_of([sample([0], known=frozenset({0, 4}))], 3, (4, 5), ["a"])
    assert t.base_known.tolist() == [[True, False, False]] and t.way_known.tolist() == [[True, False]]


def test_a_box_that_is_not_finite_names_its_image():
    bad = sample([0, 1])
    bad.boxes[1, 2] = np.nan
    with pytest.raises(DataError, match=r"photo\.jpg.*NaN"):
        targets_of([bad], 3, (), ["photo.jpg"])


def test_pixels_become_rgb_floats_in_channels_last_memory():
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 1] = (255, 51, 0)
    x = to_tensor([image], 4)
    torch.testing.assert_close(x[0, :, 0, 1], torch.tensor([1.0, 0.2, 0.0]))
    assert x.is_contiguous(memory_format=torch.channels_last) and to_tensor([], 4).shape == (0, 3, 4, 4)


def test_an_episode_with_ragged_support_and_one_with_none():
    window = (np.zeros((16, 16, 3), np.uint8), np.array([1, 2, 9, 9], np.float32))
    e = collate(3, [sample([0])], ["a"], 2, 8, [window] * 3, [0, 1, 1], (4, 5), 16)
    assert e.support.shape == (3, 3, 16, 16) and e.support_way.tolist() == [0, 1, 1] and e.ways == 2
    none = collate(3, [sample([0])], ["a"], 2, 8)
    assert none.ways == 0 and none.support.shape[0] == 0 and none.support_boxes.shape == (0, 4)
