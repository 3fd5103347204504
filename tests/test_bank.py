# SPDX-License-Identifier: AGPL-3.0-or-later
"""The prototype bank keeps every shot, knows its model, and refuses what is not its own."""

import pytest
import torch

from fsdet.bank import PrototypeBank
from fsdet.errors import CheckpointError, ShapeError, UserError


def rows(n, seed):
    return torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def bank(model="m1"):
    return PrototypeBank(("cup", "ключ"), (rows(1, 0), rows(5, 1)), model)


def test_prototypes_are_renormalised_means_of_ragged_shots():
    p = bank().prototypes()
    torch.testing.assert_close(p[0], rows(1, 0)[0])
    mean = rows(5, 1).double().mean(0)
    torch.testing.assert_close(p[1].double(), mean / mean.norm(), atol=1e-6, rtol=0)


def test_a_saved_bank_comes_back_whole(tmp_path):
    path = bank().save(tmp_path / "deep" / "b.safetensors")
    again = PrototypeBank.load(path)
    assert again.names == bank().names and again.model_sha256 == "m1"
    for a, b in zip(again.instances, bank().instances, strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


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


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", None])
def test_what_is_no_bank_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        PrototypeBank.load(path)


@pytest.mark.parametrize(("names", "instances"), [(("a",), ()), (("a", "a"), (rows(1, 0), rows(1, 0))),
                                                  (("a",), (rows(1, 0)[:0],))])  # fmt: skip
def test_a_bank_is_checked_at_birth(names, instances):
    with pytest.raises(ShapeError):
        PrototypeBank(names, instances, "m")


def test_an_empty_bank_has_no_prototypes():
    assert PrototypeBank((), (), "m").prototypes().numel() == 0
