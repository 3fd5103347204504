# SPDX-License-Identifier: AGPL-3.0-or-later
"""Batches say what is not finite in them, move whole, and come back from an incident's file."""

from dataclasses import replace

import pytest
import torch

from fsdet.data.batch import ImageBatch, InstanceBatch
from fsdet.engine.guard import plain
from fsdet.errors import ShapeError
from fsdet.types import as_looked_at

NAN = float("nan")


def whole():
    return ImageBatch(7, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), ("a", "b"))


def instances(**changes):
    values = dict(index=7, images=torch.rand(2, 3, 8, 8), image_ids=("a", "b"),
                  labels=(torch.tensor([1]), torch.zeros(0, dtype=torch.int64)),
                  boxes=(torch.tensor([[0.0, 0, 4, 4]]), torch.zeros(0, 4)),
                  masks=(torch.ones(1, 8, 8, dtype=torch.uint8), torch.zeros(0, 8, 8, dtype=torch.uint8)))  # fmt: skip
    return InstanceBatch(**{**values, **changes})


@pytest.mark.parametrize("make", [whole, instances])
def test_a_bad_pixel_is_found_and_its_image_named(make):
    assert make().finite() and make().unsound() == ()
    batch = make()
    batch.images[1, 0, 3, 3] = NAN
    assert not batch.finite() and batch.unsound() == ("b",)


def test_a_bad_box_is_found_too():
    batch = instances(boxes=(torch.tensor([[0.0, 0, NAN, 4]]), torch.zeros(0, 4)))
    assert not batch.finite() and batch.unsound() == ("a",)


@pytest.mark.parametrize("make", [whole, instances])
def test_a_batch_comes_back_from_plain_values(make, tmp_path):
    batch = make()
    torch.save(plain(batch), tmp_path / "batch.pt")
    again = type(batch).restored(torch.load(tmp_path / "batch.pt", weights_only=True))
    assert type(again) is type(batch) and again.image_ids == ("a", "b") and again.index == 7
    assert torch.equal(again.images, batch.images) and len(again.labels) == 2


def test_a_batch_moves_with_everything_in_it():
    moved = instances().to(torch.device("meta"))
    assert {t.device.type for t in (moved.images, *moved.boxes, *moved.masks, *moved.labels)} == {"meta"}


def test_counts_that_differ_are_refused():
    with pytest.raises(ShapeError, match="2 labels, 1 ids"):
        ImageBatch(0, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), ("a",))


@pytest.mark.parametrize("make", [whole, instances])
def test_halves_hold_the_images_once_with_all_that_is_theirs(make):
    batch = make()
    first, second = batch.halves()
    assert (first.image_ids, second.image_ids) == (("a",), ("b",)) and first.index == 7
    assert torch.equal(torch.cat([first.images, second.images]), batch.images)
    assert [len(part.labels) for part in (first, second)] == [1, 1]
    if make is instances:
        assert torch.equal(first.masks[0], batch.masks[0]) and second.boxes[0].shape == (0, 4)
    with pytest.raises(ShapeError, match="2 images or more"):
        first.halves()


def test_a_copy_that_was_looked_at_already_is_not_looked_at_again():
    """Pinning makes a copy; the worker's answer goes with it."""
    batch = whole()
    assert batch.finite()
    poisoned = replace(batch, images=torch.full_like(batch.images, torch.nan))
    assert as_looked_at(batch, poisoned).finite() and not replace(poisoned).finite()
