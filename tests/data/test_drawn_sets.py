# SPDX-License-Identifier: AGPL-3.0-or-later
"""The demo sets of the other tasks: drawn the same every time, balanced, and readable by their readers."""

import numpy as np
import pytest

from fsdet.cli.main import main
from fsdet.data import sources
from fsdet.data.documents import CLASSES, document, draw_documents
from fsdet.data.drawn_instances import NAMES, draw_instances, scene
from fsdet.data.folders import load_folders
from fsdet.data.images import read_rgb
from fsdet.data.shapes import mask_of, tight
from fsdet.errors import DataError

SIZES = {"train": 6, "val": 2}


def test_pages_are_a_function_of_seed_split_and_index():
    assert (document(0, "train", 3)[0] == document(0, "train", 3)[0]).all()
    others = [document(1, "train", 3), document(0, "val", 3), document(0, "train", 5)]
    assert all((document(0, "train", 3)[0] != page).any() for page, _ in others)
    assert [document(0, "train", i)[1] for i in range(4)] == ["forged", "genuine"] * 2


def test_a_forged_page_differs_from_itself_by_one_block():
    """The grain of a genuine page is even; a forged one has a place where it is missing."""

    def flattest(image):
        grey = image.astype(np.float32).mean(2)
        noise = np.abs(np.diff(grey, axis=1))
        return min(np.median(noise[y : y + 8, x : x + 12]) for y in range(0, 116, 4) for x in range(0, 112, 4))

    low = {name: np.mean([flattest(document(0, "train", 2 * i + k)[0]) for i in range(12)])
           for k, name in enumerate(CLASSES)}  # fmt: skip
    assert low["forged"] < 0.7 * low["genuine"]


def test_the_set_of_pages_is_read_by_its_reader_and_not_drawn_again(tmp_path, monkeypatch):
    path = draw_documents(tmp_path / "pages", sizes=SIZES, processes=1)
    data = load_folders(path)
    assert data.names == CLASSES and [len(data.split(s)) for s in ("train", "val")] == [6, 2]
    page = read_rgb(data.split("train")[0].path)
    assert (page == document(0, "train", 0)[0]).all()
    before = data.split("train")[0].path.stat().st_mtime_ns
    draw_documents(tmp_path / "pages", sizes=SIZES, processes=1)
    assert data.split("train")[0].path.stat().st_mtime_ns == before


def test_instances_have_the_masks_and_boxes_that_were_drawn(tmp_path):
    data = sources.load(draw_instances(tmp_path / "set", sizes=SIZES, processes=1), shapes=True)
    assert data.names == NAMES and not data.report.faults
    for index, record in enumerate(data.split("train")):
        drawn = scene(0, "train", index)
        masks = np.stack([mask_of(shape, record.size) for shape in record.shapes])
        assert (masks == drawn.masks).all() and record.labels.tolist() == drawn.labels.tolist()
        assert (tight(masks) == record.boxes).all()


@pytest.mark.parametrize("draw", [draw_documents, draw_instances])
def test_a_foreign_folder_and_an_unknown_split_are_refused(draw, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="a new or empty folder, or a demo set"):
        draw(tmp_path, sizes=SIZES, processes=1)
    with pytest.raises(DataError, match="splits among train, val, test"):
        draw(tmp_path / "new", sizes={"support": 1}, processes=1)


def test_the_command_draws_the_set_of_a_task(tmp_path, monkeypatch, capsys):
    from fsdet.data import documents

    monkeypatch.setattr(documents, "SIZES", SIZES)
    assert main(["data", "demo", str(tmp_path / "pages"), "--task", "classifier"]) == 0
    assert capsys.readouterr().out.strip().endswith("data.yaml")
    assert len(load_folders(tmp_path / "pages").split("train")) == 6
    assert main(["data", "check", str(tmp_path / "pages"), "--task", "classifier", "--deep"]) == 0
    assert "genuine" in capsys.readouterr().out
