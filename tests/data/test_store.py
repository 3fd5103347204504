# SPDX-License-Identifier: AGPL-3.0-or-later
"""An instance is the box that was asked for, whatever boxes beside it are left out."""

import pytest

from dataset_files import image
from fsdet.data.store import ImageStore
from fsdet.types import ImageRecord

BOXES = [[0, 0, 8, 8], [8, 0, 20, 8], [0, 8, 8, 30], [4, 4, 28, 28]]


@pytest.fixture
def store(tmp_path):
    path = image(tmp_path / "a.jpg", (32, 32))
    return ImageStore([ImageRecord(path, (32, 32), BOXES, [0, 1, 2, 3], [True, False, True, False])], 64)


def test_a_sample_has_no_crowd_boxes_and_is_scaled(store):
    sample = store.sample(0)
    assert sample.labels.tolist() == [1, 3] and sample.boxes.tolist() == [[16, 0, 40, 16], [8, 8, 56, 56]]


@pytest.mark.parametrize("box", range(4))
def test_an_instance_is_found_among_the_boxes_that_are_kept(store, box):
    sample, index = store.instance(0, box)
    assert sample.boxes[index].tolist() == [2 * v for v in BOXES[box]] and sample.labels[index] == box
    assert store.sample(0).labels.tolist() == [1, 3]
