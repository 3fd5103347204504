# SPDX-License-Identifier: AGPL-3.0-or-later
"""Draws become registered classes once, however many scorings look at them, and their thresholds judge the split."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fsdet.boxes import iou_matrix
from fsdet.data.report import Report
from fsdet.data.shots import ShotFile, draw_shots
from fsdet.data.sources import DataSet, load
from fsdet.data.store import ImageStore
from fsdet.detect.postprocess import select
from fsdet.detect.predictor import Predictor
from fsdet.detect.rescore import KEPT, rescored
from fsdet.detect.scoring import DEFAULT, Scoring, Vocabulary, class_scores, own_classes
from fsdet.detect.support import embed_instances, negative_rows, whole_images
from fsdet.errors import ConfigError, DataError
from fsdet.evaluation.scorer import Scorer, fp_per_image
from fsdet.tasks import protocol
from fsdet.tasks.loading import load_trained
from fsdet.tasks.looking import dense_batches
from fsdet.tasks.registration import Registered, draw_registered
from fsdet.tasks.registration import drawn as drawn_shots
from fsdet.tasks.stamps import data_stamp
from fsdet.tasks.validation import without_classes
from fsdet.types import Detections

SUBTRACT = Scoring(background="subtract")


@pytest.fixture(scope="module")
def drawn(best, small_demo):
    """(trained, data, registered) of 1 and 2 shots, one draw, the default and one other scoring."""
    trained, data = load_trained(best), load(small_demo)
    own = own_classes(range(data.num_base), data.num_base)
    return trained, data, draw_registered(trained, data, drawn_shots(data, (1, 2), (0,)), own, (DEFAULT, SUBTRACT))


def test_prototypes_are_those_of_the_draw_and_every_shot_is_kept(drawn):
    trained, data, known = drawn
    assert set(known) == {(scoring, k, 0) for scoring in (DEFAULT, SUBTRACT) for k in (1, 2)}
    words = known[DEFAULT, 2, 0].words
    records, c = data.split("support"), data.num_base + 3
    picks = draw_shots(records, [c], [2], 0, data.names)[c]
    store = ImageStore(records, trained.spec["image_size"])
    rows = embed_instances(trained.model, [store.instance(*p) for p in picks], trained.spec["support_size"])
    torch.testing.assert_close(words.shots[3].instances, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(words.prototypes[3], torch.nn.functional.normalize(rows.mean(0), dim=0), rtol=1e-3,
                               atol=1e-4)  # fmt: skip
    assert words.prototype_labels == tuple(range(80, 96)) and words.standard == tuple(range(80))
    assert all(len(s.negatives) == len(s.shot) > 0 for s in known[SUBTRACT, 2, 0].words.shots)


def test_every_class_has_a_threshold_from_the_support_alone(drawn, best, small_demo):
    _, _, known = drawn
    for registered in known.values():
        assert set(registered.thresholds) == set(range(80, 96))
        assert all(0 < t <= 1 for t in registered.thresholds.values())


def test_negatives_are_no_object_and_the_likest_first(drawn):
    trained, data, _ = drawn
    store = ImageStore(data.split("support"), trained.spec["image_size"])
    with torch.inference_mode():
        [(dense, boxes)] = whole_images(trained.model, [store.sample(0)], trained.spec["image_size"])
    own, like = torch.from_numpy(boxes[0]), torch.nn.functional.normalize(torch.randn(16), dim=0)
    rows = negative_rows(dense, own, torch.zeros(0, 4), like)
    index = [int((dense.embeddings[0] - row).abs().sum(1).argmin()) for row in rows]
    fit = iou_matrix(own[None], dense.boxes[0])[0]
    assert 4 <= len(rows) <= 8 and (fit[index] < 0.5).all() and (fit[index[:4]] < 0.2).all()
    best_background = (dense.embeddings[0] @ like)[fit < 0.2].max()
    torch.testing.assert_close(rows[0] @ like, best_background)
    everywhere = torch.tensor([[0.0, 0.0, 96.0, 96.0]])
    far = negative_rows(dense, own, everywhere, like)
    index = [int((dense.embeddings[0] - row).abs().sum(1).argmin()) for row in far]
    assert (iou_matrix(everywhere, dense.boxes[0])[0][index] < 0.2).all(), "nothing near the class's other objects"


@pytest.mark.slow
def test_several_scorings_at_once_are_each_alone(best, small_demo):
    shared = {"data": str(small_demo), "shots": [1], "seeds": 1, "setting": "gfsod", "metric": "coco", "split": "test",
              "device": "cpu"}  # fmt: skip
    both = protocol.evaluate_scorings(best, [DEFAULT, SUBTRACT], **shared)
    alone = [protocol.evaluate_checkpoint(best, scoring=s, **shared) for s in (DEFAULT, SUBTRACT)]
    for one, two in zip(both, alone, strict=True):
        assert str({**one, "ms_per_image": 0}) == str({**two, "ms_per_image": 0})
    assert "scoring" not in both[0] and both[1]["scoring"] == {"background": "subtract"}
    trained, study = load_trained(best), protocol.Study(load(small_demo), "test", (1,), (0,), "gfsod", "coco")
    one, two = (found[1, 0] for _, _, found in protocol.evaluations(trained, study, None, (DEFAULT, SUBTRACT)))
    novel = [[d.scores[d.labels >= 80].sort().values for d in detections] for detections in (one, two)]
    assert any(len(a) != len(b) or (a - b).abs().max() > 1e-4 for a, b in zip(*novel, strict=True)), "two scorings"
    assert both[0]["novel"] == list(load(small_demo).novel)


def test_figures_at_the_thresholds_are_of_the_detections_above_them(drawn):
    trained, data, known = drawn
    study = protocol.Study(data, "test", (2,), (0,), "gfsod", "coco")
    found, _ = protocol.detections_of(trained, study, {"x": known[DEFAULT, 2, 0].words})
    limits = {c: float(np.quantile([s for d in found["x"] for s in d.scores[d.labels == c].tolist()] or [0.5], 0.8))
              for c in study.novel}  # fmt: skip
    told = protocol.Judge(study).at_threshold(limits, found["x"])
    records, right, truth = data.split("test"), {c: 0 for c in study.novel}, {c: 0 for c in study.novel}
    for record, d in zip(records, found["x"], strict=True):
        for c in study.novel:
            mine = d.boxes[(d.labels == c) & (d.scores >= np.float32(limits[c]))]
            wanted = torch.from_numpy(record.boxes[record.labels == c])
            truth[c] += len(wanted)
            right[c] += int((iou_matrix(wanted, mine) >= 0.5).any(1).sum()) if len(mine) and len(wanted) else 0
    recalls = [right[c] / truth[c] for c in study.novel if truth[c]]
    assert told["recall"] == pytest.approx(np.mean(recalls), abs=0.02)  # two boxes of one object may find two
    assert told["threshold"] == pytest.approx(np.mean(list(limits.values())))
    expected = fp_per_image(records, found["x"], study.novel, {c: np.float32(t) for c, t in limits.items()})
    assert str(told["fp_per_image"]) == str(expected)  # as text: nan equals itself


def test_switches_are_no_matter_of_a_detector_that_has_its_classes(best, small_demo, tmp_path):
    state = torch.load(best, weights_only=True)
    state["spec"]["base"] = state["spec"]["base"][:-1]  # the last class counts as one that stage 3 added
    torch.save(state, tmp_path / "tuned.pt")
    trained = load_trained(tmp_path / "tuned.pt")
    study = protocol.Study(load(small_demo), "test", (1,), (0,), "gfsod", "coco")
    with pytest.raises(ConfigError, match="leave out all of --scoring but rescore"):
        protocol.evaluate(trained, study, scoring=SUBTRACT)


@pytest.mark.parametrize("finetuned", [False, True])
def test_what_was_found_is_looked_at_again_where_that_is_asked_for(finetuned, best, tuned, small_demo):
    """Of registered and of learnt classes: each image as `rescored` has it, thresholds lowered, and it is said."""
    data, trained = load(small_demo), load_trained(best)
    if finetuned:
        trained = tuned
        splits = {split: [r.kept(r.labels < data.num_base) for r in data.split(split)] for split in data.splits}
        data = DataSet(data.root, data.base[:-1], data.base[-1:], splits, Report())
    trained = replace(trained, model=copy.deepcopy(trained.model))
    trained.model.head.bias.data.fill_(5)  # two steps of training leave nothing that is sure enough to be looked at
    for level in trained.model.head.standard:
        level.bias.data[0] += 14
    study, again = protocol.Study(data, "test", (1,), (0,), "gfsod", "coco"), Scoring(rescore=True)
    (plain, words, once), (results, _, twice) = protocol.evaluations(trained, study, None, (DEFAULT, again))
    assert "scoring" not in plain and results["scoring"] == {"rescore": True}
    [key] = words
    store, size = ImageStore(data.split("test"), trained.spec["image_size"]), trained.spec["support_size"]
    expected, branch_labels = [], words[key].columns(torch.device("cpu"))
    with torch.inference_mode():
        for seen in dense_batches(trained.model, store, trained.preprocessing):
            found = select(seen.dense.boxes, class_scores(trained.model, seen.dense, words[key]), *branch_labels)
            expected += rescored(trained.model, words[key], found, seen.images, size, 0.001)
    assert [len(d) for d in twice[key]] == [len(d) for d in expected]
    for second, known in zip(twice[key], expected, strict=True):
        torch.testing.assert_close(second.scores, known.scores)
    first, second = (torch.cat([d.scores for d in found[key]]) for found in (once, twice))
    assert len(first) and not torch.equal(first.sort().values, second.sort().values)
    at = [r["shots"][str(key[0])].get("at_threshold") for r in (plain, results)]
    if finetuned:
        assert at == [None, None]
    else:
        assert at[1]["threshold"]["mean"] == pytest.approx(KEPT * at[0]["threshold"]["mean"])


@pytest.fixture(scope="module")
def tuned(best, tmp_path_factory):
    """A checkpoint that says it was fine-tuned on two shots of draw 7: the last class of `best` as its novel one."""
    state = torch.load(best, weights_only=True)
    state["spec"]["base"] = state["spec"]["base"][:-1]
    state["spec"] |= {"shots": 2, "shot_split": "support", "draw": {"seed": 7, "unit": "image", "sha256": "e" * 64}}
    path = tmp_path_factory.mktemp("tuned") / "best.pt"
    torch.save(state, path)
    return load_trained(path)


def test_both_branches_speak_for_every_class_after_stage_3_alone(tuned, best):
    for trained, both in ((tuned, True), (load_trained(best), False)):
        base = len(trained.spec["base"])
        predictor = Predictor(trained.model, trained.classes, trained.preprocessing, base=base)
        assert [trained.own(range(base)).agree, predictor.frozen()[0].agree] == [both, both]


def test_stage_3_is_stamped_with_the_draw_it_was_trained_on(tuned, small_demo, caplog):
    data = load(small_demo)
    splits = {split: [r.kept(r.labels < data.num_base) for r in data.split(split)] for split in data.splits}
    one = DataSet(data.root, data.base[:-1], data.base[-1:], splits, Report())
    results = protocol.evaluate(tuned, protocol.Study(one, "test", (1,), (0,), "gfsod", "coco"))
    assert "too good" not in caplog.text
    assert results["seeds"] == [7] and list(results["shots"]) == ["2"]
    assert results["draws"] == {"2": {"unit": "image", "sha256": {"7": "e" * 64}}}


@pytest.mark.parametrize("finetuned", [True, False])
def test_a_split_that_holds_the_shots_is_no_test_and_is_said_to_be_none(finetuned, best, tuned, small_demo, caplog):
    data = load(small_demo)
    if finetuned:
        splits = {split: [r.kept(r.labels < data.num_base) for r in data.split(split)] for split in data.splits}
        data = DataSet(data.root, data.base[:-1], data.base[-1:], splits, Report())
    study = protocol.Study(data, "support", (1,), (0,), "gfsod", "coco")
    protocol.evaluations(tuned if finetuned else load_trained(best), study, None, (DEFAULT,))
    assert "split support is where the shots are from" in caplog.text and "--split test" in caplog.text


@pytest.mark.slow
def test_results_say_what_they_were_measured_on_and_which_shots_were_used(best, small_demo):
    found = protocol.evaluate_checkpoint(best, data=str(small_demo), shots=[1, 2], seeds=2)
    data, stamp = load(small_demo), found["data"]
    assert found["draws"]["2"]["unit"] == "instance" and set(found["draws"]["1"]["sha256"]) == {"0", "1"}
    assert found["draws"]["2"]["sha256"]["1"] == ShotFile.draw(data, [2], 1).sha256
    assert (found["split"], found["images"], stamp["name"]) == ("test", 8, "demo/data.yaml")
    assert (stamp["base"], stamp["novel"]) == (80, 16) and str(data.root) not in str(found)
    present = {c for r in data.split("test") for c in r.labels[~r.crowd].tolist()}
    assert stamp["novel_counted"] == len(present & set(range(80, 96))) > 0


def test_the_data_stamp_follows_labels_and_not_the_place(small_demo, tmp_path):
    data = load(small_demo)
    shutil.copytree(small_demo.parent, tmp_path / "demo")
    moved, records = load(tmp_path / "demo/data.yaml"), data.split("test")
    here = data_stamp(data, records, [])
    assert here == data_stamp(moved, moved.split("test"), []) == data_stamp(data, records[::-1], [])
    changed = [records[0].kept(np.arange(len(records[0].labels)) > 0), *records[1:]]
    assert (
        data_stamp(data, changed, [])["sha256"] != here["sha256"] != data_stamp(data, data.split("val"), [])["sha256"]
    )


def test_a_novel_class_without_objects_is_named(small_demo, caplog):
    data = load(small_demo)
    there = next(int(c) for r in data.split("test") for c in r.labels if c >= 80)
    splits = {"test": [r.kept(r.labels != there) for r in data.split("test")]}
    less = DataSet(data.root, data.base, data.novel, splits, Report())
    whole, judge = (protocol.Judge(protocol.Study(d, "test", (1,), (0,), "gfsod", "coco")) for d in (data, less))
    assert set(whole.counted) - set(judge.counted) == {there} and judge.counted
    assert data.names[there] in caplog.messages[-1] and "not counted in the mean" in caplog.messages[-1]


def test_false_positives_are_asked_of_the_classes_that_were_looked_for(best, small_demo):
    """An image that shows another novel class alone is one without the registered class."""
    data = load(small_demo)
    judge = protocol.Judge(protocol.Study(data, "test", (1,), (0,), "gfsod", "coco"))
    record = next(r for r in data.split("test") if (r.labels >= 80).any())
    sought = next(c for c in range(80, 96) if c not in record.labels)
    one = Detections(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0.9]), torch.tensor([sought]), torch.zeros(1).byte())
    assert np.isnan(fp_per_image([record], [one], judge.study.novel, 0.5)), "no image without all novel classes"
    judge.records, judge.scorer = [record], Scorer([record], 96)
    judge.base_only = Scorer(without_classes([record], 80), 96)
    words = Vocabulary(prototypes=torch.zeros(1, 16), prototype_labels=(sought,))
    known = {(DEFAULT, 1, 0): (Registered(words, {sought: 0.5}), [one])}
    row = judge.results(load_trained(best), [one], known, 1.0)["shots"]["1"]
    assert row["fp_per_image"]["mean"] == row["at_threshold"]["fp_per_image"]["mean"] == 1.0
    assert np.isnan(judge.false_positives([one], [], 0.5))


@pytest.mark.slow
def test_a_shot_file_is_registered_as_its_one_draw(best, small_demo, tmp_path, tuned):
    data, shared = load(small_demo), {"data": str(small_demo), "split": "test"}
    file, other_file = ShotFile.draw(data, [1, 2], 5), tmp_path / "other.json"
    file.save(tmp_path / "shots.json")
    given = protocol.evaluate_checkpoint(best, shot_file=tmp_path / "shots.json", **shared)
    assert given["seeds"] == [5] and list(given["shots"]) == ["1", "2"]
    here = protocol.evaluate(load_trained(best), protocol.Study(data, "test", (1, 2), (5,), "gfsod", "coco"))
    assert str(given["shots"]) == str(here["shots"]) and given["draws"] == here["draws"]
    second = {name: rows[1:] for name, rows in file.shots().items()}
    ShotFile(data.names, (1,), 9, "support", {1: second}, "image", nested=False).save(other_file)
    other = protocol.evaluate_checkpoint(best, shot_file=other_file, json_out=tmp_path / "out/results.json", **shared)
    assert other["seeds"] == [9] and other["draws"]["1"]["unit"] == "image"
    assert other["draws"]["1"]["sha256"]["9"] != given["draws"]["1"]["sha256"]["5"]
    used = drawn_shots(data, [1], [], ShotFile.load(other_file)).picks[1, 9]
    assert used == {
        c: rows[1:] for c, rows in draw_shots(data.split("support"), range(80, 96), [2], 5, data.names).items()
    }
    with pytest.raises(DataError, match=r"numbers of shots of the file: 1, 2, got 3"):
        protocol.evaluate_checkpoint(best, shot_file=tmp_path / "shots.json", shots=[3], **shared)
    with pytest.raises(ConfigError, match="leave --shot-file out"):
        protocol.evaluate_checkpoint(tuned.path, data=str(small_demo), shot_file=tmp_path / "shots.json")
