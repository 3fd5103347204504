# SPDX-License-Identifier: AGPL-3.0-or-later
"""A bank comes back from its file whole, and a file that is none, or is not as it was written, is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from banks import bank, full, rows
from fsdet.bank import PrototypeBank
from fsdet.bankfile import is_bank
from fsdet.errors import CheckpointError


def test_a_saved_bank_comes_back_whole(tmp_path):
    path = bank().save(tmp_path / "deep" / "b.safetensors")
    again = PrototypeBank.load(path)
    assert again.names == bank().names and again.model_sha256 == "m1"
    for a, b in zip(again.instances, bank().instances, strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", None])
def test_what_is_no_bank_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        PrototypeBank.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["instances", "negatives"])
def test_a_row_that_is_not_finite_is_refused_with_file_class_and_row(tmp_path, value, kind):
    rows = tuple(t.clone() for t in getattr(full(), kind))
    rows[0][1, 3] = value
    path = replace(full(), **{kind: rows}).save(tmp_path / "ill.bank")
    with pytest.raises(CheckpointError, match=r"ill\.bank: expected finite rows, got NaN or Inf in row 2 of 'cup'\."):
        PrototypeBank.load(path)


@pytest.mark.parametrize("kind", ["instances", "negatives"])
def test_a_row_that_is_no_unit_row_is_refused(tmp_path, kind):
    rows = tuple(t.clone() for t in getattr(full(), kind))
    rows[0][1] *= 1.01
    path = replace(full(), **{kind: rows}).save(tmp_path / "long.bank")
    with pytest.raises(
        CheckpointError, match=r"long\.bank: expected rows of length 1, got another in row 2 of 'cup'\."
    ):
        PrototypeBank.load(path)


def test_a_flipped_bit_is_damage(tmp_path):
    """The last of a row's mantissa: the row is as long as before, and not what was written."""
    path = full().save(tmp_path / "flip.bank")
    data = bytearray(path.read_bytes())
    data[data.index(full().instances[0].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"flip\.bank: expected the rows that were written, got others"):
        PrototypeBank.load(path)
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, path, {key: text for key, text in header.items() if key != "sha256"})
    assert PrototypeBank.load(path).names == full().names, "a bank of before has no checksum"


WRONG = {
    "names": "[1, 2]",
    "thresholds": "[NaN, 0.5]",
    "calibrated": "[1]",
    "sources": "[[]]",
    "made_by": "[[[[",
    "negatives": 0,
}


@pytest.mark.parametrize("what", WRONG)
def test_content_that_fits_no_bank_is_refused_with_the_file(tmp_path, what):
    path = full().save(tmp_path / "odd.bank")
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if what == "negatives":
        tensors["negatives.0"] = tensors["negatives.0"].long()
    else:
        header[what] = WRONG[what]
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match=r"odd\.bank: expected a bank, as fsdet register writes it"):
        PrototypeBank.load(path)


def test_thresholds_and_negatives_come_back_too(tmp_path):
    again = PrototypeBank.load(full().save(tmp_path / "b.bank"))
    assert again.thresholds == (0.375, None) and again.calibrated == full().calibrated
    for a, b in zip(
        (*again.negatives, *again.negative_shots), (*full().negatives, *full().negative_shots), strict=True
    ):
        assert torch.equal(a, b)


def test_a_bank_of_the_first_format_is_read_without_them(tmp_path):
    header = {"format": "fsdet-bank-1", "names": json.dumps(["cup"]), "model_sha256": "m1"}
    save_file({"instances.0": rows(2, 0)}, tmp_path / "old.bank", header)
    old = PrototypeBank.load(tmp_path / "old.bank")
    assert is_bank(tmp_path / "old.bank") and torch.equal(old.instances[0], rows(2, 0))
    assert old.thresholds == (None,) and len(old.negatives[0]) == 0 and old.calibrated == ("",)
    assert old.merge(full()).thresholds == (0.375, None), "its missing threshold is the other's"


def test_a_bank_of_the_second_format_is_read_without_its_thresholds_and_says_so(tmp_path, caplog):
    full().save(tmp_path / "new.bank")
    with safe_open(str(tmp_path / "new.bank"), framework="pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    save_file(tensors, tmp_path / "old.bank", {**header, "format": "fsdet-bank-2"})
    old = PrototypeBank.load(tmp_path / "old.bank")
    assert old.thresholds == (None, None) and all(map(torch.equal, old.negatives, full().negatives))
    assert caplog.text.count("old.bank: of an earlier version, whose thresholds do not fit") == 1
    assert PrototypeBank.load(old.save(tmp_path / "again.bank")).thresholds == (None, None)
    assert "again.bank" not in caplog.text and "new.bank" not in caplog.text


def test_marks_sources_and_views_come_back_too(tmp_path):
    one = PrototypeBank(("cup",), (rows(3, 2),), "m1", sources=(("a.jpg", "", "ключ.jpg"),), marks=(("a", "b", "c"),),
                        made_by={"classes": "2"}, views=6)  # fmt: skip
    again = PrototypeBank.load(one.save(tmp_path / "b.bank"))
    for field in ("sources", "marks", "made_by", "views"):
        assert getattr(again, field) == getattr(one, field)
    assert again.path == tmp_path / "b.bank" and one.path is None
