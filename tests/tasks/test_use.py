# SPDX-License-Identifier: AGPL-3.0-or-later
"""A trained checkpoint in use: register, predict by folder and by bank, and what is refused before anything is lost."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fsdet import written
from fsdet.bank import PrototypeBank
from fsdet.boxes import iou_matrix
from fsdet.cli.main import main
from fsdet.data.images import read_rgb
from fsdet.data.sources import load, support_folder
from fsdet.detect.calibration import USUAL
from fsdet.errors import ConfigError, DataError
from fsdet.evaluation import summary
from fsdet.files import write_durably
from fsdet.tasks import use
from fsdet.tasks.loading import load_trained
from fsdet.tasks.protocol import evaluate_checkpoint
from fsdet.tasks.use import predictor_of


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with support/<class>/ (the image, and an image with a box) and photos/ whose stems are the same."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("support/mug/1.png", "support/mug/2.png", "support/pen/1.png", "photos/a.png", "photos/a.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 120, 3), np.uint8)).save(name)
    Path("support/pen/1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    return tmp_path


def test_register_then_predict_by_bank_is_the_same_as_predict_by_folder(best, place, capsys):
    assert main(["register", str(best), "--support", "support", "--out", "my.bank", "--device", "cpu"]) == 0
    assert "my.bank: 2 classes: mug, pen" in capsys.readouterr().out
    bank = PrototypeBank.load(Path("my.bank"))
    assert [len(rows) for rows in bank.instances] == [2, 1]
    torch.testing.assert_close(bank.prototypes().norm(dim=1), torch.ones(2))
    known = {"--bank": "my.bank", "--support": "support"}
    for flag, value in known.items():
        argv = [str(best), flag, value, "--source", "photos", "--out", f"out{flag}", "--conf", "0", "--device", "cpu"]
        assert main(["predict", *argv]) == 0
    by_bank, by_folder = (json.loads(Path(f"out{flag}/predictions.json").read_text()) for flag in known)
    assert by_bank == by_folder and by_bank["names"][-2:] == ["mug", "pen"]
    assert {row["image"] for row in by_bank["predictions"]} == {"a.png", "a.jpg"}
    assert {row["branch"] for row in by_bank["predictions"]} == {"standard", "prototype"}


def test_a_bank_takes_more_classes_and_shots(best, place, capsys):
    on_cpu = ["--device", "cpu"]
    assert main(["register", str(best), "--support", "support", "--into", "my.bank", *on_cpu]) == 2
    assert "my.bank: expected a bank, got nothing there" in capsys.readouterr().err
    assert main(["register", str(best), "--support", "support", "--out", "my.bank", "--one-view", *on_cpu]) == 0
    first = PrototypeBank.load(Path("my.bank"))
    for name in ("more/pen/2.png", "more/cup/1.png"):
        Path(name).parent.mkdir(parents=True)
        shutil.copy("photos/a.png", name)
    assert main(["register", str(best), "--support", "more", "--into", "my.bank", "--one-view", *on_cpu]) == 0
    out = capsys.readouterr().out
    assert "my.bank: 3 classes: mug, pen, cup" in out and "replaces" not in out
    bank = PrototypeBank.load(Path("my.bank"))
    assert bank.sources == (("1.png", "2.png"), ("1.png", "2.png"), ("1.png",))
    assert torch.equal(bank.instances[0], first.instances[0]) and torch.equal(bank.instances[1][:1], first.instances[1])
    assert main(["bank", "list", "my.bank", "--shots"]) == 0
    assert "    2  2.png" in capsys.readouterr().out


def test_the_same_shots_are_not_added_twice_and_this_is_told(best, place, capsys):
    """By image and box: also when they lie elsewhere, or come beside new ones."""
    on_cpu, own = ["--device", "cpu"], ["register", str(best), "--support", "support"]
    assert main([*own, "--out", "my.bank", *on_cpu]) == 0
    first = PrototypeBank.load(Path("my.bank"))
    shutil.copytree("support", "moved")
    shutil.copy("support/mug/1.png", "moved/mug/copy.png")
    capsys.readouterr()
    for more in (own, [*own[:3], "moved"]):
        assert main([*more, "--into", "my.bank", *on_cpu]) == 0
        told, again = capsys.readouterr().err, PrototypeBank.load(Path("my.bank"))
        assert "'mug': " in told and "shots are there already and are not added twice (1.png, " in told
        assert "'pen': 1 of 1 shot is there already" in told
        assert again.sources == first.sources and again.thresholds == first.thresholds
        for field in ("instances", "negatives", "negative_shots"):
            assert all(map(torch.equal, getattr(again, field), getattr(first, field)))
    Path("moved/pen/1.txt").write_text("0 0.5 0.5 0.8 0.8\n")
    Image.fromarray(np.full((80, 120, 3), 90, np.uint8)).save("moved/mug/3.png")
    assert main([*own[:3], "moved", "--into", "my.bank", *on_cpu]) == 0
    told, grown = capsys.readouterr().err, PrototypeBank.load(Path("my.bank"))
    assert "'mug': 3 of 4 shots are there already" in told and "'pen'" not in told, "its box is another one"
    assert grown.sources == (("1.png", "2.png", "3.png"), ("1.png", "1.png"))
    assert "3 shots by the others" in grown.calibrated[0], "the images of the older shots are at hand, too"


def test_shots_of_one_view_and_of_six_are_not_mixed(best, place, capsys):
    """Refused before the work, either way round and in a merge; a class of both would be neither."""
    register = ["register", str(best), "--support", "support", "--device", "cpu"]
    assert main([*register, "--out", "six.bank"]) == 0
    assert main([*register, "--out", "one.bank", "--one-view"]) == 0
    capsys.readouterr()
    held = {name: Path(name).read_bytes() for name in ("six.bank", "one.bank")}
    told = "six.bank: expected shots of 1 view each, got a bank of 6. Next: register all of them with --one-view"
    for argv, text in (([*register, "--into", "six.bank", "--one-view"], told),
                       ([*register, "--into", "one.bank"], "one.bank: expected shots of 6 views each, got a bank of 1"),
                       (["bank", "merge", "one.bank", "six.bank", "--out", "both.bank"], told)):  # fmt: skip
        assert main(argv) == 2 and text in capsys.readouterr().err
    assert all(Path(name).read_bytes() == content for name, content in held.items()) and not Path("both.bank").exists()
    replace(PrototypeBank.load(Path("one.bank")), views=0).save(Path("old.bank"))
    assert main([*register, "--into", "old.bank"]) == 0, "a bank of before says nothing of it"
    assert PrototypeBank.load(Path("old.bank")).views == 0


def test_shots_of_a_bank_that_knows_no_marks_are_found_by_their_rows(best, place, capsys):
    argv = ["register", str(best), "--support", "support", "--device", "cpu"]
    assert main([*argv, "--out", "my.bank"]) == 0
    replace(PrototypeBank.load(Path("my.bank")), marks=()).save(Path("old.bank"))
    shutil.copy("photos/a.png", "support/mug/0.png")
    capsys.readouterr()
    assert main([*argv, "--into", "old.bank"]) == 0
    assert "'mug': 2 of 3 shots are there already and are not added twice (1.png, 2" in capsys.readouterr().err
    assert PrototypeBank.load(Path("old.bank")).sources == (("1.png", "2.png", "0.png"), ("1.png",))


def test_a_shot_of_two_classes_is_told_by_name(best, place, caplog):
    """The same picture in two folders, and a json's box under two names; two objects in one picture are as they are."""
    shutil.copy("support/mug/1.png", "support/pen/cup.png")
    argv = ["register", str(best), "--device", "cpu", "--support"]
    assert main([*argv, "support", "--out", "my.bank"]) == 0
    [told] = [r.message for r in caplog.records if "another class" in r.message]
    assert told.startswith("'pen': the same image and box as in another class: cup.png is 1.png of 'mug'; the two will")
    caplog.clear()
    assert main([*argv, "support", "--into", "my.bank"]) == 0
    assert "another class" not in caplog.text, "what is in the bank has been told"
    for wide, told in ((40, ["'b': the same image and box as in another class: 2.png is 2.png of 'a'"]), (41, [])):
        caplog.clear()
        boxes = [{"id": i, "image_id": 1, "category_id": i, "bbox": [5, 5, width, 40], "area": 9, "iscrowd": 0}
                 for i, width in ((1, 40), (2, wide))]  # fmt: skip
        Path("support/mug/some.json").write_text(json.dumps({
            "images": [{"id": 1, "file_name": "2.png", "width": 120, "height": 80}], "annotations": boxes,
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}))  # fmt: skip
        more = ["--support", "support/mug/some.json", "--source", "photos", "--out", "out", "--device", "cpu"]
        assert main(["predict", str(best), *more]) == 0
        assert [r.message.split(";")[0] for r in caplog.records if "another class" in r.message] == told


def test_images_of_one_stem_have_a_drawing_each(best, place):
    assert main(["predict", str(best), "--source", "photos", "--out", "out", "--device", "cpu"]) == 0
    assert {p.name for p in Path("out").iterdir()} == {"a.jpg", "a.png.jpg", "predictions.json"}
    index = json.loads(Path("out/predictions.json").read_text())
    assert index["pictures"] == {"a.jpg": "a.jpg", "a.png": "a.png.jpg"}


def test_a_label_that_was_corrected_by_hand_is_not_replaced_by_the_next_predict(best, place, capsys):
    argv = ["predict", str(best), "--source", "photos", "--out", "out", "--txt", "--conf", "0", "--device", "cpu"]
    assert main(argv) == 0
    Path("out/labels/a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    assert main(argv) == 2
    assert "out: expected files as they were written, got labels/a.txt, changed since" in capsys.readouterr().err
    assert Path("out/labels/a.txt").read_text() == "0 0.5 0.5 0.2 0.2\n"


def test_a_file_name_that_is_no_utf_8_is_written_so_that_it_can_be_read(best, place, capsys):
    """Under an image, a shot and a folder; a second predict finds its own drawings again."""
    for name in (b"photos/bad\xff.jpg", b"support/pen/\xff2.jpg"):
        shutil.copy("photos/a.jpg", os.fsdecode(name))
    out = Path(os.fsdecode(b"out\xfe"))
    argv = ["predict", str(best), "--source", "photos", "--txt", "--conf", "0", "--device", "cpu", "--out", str(out)]
    for _ in range(2):
        assert main(argv) == 0 and r"-> out\udcfe" in capsys.readouterr().out
    text = (out / "predictions.json").read_text(encoding="utf-8")
    found, name = json.loads(text), r"bad\udcff"
    assert name + ".jpg" in {row["image"] for row in found["predictions"]} and text.encode().isascii()
    assert found["pictures"][f"{name}.jpg"] == f"{name}.jpg" and (out / f"{name}.jpg").is_file()
    assert f"labels/{name}.txt" in found["written"] and (out / "labels" / f"{name}.txt").read_text()
    assert main(["register", str(best), "--support", "support", "--out", "my.bank", "--one-view"]) == 0
    assert PrototypeBank.load(Path("my.bank")).sources[1] == ("1.png", r"\udcff2.jpg")


def test_an_image_that_cannot_be_read_any_more_keeps_its_drawing(best, place, capsys):
    argv = ["predict", str(best), "--source", "photos", "--out", "out", "--conf", "0", "--device", "cpu"]
    assert main(argv) == 0
    Path("photos/a.png").write_bytes(b"half")
    capsys.readouterr()
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "still there: 1 file of an earlier predict, as this one did not look at everything (a.png.jpg)" in told
    assert Path("out/a.png.jpg").is_file()


def test_images_of_one_name_are_told_apart_with_their_pictures(best, place, capsys):
    """Each row's image has one drawing, of just that image's size."""
    for folder, size in (("one", (60, 40)), ("two", (40, 60))):
        Path(folder).mkdir()
        Image.new("RGB", size, (9, 90, 9)).save(f"{folder}/x.png")
    assert main(["predict", str(best), "--source", "*/x.png", "--out", "out", "--conf", "0", "--device", "cpu"]) == 0
    index = json.loads(Path("out/predictions.json").read_text())
    assert {row["image"] for row in index["predictions"]} == {"one/x.png", "two/x.png"} == set(index["pictures"])
    for image, picture in index["pictures"].items():
        with Image.open(image) as given, Image.open(Path("out", picture)) as drawn:
            assert (given.width > given.height) == (drawn.width > drawn.height)
    shutil.rmtree("two")
    assert main(["predict", str(best), "--source", "one", "--out", "alone", "--device", "cpu"]) == 0
    assert "1 image, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "out", "told"),
    [
        ("photos", "photos/../photos", "expected a folder beside the images, got the images' own"),
        ("photos/a.png", "photos", "expected a folder beside the images, got the images' own"),
        ("photos", "photos/a.png", "expected a folder, got a file"),
        ("film.mp4", "out", "film.mp4: expected a video, got a file that no frame can be read of"),
        ("support", "out", "support: expected an image or a folder of images, got no image"),
    ],
)
def test_predict_refuses_before_it_writes(best, place, source, out, told, capsys):
    Path("film.mp4").write_bytes(b"x")
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    assert main(["predict", str(best), "--source", source, "--out", out]) == 2
    assert told in capsys.readouterr().err
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


def test_a_predictor_in_python_as_the_readme_has_it(best, place):
    predictor = predictor_of(best)
    names, records = support_folder("support")
    for label, name in enumerate(names):
        predictor.register(name, [r for r in records if label in r.labels])
    found = predictor.predict("photos/a.png", threshold=0.0)
    assert predictor.names[80:] == ("mug", "pen") and len(found)
    assert (found.scores[:-1] >= found.scores[1:]).all() and found.boxes.isfinite().all()
    height, width = 80, 120
    assert (found.boxes[:, 2] <= width).all() and (found.boxes[:, 3] <= height).all() and (found.boxes >= 0).all()


def test_each_class_is_shown_from_its_own_threshold_up_and_one_number_overrides_all(best, place):
    predictor = predictor_of(best)
    names, records = support_folder("support")
    for label, name in enumerate(names):
        predictor.register(name, [r for r in records if label in r.labels])
    bank = predictor.bank
    assert all(t is not None and 0 < t <= 1 for t in bank.thresholds)
    assert "2 shots by the others" in bank.calibrated[0] and "8 copies of its shot" in bank.calibrated[1]
    every = predictor.predict("photos/a.png", threshold=0.0)
    is_mug = every.labels == predictor.names.index("mug")
    mug, boxes = every.scores[is_mug], every.boxes[is_mug]
    faint = mug[mug < USUAL]
    widest = int((faint[:-1] - faint[1:]).argmax())
    limit = float(faint[widest] + faint[widest + 1]) / 2  # far below the threshold of a class that has none
    known = predictor_of(best, bank.proposed({"mug": (limit, "by hand"), "pen": (1.0, "never")}))
    found = known.predict("photos/a.png")
    shown = found.labels == known.names.index("mug")
    assert (found.scores[shown] >= limit).all() and (found.scores[shown] < USUAL).any()
    # scores of two passes differ in their last bits, so that of equally sure boxes that overlap NMS may keep another
    assert (iou_matrix(boxes[mug >= limit], found.boxes[shown]).amax(1) > 0.3).all()
    assert not (found.labels == known.names.index("pen")).any()
    assert (found.scores[found.labels < 80] >= 0.25).all(), "base classes have the usual one"
    again = known.predict("photos/a.png", threshold=0.0)
    assert torch.equal(again.scores, every.scores) and torch.equal(again.labels, every.labels)


def test_a_shot_of_something_else_is_named(best, place, caplog, monkeypatch):
    """Three views of one thing and one of another, embedded by colour: two steps of training tell nothing apart."""

    def by_colour(model, instances, size, views):
        colours = [torch.from_numpy(sample.image.mean((0, 1))).float() - 60 for sample, _ in instances]
        return torch.nn.functional.pad(torch.nn.functional.normalize(torch.stack(colours)), (0, 13))

    monkeypatch.setattr("fsdet.detect.predictor.embed_instances", by_colour)
    with Image.open("support/mug/1.png") as one:
        for name, size in (("2", (240, 160)), ("4", (360, 240))):
            one.resize(size).save(f"support/mug/{name}.png")
    Image.new("RGB", (120, 80), (250, 20, 20)).save("support/mug/3.png")
    assert main(["register", str(best), "--support", "support", "--out", "my.bank", "--device", "cpu"]) == 0
    [told] = [r.message for r in caplog.records if "unlike the other" in r.message]
    assert told.startswith("'mug': ") and "mug/3.png is unlike the other 3 shots" in told


def test_negatives_of_a_shot_lie_beside_it_and_are_kept_with_it(best, place):
    predictor = predictor_of(best)
    _, records = support_folder("support")
    pen = [r for r in records if 1 in r.labels]
    predictor.register("pen", [*pen, *(replace(r, boxes=r.boxes + np.float32(4)) for r in pen)])
    shots = predictor.bank.negative_shots[0]
    assert 0 < len(shots) <= 16 and set(shots.tolist()) == {0, 1}
    torch.testing.assert_close(predictor.bank.negatives[0].norm(dim=1), torch.ones(len(shots)))


def test_a_crowd_is_no_shot(best, place):
    predictor = predictor_of(best)
    _, records = support_folder("support")
    one = records[0]
    crowded = replace(one, boxes=np.concatenate((one.boxes, [[0, 0, 90, 70]])), labels=[0, 0], crowd=[False, True])
    predictor.register("plain", [one])
    predictor.register("crowded", [crowded])
    assert [len(rows) for rows in predictor.bank.instances] == [1, 1]
    torch.testing.assert_close(*predictor.bank.instances)
    with pytest.raises(DataError, match="an instance of 'only', got none that is not a crowd"):
        predictor.register("only", [replace(one, crowd=[True])])


def test_a_bank_is_evaluated_where_its_weights_are(best, place, small_demo):
    data = load(small_demo)
    predictor = predictor_of(best)
    for name in data.novel[:2]:
        label = data.names.index(name)
        shots = [r for r in data.split("support") if label in r.labels][:1]
        predictor.register(name, [replace(r, boxes=r.boxes[r.labels == label], labels=r.labels[r.labels == label],
                                          crowd=r.crowd[r.labels == label]) for r in shots])  # fmt: skip
    predictor.bank.save(Path("demo.bank"))
    results = evaluate_checkpoint(best, bank=Path("demo.bank"), split="val")
    assert results["split"] == "val" and results["seeds"] == [0]
    assert results["shots"]["1"]["at_threshold"]["threshold"]["mean"] == pytest.approx(
        np.mean(PrototypeBank.load(Path("demo.bank")).thresholds)
    )
    more, axes = predictor.bank, torch.eye(predictor.bank.instances[0].shape[1])
    for name in data.novel[:2]:
        more = more.add(name, axes[:1])
    more.add("of no data set", axes[1:2]).save(Path("more.bank"))
    assert list(evaluate_checkpoint(best, bank=Path("more.bank"), split="val")["shots"]) == ["2"], "K of what is judged"
    many = torch.nn.functional.normalize(torch.randn(len(data.split("support")) + 1, axes.shape[1]))
    PrototypeBank.load(Path("demo.bank")).add(data.novel[0], many).add(data.novel[1], many).save(Path("many.bank"))
    evaluate_checkpoint(best, bank=Path("many.bank"), split="test", json_out=Path("judged/results.json"))
    assert {p.name for p in Path("judged").iterdir()} >= {"results.json", "shots.png"}, (
        "its shots are none of the data's"
    )


def test_a_trained_detector_is_its_average_where_the_run_kept_one(best, tmp_path):
    state = torch.load(best, weights_only=True)
    state["ema"] = {name: value + 1 for name, value in state["model"].items()}
    torch.save(state, tmp_path / "a.pt")
    for name, value in load_trained(tmp_path / "a.pt").model.state_dict().items():
        assert torch.equal(value, state["ema"][name]), name


def test_a_device_that_is_not_there_is_told_by_the_flag(best):
    with pytest.raises(ConfigError, match=r"--device: expected a cuda device that exists"):
        load_trained(best, "cuda:99")


def test_a_data_set_that_is_not_where_it_was_says_to_name_it(best, tmp_path):
    state = torch.load(best, weights_only=True)
    state["spec"]["data"] = "datasets/gone/data.yaml"
    torch.save(state, tmp_path / "moved.pt")
    with pytest.raises(DataError, match=r"nothing at 'datasets/gone/data.yaml', seen from .*name it with --data"):
        evaluate_checkpoint(tmp_path / "moved.pt")


def test_no_output_replaces_a_file_of_another_kind(best, place, capsys):
    """Each command says so, with exit code 2, before it has computed anything."""
    data = str(load_trained(best).spec["data"])
    Path("notes.txt").write_text("mine")
    Path("out").mkdir()
    Path("out/predictions.json").write_text('{"mine": 1}')
    Path("seen").mkdir()
    Path("seen/a.png.jpg").write_text("mine")
    Path("judged/episodes").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("judged/confusion.png")
    Path("judged/episodes/eval_1shot_0.jpg").write_text("mine")
    on_cpu = ["--device", "cpu"]
    for argv in (
        ["register", str(best), "--support", "support", "--out", "notes.txt", *on_cpu],
        ["register", str(best), "--support", "support", "--out", "support", *on_cpu],
        ["eval", str(best), "--shots", "1", "--seeds", "1", "--json", "notes.txt", *on_cpu],
        ["eval", str(best), "--shots", "1", "--seeds", "1", "--json", "judged/results.json", *on_cpu],
        ["eval", str(best), "--shots", "1", "--seeds", "1", "--json", "notes.txt/results.json", *on_cpu],
        ["data", "shots", data, "--k", "1", "--out", "notes.txt"],
        ["predict", str(best), "--source", "photos", "--out", "out", *on_cpu],
        ["predict", str(best), "--source", "photos", "--out", "seen", *on_cpu],
    ):
        assert main(argv) == 2, argv
        assert "name a" in capsys.readouterr().err
    assert Path("notes.txt").read_text() == "mine" and Path("seen/a.png.jpg").read_text() == "mine"
    assert Path("out/predictions.json").read_text() == '{"mine": 1}' and not Path("judged/results.json").exists()
    Path("judged/confusion.png").unlink()
    assert main(["eval", str(best), "--shots", "1", "--seeds", "1", "--json", "judged/results.json", *on_cpu]) == 2
    assert "eval_1shot_0.jpg: expected no file yet, or a picture of fsdet" in capsys.readouterr().err


def test_labels_of_a_data_set_are_not_replaced_by_detections(best, place, capsys):
    """--out may be the folder of a YOLO data set, whose labels/ lies beside images/."""
    for name in ("set/images/a.png", "set/images/b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("photos/a.png", name)
    Path("set/labels").mkdir()
    Path("set/labels/b.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    argv = ["predict", str(best), "--source", "set/images", "--out", "set", "--txt", "--conf", "0", "--device", "cpu"]
    assert main(argv) == 2
    assert "set: expected a folder without these files, got labels/b.txt and 0 more" in capsys.readouterr().err
    assert Path("set/labels/b.txt").read_text() == "0 0.5 0.5 0.2 0.2\n" and not Path("set/a.jpg").exists()


def test_a_folder_of_predictions_is_written_again_but_not_what_came_into_it(best, place, capsys):
    argv = ["predict", str(best), "--source", "photos", "--out", "out", "--txt", "--conf", "0", "--device", "cpu"]
    assert main(argv) == 0
    written = ["a.jpg", "a.png.jpg", "labels/a.png.txt", "labels/a.txt"]
    assert json.loads(Path("out/predictions.json").read_text())["written"] == written
    assert main([*argv[:3], "photos/*.png", *argv[4:]]) == 0, "a.jpg is the copy of another image now"
    assert json.loads(Path("out/predictions.json").read_text())["written"] == ["a.jpg", "labels/a.txt"]
    shutil.copy("photos/a.png", "photos/mine.png")
    Path("out/mine.jpg").write_text("mine")
    capsys.readouterr()
    assert main(argv) == 2
    assert "got mine.jpg and 0 more, which predictions.json does not list" in capsys.readouterr().err
    assert Path("out/mine.jpg").read_text() == "mine"


def test_drawings_of_an_earlier_predict_are_removed_but_not_what_was_changed_since(best, place, capsys):
    """By the sha256 in predictions.json; where that is not known, or names a file elsewhere, nothing is removed."""
    index = Path("out/predictions.json")
    for name in ("b", "c", "d", "e"):
        shutil.copy("photos/a.png", f"photos/{name}.png")
    argv = ["predict", str(best), "--source", "photos", "--out", "out", "--txt", "--conf", "0", "--device", "cpu"]
    assert main(argv) == 0 and "earlier" not in capsys.readouterr().out
    assert main(argv) == 0 and "earlier" not in capsys.readouterr().out, "all of them are written again"
    with Image.open("out/b.jpg") as drawn:
        drawn.rotate(180).save("out/b.jpg", comment=drawn.info["comment"])
    Path("out/mine.jpg").write_text("mine")
    Path("kept.jpg").write_bytes(Path("out/c.jpg").read_bytes())
    Path("out/d.jpg").unlink()
    Path("out/d.jpg").symlink_to("../kept.jpg")
    content = json.loads(index.read_text())
    del content["sha256"]["e.jpg"]
    content["sha256"]["../kept.jpg"] = content["sha256"]["d.jpg"] = content["sha256"]["c.jpg"]
    content["written"].append("../kept.jpg")
    index.write_text(json.dumps(content))
    argv[3] = "photos/a.*"
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "removed 5 files of an earlier predict that this one did not write again" in told
    let_be = "2 files of an earlier predict, as links and what is outside of the folder are let be (../kept.jpg, d.jpg)"
    unknown = "1 file of an earlier predict, which may have been changed since: no sha256 was noted (e.jpg)"
    for stay in (let_be, unknown, "1 file of an earlier predict, changed since (b.jpg)"):
        assert f"still there: {stay}" in told
    assert {p.name for p in Path("out").glob("[b-z]*.jpg")} == {"b.jpg", "d.jpg", "e.jpg", "mine.jpg"}
    assert sorted(p.name for p in Path("out/labels").iterdir()) == ["a.png.txt", "a.txt"] and Path("kept.jpg").is_file()
    assert set(json.loads(index.read_text())["written"]) >= {"b.jpg", "e.jpg"}


def test_images_of_one_name_are_told_apart_by_their_folders(best, place):
    for name in ("days/1/x.png", "days/2/x.png", "days/2/y.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("photos/a.png", name)
    argv = ["predict", str(best), "--source", "days/*/*.png", "--out", "out", "--conf", "0", "--device", "cpu"]
    assert main(argv) == 0
    rows = json.loads(Path("out/predictions.json").read_text())["predictions"]
    assert {row["image"] for row in rows} == {"days/1/x.png", "days/2/x.png", "y.png"}


def test_a_signal_keeps_what_was_found(best, place, monkeypatch, capsys):
    def read(path):
        if Path(path).name == "b.png":
            signal.raise_signal(signal.SIGINT)
        return read_rgb(path)

    for name in ("photos/b.png", "photos/c.png"):
        shutil.copy("photos/a.png", name)
    monkeypatch.setattr(use, "read_rgb", read)
    argv = ["predict", str(best), "--source", "photos", "--out", "out", "--conf", "0", "--device", "cpu"]
    assert main(argv) == 130
    assert "error: stopped, and what was found is kept. 3 images" in capsys.readouterr().err
    found = json.loads(Path("out/predictions.json").read_text())
    assert {row["image"] for row in found["predictions"]} == {"a.jpg", "a.png", "b.png"}
    assert found["written"] == ["a.jpg", "a.png.jpg", "b.jpg"]
    with monkeypatch.context() as calm:
        calm.setattr(use, "read_rgb", read_rgb)
        assert main(argv) == 0 and Path("out/c.jpg").exists()
    assert main(argv) == 130
    told = "still there: 1 file of an earlier predict, as this one did not look at everything (c.jpg)"
    assert told in capsys.readouterr().err and Path("out/c.jpg").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing that follows is done."""


@pytest.mark.parametrize("at", ["an image", "a drawing", "a label", "predictions.json"])
def test_a_predict_that_was_killed_goes_on_and_replaces_nothing_of_the_user(best, place, at, monkeypatch, capsys):
    """Its own drawings are known by what it noted before it wrote them, over those of an earlier predict too."""

    def killed(path, *rest):
        hit = {"an image": "b.png", "a drawing": "b.jpg", "a label": "b.txt", "predictions.json": use.INDEX}[at]
        if Path(path).name == hit:
            raise Killed
        return read_rgb(path) if at == "an image" else write_durably(path, *rest)

    shutil.copy("photos/a.png", "photos/b.png")
    argv = ["predict", str(best), "--source", "photos", "--out", "out", "--txt", "--device", "cpu", "--conf"]
    module = use if at == "an image" else summary if at == "predictions.json" else written
    for conf in ("0", "0.9"):  # into an empty folder, then over the drawings of the run before
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, "read_rgb" if at == "an image" else "write_durably", killed)
            main([*argv, conf])
        own = Path("out/a.jpg").read_bytes()
        for path, mine in (("out/a.jpg", own + b"mine"), ("out/labels/a.txt", b"0 0 0 0 0 mine\n")):
            before = Path(path).read_bytes()
            Path(path).write_bytes(mine)
            assert main([*argv, conf]) == 2 and "Next: move them away" in capsys.readouterr().err
            assert Path(path).read_bytes() == mine
            Path(path).write_bytes(before)
        assert main([*argv, conf]) == 0
        found = json.loads(Path("out/predictions.json").read_text())
        assert found["written"] == sorted(found["sha256"]) and len(found["written"]) == 6
        assert sorted(os.listdir("out")) == ["a.jpg", "a.png.jpg", "b.jpg", "labels", "predictions.json"]


def test_what_a_killed_predict_left_of_other_images_is_removed_and_nothing_else(best, place, monkeypatch, capsys):
    def killed(path):
        if Path(path).name == "c.png":
            raise Killed
        return read_rgb(path)

    for name in ("b", "c"):
        shutil.copy("photos/a.png", f"photos/{name}.png")
    argv = ["predict", str(best), "--source", "photos", "--out", "out", "--conf", "0", "--device", "cpu"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(use, "read_rgb", killed)
        main(argv)
    Path("out/a.png.jpg").write_text("mine")
    notes = Path("out/.predictions.json.part")
    notes.write_text(notes.read_text() + '\n{"file": "../photos/c.png", "sha')
    argv[3] = "photos/c.png"
    assert main(argv) == 0
    assert "removed 2 files of an earlier predict" in capsys.readouterr().out
    assert sorted(os.listdir("out")) == ["a.png.jpg", "c.jpg", "predictions.json"] and Path("photos/c.png").is_file()
    notes.write_text("mine")
    assert main(argv) == 2 and "got another file" in capsys.readouterr().err and notes.read_text() == "mine"


@pytest.mark.parametrize("out", ["notes.txt/out", "/proc/nowhere/out"])
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(best, place, out, monkeypatch, capsys):
    Path("notes.txt").write_text("mine")
    monkeypatch.setattr(use, "finder", None)
    assert main(["predict", str(best), "--source", "photos", "--out", out, "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert (
        f"{out}/predictions.json: expected a place that can be written to, got" in told and "name another one" in told
    )


def test_a_bank_of_other_weights_or_of_nan_is_refused_by_its_file_everywhere(best, place, capsys):
    row = torch.eye(predictor_of(best).model.head.proxies.shape[1])[:1]
    PrototypeBank(("mug",), (row,), "0" * 64).save(Path("theirs.bank"))
    PrototypeBank(("mug",), (row * torch.nan,), "0" * 64).save(Path("ill.bank"))
    for words in (["predict", str(best), "--source", "photos", "--out", "out", "--bank"],
                  ["eval", str(best), "--device", "cpu", "--bank"],
                  ["export", str(best), "--out", "m.onnx", "--bank"],
                  ["register", str(best), "--support", "support", "--into"]):  # fmt: skip
        for file, told in (("theirs.bank", "a bank made by these weights"), ("ill.bank", "finite rows, got NaN")):
            assert main([*words, file]) == 2 and f"error: {file}: expected {told}" in capsys.readouterr().err, words
    assert not Path("out").exists() and not Path("m.onnx").exists()


def test_a_file_where_the_folder_of_labels_belongs_is_told_before_the_work(best, place, monkeypatch, capsys):
    Path("out").mkdir()
    Path("out/labels").write_text("mine")
    monkeypatch.setattr(use, "finder", None)
    argv = ["predict", str(best), "--source", "photos", "--out", "out", "--txt", "--device", "cpu"]
    assert main(argv) == 2
    assert "out/labels: expected a folder, got a file. Next: move it away" in capsys.readouterr().err
    assert Path("out/labels").read_text() == "mine" and [p.name for p in Path("out").iterdir()] == ["labels"]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main([word for word in argv if word != "--txt"]) == 0, "without labels nothing is in the way"


def test_a_bank_is_replaced_only_with_the_word_for_it_and_before_the_work_it_is_told_what_it_holds(
    best, place, monkeypatch, capsys
):
    argv = ["register", str(best), "--support", "support", "--out", "my.bank", "--device", "cpu"]
    assert main(argv) == 0
    before = Path("my.bank").read_bytes()
    with monkeypatch.context() as context:
        context.setattr(use, "registered", None)
        for words in (argv, [*argv, "--adapt"]):
            assert main(words) == 2
            told = capsys.readouterr().err
            assert "my.bank: expected no bank yet, got a bank of 2 classes, 3 shots (mug 2, pen 1). Next: " in told
            assert "give --replace" in told and ("--into my.bank" in told) == (words is argv)
    assert Path("my.bank").read_bytes() == before and not Path("my.bank.adapted").exists()
    shutil.rmtree("support/mug")
    assert main([*argv, "--replace"]) == 0
    told = "my.bank: 1 class: pen; replaces a bank of 2 classes, 3 shots (mug 2, pen 1)"
    assert told in capsys.readouterr().out and PrototypeBank.load(Path("my.bank")).names == ("pen",)
    assert main([*argv[:4], "--into", "my.bank", "--replace"]) == 2
    assert "expected --out beside --replace" in capsys.readouterr().err


def test_a_bank_that_cannot_be_read_is_replaced_only_with_the_word_for_it_too(best, place, capsys):
    PrototypeBank(("mug",), (torch.full((1, 8), torch.nan),), "0" * 64).save(Path("ill.bank"))
    argv = ["register", str(best), "--support", "support", "--out", "ill.bank", "--device", "cpu"]
    assert main(argv) == 2 and "ill.bank: expected no bank yet, got a bank that cannot" in capsys.readouterr().err
    assert main([*argv, "--replace"]) == 0 and PrototypeBank.load(Path("ill.bank")).names == ("mug", "pen")


def test_one_unreadable_photo_is_left_out_and_named(best, place, capsys):
    Path("photos/broken.jpg").write_bytes(b"no picture")
    argv = ["predict", str(best), "--support", "support", "--source", "photos", "--out", "out", "--device", "cpu"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "2 images" in out and "left out: " in out and "broken.jpg" in out
    assert {row["image"] for row in json.loads(Path("out/predictions.json").read_text())["predictions"]} <= {
        "a.png",
        "a.jpg",
    }


@pytest.mark.parametrize("source", ["photos", "photos/*.*"])
def test_links_and_folders_that_are_called_like_images_are_left_out_and_named(source, best, place, capsys):
    Path("photos/gone.jpg").symlink_to("nowhere.jpg")
    Path("photos/dir.jpg").mkdir()
    argv = ["predict", str(best), "--support", "support", "--source", source, "--out", "out", "--device", "cpu"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "2 images" in out and all(any(name in line for line in out.splitlines() if line.startswith("left out: "))
                                     for name in ("gone.jpg", "dir.jpg"))  # fmt: skip


def test_a_prediction_that_fails_leaves_no_folder(best, place, capsys):
    Path("photos/broken.jpg").write_bytes(b"no picture")
    argv = ["predict", str(best), "--support", "support", "--out", "out", "--device", "cpu", "--source"]
    assert main([*argv, "photos/broken.jpg"]) == 2
    assert "broken.jpg" in capsys.readouterr().err and not Path("out").exists()


def test_registered_classes_are_counted_first_also_when_none_is_found(best, place, capsys):
    argv = ["predict", str(best), "--support", "support", "--source", "photos", "--out", "out", "--device", "cpu"]
    assert main([*argv, "--conf", "1"]) == 0
    assert "(0 mug, 0 pen)" in capsys.readouterr().out


def test_other_classes_than_the_checkpoints_are_refused_by_name(best, small_demo, tmp_path, capsys):
    text = small_demo.read_text().replace("path: .", f"path: {small_demo.parent}").replace("- gold star\n", "")
    (tmp_path / "other.yaml").write_text(text)
    argv = [
        "eval",
        str(best),
        "--data",
        str(tmp_path / "other.yaml"),
        "--shots",
        "1",
        "--seeds",
        "1",
        "--device",
        "cpu",
    ]
    assert main(argv) == 2
    assert "1 only in the checkpoint, such as gold star" in capsys.readouterr().err


def test_what_an_archive_leaves_beside_the_classes_is_no_class(best, place, capsys):
    Path("support/__MACOSX").mkdir()
    Path("support/__MACOSX/._1.png").write_bytes(b"x")
    Path("support/.cache").mkdir()
    assert main(["register", str(best), "--support", "support", "--out", "my.bank", "--device", "cpu"]) == 0
    assert "my.bank: 2 classes: mug, pen" in capsys.readouterr().out


def test_a_pattern_names_its_images_and_labels_are_written_beside(best, place, capsys):
    argv = ["predict", str(best), "--source", "photos/*.png", "--out", "out", "--conf", "0", "--txt", "--device", "cpu"]
    assert main(argv) == 0
    found = json.loads(Path("out/predictions.json").read_text())["predictions"]
    assert {row["image"] for row in found} == {"a.png"} and [p.name for p in Path("out/labels").iterdir()] == ["a.txt"]
    lines = [line.split() for line in Path("out/labels/a.txt").read_text().splitlines()]
    assert len(lines) == len(found) and all(len(words) == 6 for words in lines)
    x, y, w, h = found[0]["bbox"]
    centre = [(x + w / 2) / 120, (y + h / 2) / 80, w / 120, h / 80]  # the images are 120 x 80 px
    assert [float(v) for v in lines[0][1:5]] == pytest.approx(centre, abs=2e-4)
    capsys.readouterr()
    assert (
        main([*argv[:3], "photos/*.gif", *argv[4:]]) == 2
        and "photos/*.gif: expected an image" in capsys.readouterr().err
    )
