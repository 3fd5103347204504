# SPDX-License-Identifier: AGPL-3.0-or-later
"""The demo set is the same on every draw, annotated to the pixel, and its novel silhouettes are new."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from fsdet.data import synthetic
from fsdet.data.documents import draw_documents
from fsdet.data.drawing import clutter, deal, scenes
from fsdet.data.drawing.catalogue import BASE, KINDS, NOVEL, PALETTE, Kind
from fsdet.data.drawing.patterns import PATTERNS
from fsdet.data.drawing.stickers import Pose, draw_sticker, random_pose
from fsdet.errors import DataError

SMALL = {"train": 3, "val": 1, "test": 2, "support": 2}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "demo"
    synthetic.draw_demo(out, processes=1, sizes=SMALL)
    return out


@pytest.fixture(scope="module")
def pictures() -> list[scenes.Scene]:
    return [synthetic.scene(0, split, index) for split in ("train", "test", "support") for index in range(12)]


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def whole(instance: scenes.Instance) -> np.ndarray:
    """[S, S] bool: the instance drawn alone on a large sheet, then cut to the image."""
    alpha = draw_sticker(KINDS[instance.label], instance.pose).alpha
    pad, side = 200, scenes.SIDE
    sheet = np.zeros((side + 2 * pad, side + 2 * pad), bool)
    y, x = instance.top + pad, instance.left + pad
    sheet[y : y + alpha.shape[0], x : x + alpha.shape[1]] = alpha > 0.5
    return sheet[pad : pad + side, pad : pad + side]


def outline_mask(kind: Kind) -> np.ndarray:
    """[64, 64] bool: everything the drawing covers, upright and centred, its longest side 60 px."""
    alpha = draw_sticker(kind, Pose(size=60, outline=0.0)).alpha > 0.5
    ys, xs = np.nonzero(alpha)
    out = np.zeros((64, 64), bool)
    y, x = (32 - (v.max() - v.min() + 1) // 2 for v in (ys, xs))
    out[ys - ys.min() + y, xs - xs.min() + x] = True
    return out


def test_bytes_do_not_depend_on_the_number_of_processes(demo, tmp_path):
    synthetic.draw_demo(tmp_path / "again", processes=2, sizes=SMALL)
    assert digests(demo) == digests(tmp_path / "again")


def test_a_longer_draw_starts_with_the_shorter_one(demo, tmp_path):
    synthetic.draw_demo(tmp_path / "longer", processes=1, sizes={"train": 4})
    longer, shorter = digests(tmp_path / "longer"), digests(demo)
    assert all(longer[f"train/{i:06d}.jpg"] == shorter[f"train/{i:06d}.jpg"] for i in range(3))


def test_seed_split_and_index_each_change_the_picture():
    images = [synthetic.scene(*key).image for key in ((0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1))]
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])


def test_folder_is_a_coco_set_of_its_yaml(demo):
    keys = yaml.safe_load((demo / "data.yaml").read_text(encoding="utf-8"))
    assert (len(keys["base"]), len(keys["novel"])) == (80, 16)
    assert not (set(keys) & {"base", "novel"} and set(keys["base"]) & set(keys["novel"]))
    for split, count in SMALL.items():
        coco = json.loads((demo / keys[split]).read_text(encoding="utf-8"))
        folder = (demo / keys[split]).parent
        assert [c["name"] for c in coco["categories"]] == keys["base"] + keys["novel"]
        assert [c["id"] for c in coco["categories"]] == list(range(1, 97))
        assert {p.name for p in folder.glob("*.jpg")} == {i["file_name"] for i in coco["images"]}
        assert len(coco["images"]) == count
        for image in coco["images"]:
            assert cv2.imread(str(folder / image["file_name"])).shape == (image["height"], image["width"], 3)


def test_annotations_of_the_file_are_the_boxes_of_the_scene(demo):
    coco = json.loads((demo / "test" / "annotations.json").read_text(encoding="utf-8"))
    for index in range(SMALL["test"]):
        drawn = synthetic.scene(0, "test", index)
        mine = [a for a in coco["annotations"] if a["image_id"] == index + 1]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        assert corners == drawn.boxes.tolist()
        assert [a["category_id"] - 1 for a in mine] == drawn.labels.tolist()
        assert [a["area"] for a in mine] == [int(np.count_nonzero(m)) for m in drawn.masks]


def test_splits_hold_the_classes_they_are_for():
    base, novel = set(range(80)), set(range(80, 96))
    held = {s: Counter(label for i in range(n) for label in deal.labels(0, s, i))
            for s, n in synthetic.SIZES.items() if s != "train"}  # fmt: skip
    assert set(held["val"]) == base and set(held["support"]) == novel and set(held["test"]) == base | novel
    assert min(held["support"].values()) >= 200
    assert all(35 <= held["test"][c] <= 65 for c in novel)
    assert {label for i in range(60) for label in deal.labels(0, "train", i)} <= base
    assert synthetic.SIZES["train"] >= 3000


def test_boxes_are_tight_around_what_shows_of_each_object(pictures):
    for drawn in pictures:
        for mask, box in zip(drawn.masks, drawn.boxes.tolist(), strict=True):
            ys, xs = np.nonzero(mask)
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert 0 <= box[0] < box[2] <= scenes.SIDE and 0 <= box[1] < box[3] <= scenes.SIDE


def test_masks_are_the_objects_drawn_alone_less_what_lies_above(pictures):
    exact = 0
    for drawn in pictures:
        alone = [whole(i) for i in drawn.instances]
        for k, mask in enumerate(drawn.masks):
            above = np.any([np.zeros_like(mask), *alone[k + 1 :]], axis=0)
            expected = alone[k] & ~above
            assert not (mask & ~expected).any()  # clutter on top may hide more
            exact += (mask == expected).all()
    assert exact >= 0.75 * sum(len(d.masks) for d in pictures)


def test_every_object_stays_in_sight_and_apart(pictures):
    for drawn in pictures:
        for instance, mask in zip(drawn.instances, drawn.masks, strict=True):
            total = np.count_nonzero(draw_sticker(KINDS[instance.label], instance.pose).alpha > 0.5)
            assert np.count_nonzero(mask) >= 0.4 * total
        for k, a in enumerate(drawn.boxes.tolist()):
            for b in drawn.boxes[:k].tolist():
                shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
                areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
                assert shared / (areas - shared) <= 0.35


def test_nearly_every_object_asked_for_finds_a_place():
    asked = [deal.labels(0, "support", index) for index in range(25)]
    found = [synthetic.scene(0, "support", index).labels for index in range(25)]
    assert sum(map(len, found)) >= 0.97 * sum(map(len, asked))


def test_only_annotated_objects_are_pasted(monkeypatch):
    pasted = []
    paste = scenes._paste
    monkeypatch.setattr(scenes, "_paste", lambda canvas, item: (pasted.append(item), paste(canvas, item)))
    drawn = scenes.draw_scene(np.random.default_rng(3), [5, 90, 17])
    assert [p.label for p in pasted if p.label >= 0] == drawn.labels.tolist()
    assert len(pasted) > len(drawn.labels)  # there is clutter, and it has no class


def test_clutter_is_nameless_and_of_shapes_no_class_has():
    ours = {o.tobytes() for k in KINDS for p in k.parts for r in p.regions for o in r}
    rng = np.random.default_rng(0)
    for _ in range(300):
        thing = clutter.random_clutter(rng)
        assert thing.name == "" and thing.silhouette == ""
        assert not ours & {o.tobytes() for p in thing.parts for r in p.regions for o in r}


def test_an_empty_picture_has_no_boxes():
    drawn = scenes.draw_scene(np.random.default_rng(0), [])
    assert drawn.boxes.shape == (0, 4) and drawn.masks.shape == (0, scenes.SIDE, scenes.SIDE)


def test_novel_silhouettes_are_in_no_base_class():
    base, novel = {k.silhouette for k in BASE}, {k.silhouette for k in NOVEL}
    assert len(base) >= 48 and len(novel) == 16 and not base & novel
    masks = {k.silhouette: outline_mask(k) for k in KINDS}
    for new in novel:
        for old in base:
            a = masks[new]
            overlap = max((a & b).sum() / (a | b).sum() for b in (masks[old], masks[old][:, ::-1], masks[old][::-1]))
            assert overlap < 0.82, (new, old, overlap)


def test_no_two_classes_look_alike():
    assert len({k.name for k in KINDS}) == len({(k.silhouette, k.pattern) for k in KINDS}) == 96
    twins = Counter(k.silhouette for k in BASE)
    for silhouette, count in twins.items():
        assert len({k.body for k in BASE if k.silhouette == silhouette}) == count


def test_instances_of_one_class_differ_and_one_pose_repeats():
    rng = np.random.default_rng(0)
    for kind in (KINDS[0], KINDS[40], KINDS[95]):
        first, second = (random_pose(rng, 60) for _ in range(2))
        a, b, again = draw_sticker(kind, first), draw_sticker(kind, second), draw_sticker(kind, first)
        assert np.array_equal(a.rgb, again.rgb) and np.array_equal(a.alpha, again.alpha)
        assert a.alpha.shape != b.alpha.shape or np.abs(a.alpha - b.alpha).mean() > 0.02


@pytest.mark.parametrize("size", [22, 55, 56, 84, 110])
def test_a_sticker_is_as_long_as_asked_and_keeps_its_margin(size):
    for kind in KINDS[::7]:
        alpha = draw_sticker(kind, Pose(size=size, angle=20, outline=0.0)).alpha
        ys, xs = np.nonzero(alpha > 0.5)
        assert abs(max(np.ptp(ys), np.ptp(xs)) + 1 - size) <= 2
        edge = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert edge.max() == 0


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_reach_over_a_turned_object_and_leave_some_of_it_bare(name):
    ink = PATTERNS[name](5.0, 0.3)
    assert ink.ndim == 3 and ink.shape[2] == 2
    canvas = np.zeros((100, 100), np.uint8)
    cv2.fillPoly(canvas, list(np.round((ink + 1) * 50).astype(np.int32)), 1)
    assert canvas.mean() == 0 if name == "plain" else 0.1 < canvas.mean() < 0.75


def test_paints_are_in_the_palette():
    used = {p.paint for k in KINDS for p in k.parts}
    assert used <= set(PALETTE) | {"body", "accent"}
    assert all(any(p.paint == "body" for p in k.parts) for k in KINDS)


def test_a_complete_set_is_left_alone(demo, monkeypatch):
    before = digests(demo)
    monkeypatch.setattr(synthetic, "_draw_splits", lambda *_: pytest.fail("drawn again"))
    assert synthetic.draw_demo(demo, sizes=SMALL) == demo / "data.yaml"
    assert digests(demo) == before


def test_another_demo_set_is_replaced_whole(tmp_path):
    out = tmp_path / "demo"
    synthetic.draw_demo(out, processes=1, sizes={"train": 2})
    synthetic.draw_demo(out, seed=1, processes=1, sizes={"val": 1})
    assert {p.name for p in out.iterdir()} == {"data.yaml", "demo.json", "val"}
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_draw_leaves_nothing(tmp_path, stop):
    def interrupt(done: int, total: int) -> None:
        raise stop

    with pytest.raises(stop):
        synthetic.draw_demo(tmp_path / "demo", processes=1, sizes=SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_redraw_keeps_the_set_that_was_there(tmp_path):
    out = tmp_path / "demo"
    synthetic.draw_demo(out, processes=1, sizes={"train": 1})
    before = digests(out)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.draw_demo(out, seed=9, processes=1, sizes={"train": 1}, progress=interrupt)
    assert digests(out) == before and [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("name", ["holiday.jpg", "data.yaml"])
def test_a_folder_of_other_things_is_refused_and_untouched(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match="expected a new or empty folder"):
        synthetic.draw_demo(tmp_path, processes=1, sizes=SMALL)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_demo_set_with_other_things_beside_it_is_not_replaced(tmp_path):
    out = tmp_path / "demo"
    synthetic.draw_demo(out, processes=1, sizes={"train": 1})
    (out / "mine.txt").write_text("mine")
    assert synthetic.draw_demo(out, processes=1, sizes={"train": 1}) == out / "data.yaml"
    with pytest.raises(DataError, match=r"mine\.txt"):
        synthetic.draw_demo(out, seed=1, processes=1, sizes={"train": 1})
    assert (out / "mine.txt").exists()


def test_a_file_that_somebody_put_into_a_split_is_not_lost(tmp_path):
    out = tmp_path / "demo"
    synthetic.draw_demo(out, processes=1, sizes={"train": 1})
    (out / "train/holiday.jpg").write_text("mine")
    with pytest.raises(DataError, match=r"got other things \(train/holiday\.jpg\)"):
        synthetic.draw_demo(out, seed=1, processes=1, sizes={"train": 1})
    assert (out / "train/holiday.jpg").read_text() == "mine"


def test_labels_that_somebody_mended_are_not_lost(tmp_path):
    out = tmp_path / "demo"
    synthetic.draw_demo(out, processes=1, sizes={"train": 1})
    labels, later = out / "train/annotations.json", (out / "demo.json").stat().st_mtime + 60
    labels.write_text("{}")
    os.utime(labels, (later, later))
    with pytest.raises(DataError, match=r"files changed since \(train/annotations\.json\)"):
        synthetic.draw_demo(out, seed=1, processes=1, sizes={"train": 1})
    assert labels.read_text() == "{}"


def test_a_demo_set_of_another_task_is_not_replaced(tmp_path):
    out = tmp_path / "demo"
    draw_documents(out, processes=1, sizes={"train": 2})
    before = sorted(out.rglob("*.png"))
    with pytest.raises(DataError, match="few-shot detection, or a new folder, got a demo set for the classifier"):
        synthetic.draw_demo(out, processes=1, sizes={"train": 1})
    assert sorted(out.rglob("*.png")) == before
    synthetic.draw_demo(tmp_path / "other", processes=1, sizes={"train": 1})
    synthetic.draw_demo(tmp_path / "other", seed=1, processes=1, sizes={"train": 2})
    assert len(list((tmp_path / "other/train").glob("*.jpg"))) == 2, "one of its kind is"


def test_a_file_in_the_way_an_unknown_split_and_a_damaged_marker_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="got other things"):
        synthetic.draw_demo(tmp_path / "file", sizes=SMALL)
    with pytest.raises(DataError, match="trian"):
        synthetic.draw_demo(tmp_path / "new", sizes={"trian": 3})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "demo.json").write_text("{")
    with pytest.raises(DataError, match=r"demo\.json"):
        synthetic.draw_demo(tmp_path / "bad", sizes=SMALL)


def test_an_empty_folder_is_filled(tmp_path):
    assert synthetic.draw_demo(tmp_path, processes=1, sizes={"support": 1}).is_file()


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    synthetic.draw_demo(tmp_path / "demo", processes=1, sizes=SMALL, progress=lambda *pair: seen.append(pair))
    assert seen == [(3, 8), (4, 8), (6, 8), (8, 8)]


def test_the_generator_hash_is_recorded_and_covers_the_drawings(demo):
    sha = synthetic.generator_sha256()
    assert json.loads((demo / "demo.json").read_text())["generator_sha256"] == sha
    total, folder = hashlib.sha256(), Path(scenes.__file__).parent
    for file in sorted(f for f in folder.glob("*.py") if f.name != "sheets.py"):
        total.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    assert total.hexdigest() == sha


def test_a_set_that_was_drawn_before_the_hash_covered_less_is_left_as_it_is(tmp_path):
    """Its pictures are the same to the byte (docs/notebook.md); a set of any other hash is drawn anew."""
    synthetic.draw_demo(tmp_path / "demo", processes=1, sizes={"train": 1})
    marker, picture = tmp_path / "demo/demo.json", tmp_path / "demo/train/000000.jpg"
    identity = json.loads(marker.read_text())
    for sha, kept in ((synthetic.FIRST, True), ("0" * 64, False)):
        marker.write_text(json.dumps({**identity, "generator_sha256": sha}))
        picture.write_bytes(b"mine")
        synthetic.draw_demo(tmp_path / "demo", processes=1, sizes={"train": 1})
        assert (picture.read_bytes() == b"mine") is kept


def test_the_sheet_shows_all_classes(tmp_path):
    picture = cv2.imread(str(synthetic.sheet(tmp_path / "sheet.png", scenes=2)))
    assert picture.shape[1] > 1000 and picture.std() > 20
    with pytest.raises(DataError, match=r"\.png"):
        synthetic.sheet(tmp_path / "sheet.psd", scenes=1)
