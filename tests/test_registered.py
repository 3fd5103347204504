# SPDX-License-Identifier: AGPL-3.0-or-later
"""A registered class: which shots stay and which are one, whose threshold holds; a name is text on one line."""

from dataclasses import replace

import pytest
import torch

from fsdet.errors import UserError
from fsdet.registered import RegisteredClass, class_name, noted


def shots(*owners: int, seed: int = 0, threshold: float | None = None, calibrated: str = "") -> RegisteredClass:
    """Three shots a, b and c on axes of their own; a negative for each owner, whose first value is its place."""
    rows = torch.eye(8)[seed : seed + 3]
    beside = torch.zeros(len(owners), 8)
    beside[:, 0] = torch.arange(len(owners))
    return RegisteredClass(rows, beside, torch.tensor(owners, dtype=torch.int64), threshold, calibrated,
                      ("a.jpg", "b.jpg", "c.jpg"), tuple(f"{seed}{letter}" for letter in "abc"))  # fmt: skip


def test_what_is_kept_is_in_the_order_asked_for_with_what_is_beside_it():
    left = shots(0, 2, 1, 2).kept([2, 0])
    assert left.marks == ("0c", "0a") and left.sources == ("c.jpg", "a.jpg")
    assert torch.equal(left.instances, torch.eye(8)[[2, 0]])
    assert left.negatives[:, 0].tolist() == [0, 1, 3] and left.negative_shots.tolist() == [1, 0, 0]
    none = left.kept([])
    assert len(none) == 0 and none.negatives.shape == (0, 8)


def test_joining_adds_the_shots_that_are_new():
    both = shots(0).joined(replace(shots(0, 1, 2, seed=1), marks=("0b", "x", "y")))
    assert both.marks == ("0a", "0b", "0c", "x", "y"), "b by its mark; the row of 0c is another shot, as its mark says"
    assert both.negative_shots.tolist() == [0, 3, 4] and len(both.instances) == 5


@pytest.mark.parametrize(
    ("mine", "theirs", "kept"),
    [
        ((None, ""), (None, ""), (None, "")),
        ((0.3, "3 shots"), (0.4, "of another day"), (0.4, "larger of two registrations")),
        ((0.4, "3 shots"), (0.3, "of another day"), (0.4, "larger of two registrations")),
        ((0.3, "3 shots"), (None, ""), (0.3, "3 shots; without shots that came later")),
        ((None, ""), (0.3, "3 shots"), (0.3, "3 shots; without shots that came later")),
    ],
)
def test_the_larger_threshold_holds_and_says_so_only_if_there_were_two(mine, theirs, kept):
    joined = shots().judged(*mine).joined(shots(seed=4).judged(*theirs))
    assert (joined.threshold, joined.calibrated) == kept
    again = joined.joined(shots(seed=4))
    assert (again.threshold, again.calibrated) == kept, "no shot was new"


def test_a_note_is_made_once_and_on_nothing_not_at_all():
    assert noted(noted("5 shots", "late"), "late") == "5 shots; late"
    assert noted("", "late") == ""


@pytest.mark.parametrize("text", ["", "  ", "a\nb", "a\x00", "\u202ea"])
def test_a_name_that_cannot_be_printed_on_one_line_is_refused(text):
    with pytest.raises(UserError, match="a class name of characters that can be printed"):
        class_name(text)


def test_two_spellings_of_an_umlaut_are_one_name():
    assert class_name(" Tu\u0308r ") == class_name("T\u00fcr") == "T\u00fcr"
