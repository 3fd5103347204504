# SPDX-License-Identifier: AGPL-3.0-or-later
"""The five lines of the README, and what people hand to them."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import fsdet
from fsdet import Predictor
from fsdet.cli.main import main
from fsdet.data.images import as_rgb, read_rgb, rgb_of
from fsdet.detect.rescore import KEPT
from fsdet.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """one.jpg, two.jpg and photo.jpg in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("one.jpg", "two.jpg", "photo.jpg"):
        Image.fromarray(rng.integers(0, 255, (80, 120, 3), np.uint8)).save(name)
    return tmp_path


@pytest.fixture
def detector(best, place):
    return Predictor(best, device="cpu")


def test_the_five_lines_of_the_readme_run(best, place):
    [code] = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Predictor" in b]
    assert len([line for line in code.splitlines() if line]) == 5
    Path("checkpoints/stage2").mkdir(parents=True)
    Path("checkpoints/stage2/best.pt").symlink_to(best)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert Path("found.jpg").is_file() and names["detector"].bank.names == ("mug",)


def test_importing_the_package_alone_stays_light_and_knows_nothing_else():
    code = "import sys, fsdet; assert 'torch' not in sys.modules; fsdet.Predictor; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="Predictr"):
        fsdet.Predictr  # noqa: B018


def test_files_arrays_and_lists_say_the_same_as_the_command_line(detector, best, capsys):
    detector.register("mug", ["one.jpg", read_rgb("two.jpg")], [[10, 10, 60, 60], [[5, 5, 50, 50], [60, 5, 110, 70]]])
    assert [len(rows) for rows in detector.bank.instances] == [3]
    detector.bank.save(Path("my.bank"))
    by_path, by_array = detector.predict(["photo.jpg", read_rgb("photo.jpg")], threshold=0.0)
    for field in ("boxes", "scores", "labels", "branch"):
        assert torch.equal(getattr(by_path, field), getattr(by_array, field))
    assert main(["predict", str(best), "--bank", "my.bank", "--source", "photo.jpg", "--out", "out", "--conf", "0",
                 "--device", "cpu"]) == 0  # fmt: skip
    written = json.loads(Path("out/predictions.json").read_text())
    assert written["predictions"] == by_path.to_coco("photo.jpg")
    assert written["made_by"] == {"model_sha256": detector.bank.model_sha256, "looks": 1, "conf": 0}
    again = Predictor(best, "my.bank", device="cpu").predict("photo.jpg", 0.0)
    assert again.to_coco() == by_path.to_coco() and by_path.names[-1] == "mug"


def test_a_second_look_is_asked_for_by_word_and_changes_scores_alone(best, detector):
    """The command line and the package look twice alike, and lower the thresholds that they propose."""
    detector.register("mug", ["one.jpg", read_rgb("two.jpg")])
    detector.bank.save(Path("my.bank"))
    twice = Predictor(best, "my.bank", device="cpu", rescore=True)
    once, found = (d.predict("photo.jpg", threshold=0.0) for d in (detector, twice))
    assert len(found) and sorted(found.boxes.tolist()) == sorted(once.boxes.tolist())
    assert sorted(found.scores.tolist()) != sorted(once.scores.tolist())
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    words = ["predict", str(best), "--bank", "my.bank", "--source", "photo.jpg", "--conf", "0", "--device", "cpu"]
    assert main([*words, "--out", "out", "--rescore"]) == 0
    written = json.loads(Path("out/predictions.json").read_text())
    assert written["predictions"] == found.to_coco("photo.jpg") and written["made_by"]["looks"] == 2
    assert twice.bank.thresholds == detector.bank.thresholds, "a bank is of first looks"
    limits = [p._own.frozen()[1] for p in (detector, twice)]
    torch.testing.assert_close(limits[1], KEPT * limits[0])


def test_a_bank_goes_on_growing_where_its_images_are_not_at_hand(detector, best):
    """Classes and shots of a file stay as they are; what is added is calibrated on what is at hand."""
    detector.register("mug", ["one.jpg", "two.jpg"])
    old = detector.bank
    old.save(Path("my.bank"))
    grown = Predictor(best, "my.bank", device="cpu")
    grown.register("pen", "photo.jpg", [[5, 5, 60, 60]])
    assert grown.bank.names == ("mug", "pen") and "copies of its shot" in grown.bank.calibrated[1]
    assert grown.bank.thresholds[0] == old.thresholds[0] and grown.bank.calibrated[0] == old.calibrated[0]
    grown.register("mug", "photo.jpg", [[50, 20, 110, 70]])
    bank = grown.bank
    assert bank.sources == (("one.jpg", "two.jpg", "photo.jpg"), ("photo.jpg",))
    assert "1 shot by the others" in bank.calibrated[0], "of the three the new one alone has an image"
    rows = bank.negative_shots[0]
    assert set(rows.tolist()) == {0, 1, 2} and torch.equal(bank.negatives[0][rows < 2], old.negatives[0])
    at_once = Predictor(best, device="cpu")
    at_once.register("mug", ["one.jpg", "two.jpg", "photo.jpg"], [None, None, [[50, 20, 110, 70]]])
    torch.testing.assert_close(at_once.bank.instances[0], bank.instances[0])
    torch.testing.assert_close(at_once.bank.negatives[0], bank.negatives[0], atol=5e-3, rtol=0)  # of other batches


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x00b"])
def test_a_name_that_cannot_be_told_is_refused(detector, name):
    with pytest.raises(UserError, match="class name: expected a class name of characters that can be printed"):
        detector.register(name, "one.jpg")
    assert detector.bank.names == ()


@pytest.mark.parametrize(("wrong", "told"), [(3, "3, of type int"), (None, "None, of type NoneType")])
def test_a_name_that_is_no_text_is_refused(detector, wrong, told):
    with pytest.raises(UserError, match=f"class name: expected a text, got {told}. Next: give the name as a text"):
        detector.register(wrong, "one.jpg")
    assert detector.bank.names == ()


def test_a_class_of_the_detector_itself_is_told_where_it_is_replaced(best, detector, caplog):
    """As the command line does, once a class."""
    own = f"'{detector.names[0]}' is a class of the detector itself: what is registered stands in its place"
    Path("support", detector.names[0]).mkdir(parents=True)
    shutil.copy("one.jpg", Path("support", detector.names[0]))
    assert main(["register", str(best), "--support", "support", "--out", "my.bank", "--device", "cpu"]) == 0
    assert caplog.text.count(own) == 1
    caplog.clear()
    detector.register(f" {detector.names[0]} ", "one.jpg")
    assert caplog.text.count(own) == 1
    detector.register(detector.names[0], "two.jpg")
    detector.register("mug", "photo.jpg")
    assert caplog.text.count("of the detector itself") == 1


def test_a_shot_that_is_registered_twice_is_one(detector, caplog):
    detector.register("mug", ["one.jpg", "two.jpg"])
    whole = detector.bank
    detector.register("mug", read_rgb("one.jpg"))
    assert "'mug': 1 of 1 shot is there already and is not added twice (array 1)" in caplog.text
    assert detector.bank is whole
    detector.register("mug", ["one.jpg"] * 2, [[[5, 5, 60, 60]], [[5, 5, 60, 60]]])
    assert detector.bank.sources == (("one.jpg", "two.jpg", "one.jpg"),)
    assert set(detector.bank.negative_shots[0].tolist()) == {0, 1, 2}
    detector.register("pen", "one.jpg")
    assert len(detector.bank.instances[1]) == 1, "another class may have it, too"


def test_two_spellings_of_one_name_are_one_class(detector):
    detector.register("T\u00fcr", "one.jpg")
    detector.register(" Tu\u0308r", "two.jpg")
    assert detector.bank.names == ("T\u00fcr",) and len(detector.bank.instances[0]) == 2


def test_one_view_is_the_shot_as_it_is(best, place):
    quick = Predictor(best, device="cpu", views=False)
    quick.register("mug", "one.jpg")
    from fsdet.data.transforms import Sample, resize_long
    from fsdet.detect.support import embed_instances

    own = quick._own
    image, _ = resize_long(read_rgb("one.jpg"), own.prepare.image_size)
    sample = Sample(image, np.float32([[0, 0, image.shape[1], image.shape[0]]]), np.zeros(1, np.int64))
    plain = embed_instances(own.model, [(sample, 0)], own.prepare.support_size, [(1.0, False)])
    torch.testing.assert_close(quick.bank.instances[0], plain, atol=1e-5, rtol=0)


def test_one_branch_is_its_part_of_both(detector):
    detector.register("mug", "one.jpg")
    both = detector.predict("photo.jpg", 0.0)
    parts = [detector.predict("photo.jpg", 0.0, branch=branch) for branch in ("standard", "prototype")]
    assert [set(p.branch.tolist()) for p in parts] == [{0}, {1}]
    for number, part in enumerate(parts):  # what the other branch finds takes no room away
        own = both.scores[
            both.branch == number
        ]  # best first; two passes differ in last bits, at an overlap of .5 in more
        torch.testing.assert_close(part.scores[:1], own[:1], atol=1e-5, rtol=0)
        assert len(part) >= len(own) - 2 > 0
    assert sum(map(len, parts)) > len(both)
    with pytest.raises(UserError, match="Did you mean 'standard'"):
        detector.predict("photo.jpg", branch="standart")


def test_a_plot_is_a_jpeg_and_replaces_no_picture_of_others(detector):
    found = detector.predict("photo.jpg")
    with pytest.raises(UserError, match=r"plot: expected a name that ends in \.jpg or \.jpeg, got found\.png"):
        found.plot("found.png")
    before = Path("photo.jpg").read_bytes()
    with pytest.raises(UserError, match=r"photo\.jpg: expected no file yet, or a picture of fsdet"):
        found.plot("photo.jpg")
    assert Path("photo.jpg").read_bytes() == before and not Path("found.png").exists()
    for _ in range(2):
        found.plot("found.JPG")
    with Image.open("found.JPG") as picture:
        assert picture.format == "JPEG"


def test_rows_of_yolo_are_centres_and_sizes_as_shares(detector):
    found = detector.predict("photo.jpg", 0.0)
    rows = np.array([line.split() for line in found.to_yolo().splitlines()], float)
    x0, y0, x1, y1 = found.boxes.numpy().T
    want = np.stack([(x0 + x1) / 240, (y0 + y1) / 160, (x1 - x0) / 120, (y1 - y0) / 80], 1)
    np.testing.assert_allclose(rows[:, 1:5], want, atol=1e-5)
    assert rows[:, 0].astype(int).tolist() == found.labels.tolist()


def test_arrays_of_every_kind_are_one_picture(place):
    rgb = read_rgb("photo.jpg")
    grey = rgb[..., 0]
    assert np.array_equal(as_rgb(rgb[..., ::-1], "bgr"), rgb) and np.array_equal(
        as_rgb(cv2.imread("photo.jpg"), "bgr"), rgb
    )
    assert np.array_equal(as_rgb(rgb.astype(np.uint16) * 257), rgb)
    for one in (grey, grey[..., None]):
        assert np.array_equal(as_rgb(one), np.repeat(grey[..., None], 3, 2))
    clear = np.dstack((rgb, np.zeros_like(grey)))
    assert (as_rgb(clear) == 255).all() and np.array_equal(as_rgb(np.dstack((rgb, np.full_like(grey, 255)))), rgb)
    Image.fromarray(clear).save("clear.png")
    assert np.array_equal(read_rgb("clear.png"), as_rgb(clear)), "as a file has it"


TURNED = {1: lambda a: a, 3: lambda a: np.rot90(a, 2), 6: lambda a: np.rot90(a, -1), 8: np.rot90}  # the EXIF standard


@pytest.mark.parametrize("orientation", TURNED)
def test_a_pil_image_is_what_its_file_is(detector, orientation):
    rgb, exif = read_rgb("photo.jpg"), Image.Exif()
    exif[274] = orientation
    Image.fromarray(rgb).save("turned.png", exif=exif)
    with Image.open("turned.png") as opened:
        assert np.array_equal(detector.predict(opened).pixels, TURNED[orientation](rgb))
        copy = opened.convert("RGBA")
    assert np.array_equal(detector.predict(copy).pixels, TURNED[orientation](rgb)), "the file is closed"
    one, two = detector.predict([copy, "turned.png"], 0.0)
    assert torch.equal(one.boxes, two.boxes) and torch.equal(one.scores, two.scores) and len(one)
    assert torch.equal(detector._own.predict(copy, 0.0).boxes, two.boxes)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_a_pil_image_of_any_mode_is_rgb(detector, mode):
    grey = (np.arange(96, dtype=np.uint8) % 6 * 51).reshape(8, 12)  # the greys of the web palette, which mode P takes
    want = np.repeat(grey[..., None], 3, 2)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        grey = grey if mode != "1" else (grey > 40).astype(np.uint8) * 255
        want = np.repeat(grey[..., None], 3, 2)
        image = Image.fromarray(want).convert(mode)
    assert image.mode == mode
    got = rgb_of(image)
    assert got.dtype == np.uint8 and np.abs(got.astype(int) - want).max() <= 1  # CMYK rounds


def test_pil_images_are_shots_too(detector):
    with Image.open("one.jpg") as one, Image.open("two.jpg") as two:
        detector.register("mug", [one, two], [None, [[5, 5, 60, 60]]])
        detector.register("pen", two)
    assert detector.bank.names == ("mug", "pen") and [len(rows) for rows in detector.bank.instances] == [2, 1]


NO_IMAGES = {
    "_io.BytesIO": io.BytesIO(b"x\ny"),
    "None": None,
    "int": 5,
    "bytes": b"photo.jpg",
    "dict": {"photo.jpg": 1},
    "torch.Tensor": torch.zeros(3, 8, 8),
}


@pytest.mark.parametrize("wrong", NO_IMAGES)
def test_what_is_no_image_at_all_is_told_with_its_kind(detector, wrong):
    told = rf"image: expected a path, an array \[H, W, 3\] or a PIL image, got {wrong}\. Next: "
    for call in (detector.predict, detector._own.predict, lambda x: detector.register("mug", x),
                 lambda x: detector.predict(["photo.jpg", x])):  # fmt: skip
        with pytest.raises(UserError, match=told):
            call(NO_IMAGES[wrong])
    assert detector.bank.names == () and detector.predict([]) == []


def test_a_pil_image_that_is_empty_cut_off_or_of_floats_is_a_data_error(detector):
    Path("cut.jpg").write_bytes(Path("photo.jpg").read_bytes()[:900])
    with Image.open("cut.jpg") as cut:
        for image in (cut, Image.new("RGB", (0, 5)), Image.new("F", (4, 4))):
            with pytest.raises(DataError, match="PIL image: expected"):
                detector.predict(image)


NO_PICTURES = {"two channels": np.zeros((4, 4, 2), np.uint8), "floats": np.zeros((4, 4, 3), np.float32),
               "empty": np.zeros((0, 4), np.uint8), "a row": np.zeros(4, np.uint8)}  # fmt: skip
NO_BOXES = [
    ([[5, 5, 5, 40]], "at least a px"),
    ([[200, 5, 260, 40]], "at least a px"),
    ([[1, 2, 3]], "boxes [m, 4]"),
    ([[0, 0, 9, 9], [0, 0, float("nan"), 9]], "got [0.0, 0.0, nan, 9.0]"),
]


@pytest.mark.parametrize("wrong", NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_is_no_picture_is_refused(detector, wrong):
    with pytest.raises(DataError, match="image array: expected uint8 or uint16"):
        detector.predict(wrong)


@pytest.mark.parametrize(("boxes", "told"), NO_BOXES)
def test_a_box_that_holds_nothing_is_refused_and_nothing_is_registered(detector, boxes, told):
    with pytest.raises(DataError, match=re.escape(told)):
        detector.register("mug", "one.jpg", boxes)
    assert detector.bank.names == ()
    with pytest.raises(UserError, match="boxes for each of 2 images, got for 1"):
        detector.register("mug", ["one.jpg", "two.jpg"], [[0, 0, 9, 9]])
