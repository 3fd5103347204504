# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an exported file says of itself comes back as it was; other files and missing packages are refused in words."""

import re
import sys

import pytest
import torch

from fsdet.bank import PrototypeBank
from fsdet.detect.exporting import needed
from fsdet.detect.portable import Card
from fsdet.detect.postprocess import COMPANY
from fsdet.detect.runtime import Network, PortablePredictor, open_onnx
from fsdet.errors import CheckpointError, UserError

CARD = Card(("mug", "é <b>", "pen"), (0, 1, 2), (0, 0, 1), (0.25, 0.25, 0.4), ("pen",), "frozen", 64, 32, 4, "ab" * 32,
            "0.1.0")  # fmt: skip
OPEN = Card(("mug",), (0,), (0,), (0.25,), (), "input", 64, 32, 4, "ab" * 32, "0.1.0")


def test_a_card_comes_back_from_the_text_that_it_is_stored_as():
    told = CARD.properties()
    assert all(isinstance(value, str) for value in told.values())
    assert Card.of(told, "a.onnx") == CARD
    assert {"licence", "preprocessing", "postprocessing", "thresholds", "model_sha256", "names"} <= set(told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "other"}, "a.onnx: expected a file of fsdet export"),
        ({"format": "fsdet-portable-1"}, "Next: export the checkpoint with this version's fsdet export"),
        ({"thresholds": "["}, "a.onnx: expected the metadata of fsdet export"),
        ({"stride": "many"}, "a.onnx: expected the metadata of fsdet export"),
    ],
)
def test_a_card_that_is_none_is_refused(change, told):
    with pytest.raises(CheckpointError, match=re.escape(told)):
        Card.of({**CARD.properties(), **change}, "a.onnx")
    with pytest.raises(CheckpointError, match="a file of fsdet export"):
        Card.of({}, "a.onnx")


def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = rf"onnxruntime \(extra export\), got not installed.* {re.escape(sys.executable)} -m pip install onnx "
    with pytest.raises(UserError, match=told):
        needed("onnxruntime")


def bank(name="pen", sha="ab" * 32, threshold=0.4):
    rows = torch.nn.functional.normalize(torch.randn(2, 4), dim=-1)
    return PrototypeBank((name,), (rows,), sha).proposed({name: (threshold, "by hand")} if threshold else {})


def network(card, seen):
    def run(images, prototypes):
        seen.append(prototypes)
        columns = len(card.labels) + (0 if prototypes is None else len(prototypes))
        scores = torch.zeros(len(images), 3, columns)
        scores[:, torch.arange(3) % 3, torch.arange(3) % columns] = torch.tensor([0.3, 0.35, 0.45])
        boxes = torch.tensor([[0.0, 0, 32, 32], [32, 32, 64, 64], [0, 32, 32, 64]])
        each = torch.arange(3).repeat(COMPANY)  # an object is said by several boxes
        return boxes[each].expand(len(images), len(each), 4), scores[:, each]

    return Network(card, run)


def test_registered_classes_of_a_bank_come_after_the_files_own_with_their_thresholds():
    seen, one = [], bank()
    found = PortablePredictor(network(OPEN, seen), one)
    assert found.names == ("mug", "pen") and found.registered == ("pen",)
    image = torch.zeros(128, 128, 3, dtype=torch.uint8).numpy()
    sure = found.predict(image)
    torch.testing.assert_close(seen[0], one.prototypes())
    assert sure.labels.tolist() == [0, 0] and sure.branch.tolist() == [0, 0]
    torch.testing.assert_close(sure.scores, torch.tensor([0.45, 0.3]))
    assert sure.boxes.max() == 128, "px of the original image"
    every = found.predict(image, threshold=0.0)
    assert every.labels.tolist() == [0, 1, 0] and every.branch.tolist() == [0, 1, 0]


def test_prototypes_as_an_input_without_a_bank_are_none_and_frozen_ones_are_not_asked_for():
    seen = []
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    PortablePredictor(network(OPEN, seen)).predict(image)
    found = PortablePredictor(network(CARD, seen)).predict(image)
    assert seen[0].shape == (0, 4) and seen[1] is None
    assert found.labels.tolist() == [2, 1, 0] and found.branch.tolist() == [1, 0, 0]


def test_a_bank_that_does_not_fit_the_file_is_refused():
    with pytest.raises(UserError, match="got a bank frozen into it"):
        PortablePredictor(network(CARD, []), bank())
    with pytest.raises(UserError, match="does not have itself, got mug"):
        PortablePredictor(network(OPEN, []), bank("mug"))
    with pytest.raises(CheckpointError, match="a bank made by these weights"):
        PortablePredictor(network(OPEN, []), bank(sha="cd" * 32))


def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    for path, told in ((tmp_path / "a.onnx", "that onnxruntime reads"), (tmp_path / "b.onnx", "nothing there")):
        with pytest.raises(CheckpointError, match=told):
            open_onnx(path)
