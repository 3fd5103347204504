# SPDX-License-Identifier: AGPL-3.0-or-later
"""The prototype bank keeps every shot, knows its model, and refuses what is not its own."""

from dataclasses import replace

import pytest
import torch

from banks import bank, full, rows
from fsdet.bank import PrototypeBank
from fsdet.errors import CheckpointError, ShapeError, UserError


def test_prototypes_are_renormalised_means_of_ragged_shots():
    p = bank().prototypes()
    torch.testing.assert_close(p[0], rows(1, 0)[0])
    mean = rows(5, 1).double().mean(0)
    torch.testing.assert_close(p[1].double(), mean / mean.norm(), atol=1e-6, rtol=0)


def test_merging_keeps_all_shots_of_a_class_that_both_have():
    merged = bank().merge(PrototypeBank(("cup", "hat"), (rows(2, 3), rows(1, 4)), "m1"))
    assert merged.names == ("cup", "ключ", "hat") and [len(t) for t in merged.instances] == [3, 5, 1]


def test_a_bank_of_other_weights_is_refused():
    with pytest.raises(CheckpointError, match="other weights"):
        bank().merge(bank("m2"))
    with pytest.raises(CheckpointError, match="register the classes again"):
        bank().check_model("m2", "b.safetensors")


def test_removing_an_unknown_class_suggests_the_close_one():
    assert bank().remove("cup").names == ("ключ",)
    with pytest.raises(UserError, match="Did you mean 'cup'"):
        bank().remove("cups")


def test_errors_of_a_bank_name_its_file_also_after_a_change(tmp_path):
    one, two = (PrototypeBank.load(b.save(tmp_path / f"{b.model_sha256}.bank")) for b in (bank("m1"), bank("m2")))
    for call in (
        lambda: two.check_model("m1", "bank"),
        lambda: one.merge(two),
        lambda: two.remove("cup").remove("cup"),
        lambda: two.rename("cup", "ключ"),
        lambda: two.drop("cup", [0]),
        lambda: two.drop("ключ", [0]).drop("ключ", [7]),
        lambda: two.rename("cup", "mug").remove("cup"),
    ):
        with pytest.raises(UserError, match=rf"^{tmp_path}/m2\.bank: expected "):
            call()


@pytest.mark.parametrize(("names", "instances"), [(("a",), ()), (("a", "a"), (rows(1, 0), rows(1, 0))),
                                                  (("a",), (rows(1, 0)[:0],))])  # fmt: skip
def test_a_bank_is_checked_at_birth(names, instances):
    with pytest.raises(ShapeError):
        PrototypeBank(names, instances, "m")


def test_an_empty_bank_has_no_prototypes():
    assert PrototypeBank((), (), "m").prototypes().numel() == 0


def test_a_class_is_told_in_a_line():
    cup, key = full().describe()
    assert cup == "cup: 2 instances, 3 of what is beside them; threshold 0.375 (2 shots by the others)"
    assert key == "ключ: 5 instances, 0 of what is beside them; threshold none"


def test_merging_shifts_the_shots_of_negatives_and_keeps_the_larger_threshold():
    other = PrototypeBank(("cup",), (rows(1, 5),), "m1", (rows(2, 6),), (torch.tensor([0, 0]),), (0.5,), ("x",))
    cup = full().merge(other)
    assert cup.negative_shots[0].tolist() == [0, 1, 1, 2, 2] and len(cup.instances[0]) == 3
    assert cup.thresholds == (0.5, None) and cup.calibrated[0] == "larger of two registrations"
    assert cup.remove("cup").thresholds == (None,)


def test_a_proposal_replaces_that_of_its_class_alone():
    proposed = full().proposed({"ключ": (0.2, "5 shots")})
    assert proposed.thresholds == (0.375, 0.2) and proposed.calibrated == ("2 shots by the others", "5 shots")


@pytest.mark.parametrize("wrong", [{"thresholds": (1.5, None)}, {"thresholds": (0.5,)}, {"negatives": (rows(1, 0),)},
                                   {"negative_shots": (torch.tensor([0, 1, 2]), torch.zeros(0).long())}])  # fmt: skip
def test_what_belongs_to_no_shot_or_class_is_refused(wrong):
    with pytest.raises(ShapeError, match="threshold in"):
        replace(full(), **wrong)


def test_a_class_takes_another_name_that_nobody_has():
    renamed = bank().rename("cup", "mug")
    assert renamed.names == ("mug", "ключ") and torch.equal(renamed.instances[0], bank().instances[0])
    with pytest.raises(UserError, match="a name that no class has, got 'ключ'"):
        bank().rename("cup", "ключ")
    with pytest.raises(UserError, match="Did you mean 'cup'"):
        bank().rename("cups", "mug")


def test_shots_that_both_banks_hold_are_kept_once_with_what_is_beside_them():
    """By marks where both have one, however they were read; else by rows that are equal but for their last digits."""
    other = PrototypeBank(("ключ",), (torch.cat((rows(5, 1)[3:4] + 1e-7, rows(2, 9))),), "m1", (rows(3, 7),),
                          (torch.tensor([0, 1, 2]),))  # fmt: skip
    assert bank().shared(other) == {"ключ": {0: 3}}
    merged = bank().merge(other)
    assert torch.equal(merged.instances[1], torch.cat((rows(5, 1), rows(2, 9))))
    assert torch.equal(merged.negatives[1], rows(3, 7)[1:]) and merged.negative_shots[1].tolist() == [5, 6]
    again = merged.merge(other).merge(merged)
    assert [len(t) for t in again.instances] == [1, 7] and torch.equal(again.negatives[1], merged.negatives[1])
    marked = PrototypeBank(("cup",), (rows(3, 2),), "m1", marks=(("a", "b", ""),))
    views = PrototypeBank(("cup",), (torch.cat((rows(3, 5), rows(3, 2)[2:], rows(3, 2)[:1])),), "m1",
                          marks=(("b", "a", "c", "", "d"),))  # fmt: skip
    assert marked.shared(views) == {"cup": {0: 1, 1: 0, 3: 2}}, "d has the row of a, and is another shot"
    assert marked.merge(views).marks == (("a", "b", "", "c", "d"),)


def test_rows_that_are_nearly_equal_are_one_shot_if_their_files_have_one_name():
    """1e-5 off in one of eight: more than rounding, less than two photographs are apart."""
    near, far = (rows(1, 2) + torch.eye(8)[:1] * by for by in (1e-5, 0.01))
    one = PrototypeBank(("cup",), (rows(1, 2),), "m1", sources=(("a.jpg",),))
    for row, file, count in ((near, "a.jpg", 1), (near, "b.jpg", 2), (near, "", 2), (far, "a.jpg", 2)):
        assert len(one.add("cup", row, [file]).instances[0]) == count


def test_a_merge_that_brings_no_shot_leaves_the_threshold_as_it_was():
    same = replace(full(), thresholds=(0.9, 0.3), calibrated=("of another day", "5 shots"))
    merged = full().merge(same)
    assert merged.thresholds == (0.375, 0.3) and merged.calibrated == ("2 shots by the others", "5 shots")
    assert [len(t) for t in merged.instances] == [2, 5] and [len(t) for t in merged.negatives] == [3, 0]


def test_marks_stay_with_their_shots():
    one = PrototypeBank(("cup",), (rows(3, 2),), "m1", marks=(("a", "b", "c"),))
    assert one.drop("cup", [1]).marks == (("a", "c"),)
    assert one.drop("cup", [1]).add("cup", rows(3, 2)[1:2], marks=["b"]).marks == (("a", "c", "b"),)


def test_single_shots_are_dropped_with_what_is_beside_them():
    """The others keep their order; negatives follow their own shot, however those are numbered then."""
    beside, owner = rows(6, 7), torch.tensor([0, 4, 1, 3, 3, 2])
    whole = replace(bank(), negatives=(rows(1, 0)[:0], beside), negative_shots=(owner[:0], owner),
                    thresholds=(None, 0.4), calibrated=("", "5 shots"))  # fmt: skip
    left = whole.drop("ключ", [1, 3, 1])
    assert torch.equal(left.instances[1], rows(5, 1)[[0, 2, 4]])
    assert torch.equal(left.negatives[1], beside[[0, 1, 5]]) and left.negative_shots[1].tolist() == [0, 2, 1]
    assert left.thresholds == (None, 0.4) and left.calibrated[1] == "5 shots; before shots were dropped"
    assert torch.equal(left.instances[0], bank().instances[0]) and len(whole.instances[1]) == 5
    kept = "a shot of 'ключ' that stays, got all 5"
    for shots, told in (([5], "shots 1 to 5 of 'ключ', got 6"), ([-1], "got 0"), (range(5), kept)):
        with pytest.raises(UserError, match=told):
            whole.drop("ключ", shots)


def test_a_single_shot_is_told_as_one():
    for shots, told in (([1], "shot 1, the only one, of 'cup', got 2"), ([0], "that stays, got its only one")):
        with pytest.raises(UserError, match=told):
            bank().drop("cup", shots)
