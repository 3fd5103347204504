# SPDX-License-Identifier: AGPL-3.0-or-later
"""The rival sees the shots that registration sees, nothing else of their images, and no run is made twice."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fsdet.data.images import read_rgb
from fsdet.data.shots import draw_shots
from fsdet.evaluation import summary
from fsdet.types import ImageRecord

NOVEL = list(range(80, 96))


@pytest.fixture
def rival(module):
    return module("rival")


@pytest.fixture
def fake(rival, monkeypatch, tmp_path):
    """Fine-tuning without training: (settings that were run, OUT, the shots that each run was given)."""
    (tmp_path / "base.pt").write_bytes(b"weights")
    made, taught = [], []

    def fine_tuned(args, data, shots, point, seed):
        made.append((len(shots), seed, point.lr, point.length, args.head_only))
        taught.append([(str(p.record.path), *p.record.boxes.ravel().tolist()) for p in shots])
        return point, {"steps": 1, "seconds": 1.0}

    def figures(scores, base, novel, false):
        point = scores
        return dict.fromkeys(summary.FIGURES, 0.5) | {"nAP50": 0.9 if point.lr == 0.003 else 0.1, "bAP": float("nan")}

    monkeypatch.setattr(rival, "fine_tuned", fine_tuned)
    monkeypatch.setattr(rival, "detections", lambda model, records, args: model)
    monkeypatch.setattr(rival, "fp_per_image", lambda *_: 0.0)
    monkeypatch.setattr(rival, "Scorer", lambda *_: SimpleNamespace(score=lambda model: model))
    monkeypatch.setattr(rival.summary, "figures", figures)
    return made, tmp_path, taught


def test_the_grid_runs_on_the_first_draw_and_its_best_on_all(rival, fake, demo, data):
    made, out, taught = fake
    words = ["finetune", str(demo), str(out), "--shots", "1", "--epochs", "30,60", "--lrs", "1e-2,3e-3"]
    assert rival.main([*words, "--seeds", "1"]) == 0
    assert [m[1:4] for m in made] == [(0, 0.01, "30 epochs"), (0, 0.01, "60 epochs"), (0, 0.003, "30 epochs"),
                                      (0, 0.003, "60 epochs")]  # fmt: skip
    made.clear()
    assert rival.main([*words, "--seeds", "3"]) == 0
    assert [m[1:4] for m in made] == [(1, 0.003, "30 epochs"), (2, 0.003, "30 epochs")]
    support = data.split("support")
    drawn = rival.shot_pictures(support, draw_shots(support, NOVEL, [1], 2, data.names))
    assert taught[-1] == [(str(p.record.path), *p.record.boxes.ravel().tolist()) for p in drawn]
    found = summary.read_results(out / "finetune.json")
    assert found["seeds"] == [0, 1, 2] and found["shots"]["1"]["nAP50"]["values"] == [0.9] * 3
    assert len(found["grid"]["1"]) == 4 and found["shots"]["1"]["bAP"]["values"] == [None] * 3


def test_a_run_that_is_lost_is_made_again_and_no_other(rival, fake, demo, capsys):
    made, out, _ = fake
    words = ["finetune", str(demo), str(out), "--shots", "1,2", "--epochs", "30", "--lrs", "3e-3", "--seeds", "2"]
    rival.main(words)
    log = out / "runs.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 4
    log.write_text("".join(json.dumps(r) + "\n" for r in rows if (r["k"], r["seed"]) != (2, 0)))
    made.clear()
    rival.main(words)
    assert [m[1] for m in made] == [0]
    made.clear()
    rival.main([*words, "--head-only"])
    assert len(made) == 4 and all(m[-1] for m in made) and (out / "finetune_head.json").is_file()
    log.write_text(log.read_text().replace(rows[0]["draw"], "0" * 16))
    assert rival.main(words) == 2 and "runs of other shots" in capsys.readouterr().err
    (out / "base.pt").write_bytes(b"other weights")
    made.clear()
    rival.main(words)
    assert len(made) == 4


def test_the_bound_wants_enough_labels_and_says_which_lack(rival, fake, demo, capsys, data):
    made, out, _ = fake
    assert rival.main(["bound", str(demo), str(out)]) == 2
    told = capsys.readouterr().err
    assert "expected 200 instances" in told and data.names[80] in told and not made
    counts = np.bincount(np.concatenate([r.labels for r in data.split("support")]))[80:]
    least = str(counts.min())
    assert f"--instances {least}" in told
    assert rival.main(["bound", str(demo), str(out), "--instances", least, "--steps", "10"]) == 0
    assert made == [(16, 0, 0.01, "10 steps", False)]  # every support image
    assert list(summary.read_results(out / "bound.json")["shots"]) == [least]


def test_shots_are_those_of_registration_and_all_else_is_blanked(rival, data):
    support = data.split("support")
    picks = draw_shots(support, NOVEL, [2], 1, data.names)
    pictures = rival.shot_pictures(support, picks)
    wanted = sorted((str(support[i].path), c, *support[i].boxes[j].tolist()) for c, r in picks.items() for i, j in r)
    taught = sorted((str(p.record.path), c, *box) for p in pictures
                    for c, box in zip(p.record.labels.tolist(), p.record.boxes.tolist(), strict=True))  # fmt: skip
    assert taught == wanted
    whole = {str(r.path): r for r in support}
    for p in pictures:
        assert len(p.record.boxes) + len(p.hidden) == len(whole[str(p.record.path)].boxes)


def test_grey_covers_what_is_hidden_and_nothing_that_is_taught(rival):
    image = np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)
    kept, hidden = np.array([[2.0, 2, 8, 8]]), np.array([[5.0, 5, 12, 12], [15, 0, 18, 3]])
    out = rival.blank(image, kept, hidden)
    grey = np.zeros((20, 20), bool)
    grey[5:13, 5:13] = grey[0:4, 15:19] = True
    grey[2:9, 2:9] = False
    assert (out[grey] == 114).all() and (out[~grey] == image[~grey]).all()


def test_base_images_come_once_before_any_comes_again_without_novel_objects(rival, data):
    records = data.split("train")
    records[0] = ImageRecord(records[0].path, records[0].size, np.array([[0.0, 0, 9, 9], [9, 9, 20, 20]], np.float32),
                             np.array([3, 85]))  # fmt: skip
    pictures = rival.replayed(data, 9, seed=0)
    paths = [p.record.path for p in pictures]
    assert sorted(paths[:6]) == sorted(r.path for r in records) and paths[6:] == paths[:3]
    first = pictures[paths.index(records[0].path)]
    assert first.record.labels.tolist() == [3] and first.hidden.tolist() == [[9, 9, 20, 20]]


def test_files_for_ultralytics_hold_shares_of_the_image_and_blanked_pixels(rival, data, tmp_path):
    record = data.split("support")[0]
    [plain, hidden] = rival.write_yolo([rival.Picture(record), rival.Picture(record.kept(np.arange(
        len(record.labels)) == 0), record.boxes[1:])], tmp_path, 192)  # fmt: skip
    assert plain.is_symlink() and plain.resolve() == record.path.resolve()
    row = [float(v) for v in (tmp_path / "labels/000001.txt").read_text().split()]
    x0, y0, x1, y1 = record.boxes[0].tolist()
    np.testing.assert_allclose(row, [record.labels[0], (x0 + x1) / 384, (y0 + y1) / 384, (x1 - x0) / 192,
                                     (y1 - y0) / 192], rtol=1e-6)  # fmt: skip
    want = rival.blank(read_rgb(record.path), record.boxes[:1], record.boxes[1:])
    assert (read_rgb(hidden) == want).all()


def test_a_place_may_be_two_classes_and_boxes_are_of_the_original(rival, tmp_path):
    record = ImageRecord(tmp_path / "a.png", (96, 192), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    rival.cv2.imwrite(str(record.path), np.zeros((96, 192, 3), np.uint8))
    raw = torch.zeros(1, 4 + 3, 1)
    raw[0, :, 0] = torch.tensor([48.0, 48, 20, 10, 0.9, 0.0, 0.6])  # cx cy w h px of the 96 x 96 input, 3 classes

    class Network(torch.nn.Module):
        def forward(self, image):
            assert image.shape == (1, 3, 96, 96)
            return raw, None

    model = SimpleNamespace(model=Network(), names={0: "a", 1: "b", 2: "c"})
    [found] = rival.detections(model, [record], SimpleNamespace(size=96, device="cpu", backbone="yolov8n"))
    assert found.labels.tolist() == [0, 2] and found.scores.tolist() == pytest.approx([0.9, 0.6])
    # scale .5, 24 px of padding above: centre (96, 48), 40 x 20 px
    assert found.boxes.tolist() == [[76, 38, 116, 58]] * 2


def test_a_base_training_is_not_made_again_nor_replaced(rival, demo, tmp_path, capsys):
    (tmp_path / "base.pt").write_bytes(b"weights")
    (tmp_path / "base.json").write_text(json.dumps({
        "what": "base", "backbone": "yolov8n", "images": 12, "epochs": 2, "optimizer": "MuSGD", "lr": 0.02, "size": 192,
        "seed": 0}))  # fmt: skip
    assert rival.main(["base", str(demo), str(tmp_path), "--images", "12"]) == 0
    assert "there already" in capsys.readouterr().out
    assert rival.main(["base", str(demo), str(tmp_path), "--images", "60"]) == 2
    assert "images 12" in capsys.readouterr().err and (tmp_path / "base.pt").read_bytes() == b"weights"


@pytest.mark.parametrize(("text", "told"), [("3", [0, 1, 2]), ("5-7", [5, 6, 7]), ("4-4", [4])])
def test_draws_are_a_number_or_a_range(rival, text, told):
    assert rival.seeds(text) == told
