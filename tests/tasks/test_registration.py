# SPDX-License-Identifier: AGPL-3.0-or-later
"""Draws become registered classes once, however many scorings look at them, and their thresholds judge the split."""

import numpy as np
import pytest
import torch

from fsdet.boxes import iou_matrix
from fsdet.data.shots import draw_shots
from fsdet.data.sources import load
from fsdet.data.store import ImageStore
from fsdet.detect.scoring import DEFAULT, Scoring, own_classes
from fsdet.detect.support import embed_instances, negative_rows, whole_images
from fsdet.errors import ConfigError
from fsdet.evaluation.scorer import fp_per_image
from fsdet.tasks import protocol
from fsdet.tasks.loading import load_trained
from fsdet.tasks.registration import draw_registered

SUBTRACT = Scoring(background="subtract")


@pytest.fixture(scope="module")
def drawn(best, small_demo):
    """(trained, data, registered) of 1 and 2 shots, one draw, the default and one other scoring."""
    trained, data = load_trained(best), load(small_demo)
    own = own_classes(range(data.num_base), data.num_base)
    return trained, data, draw_registered(trained, data, (1, 2), (0,), own, (DEFAULT, SUBTRACT))


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


def test_several_scorings_at_once_are_each_alone(best, small_demo):
    shared = {"data": str(small_demo), "shots": [1], "seeds": 1, "setting": "gfsod", "metric": "coco", "split": "test",
              "device": "cpu"}  # fmt: skip
    both = protocol.evaluate_scorings(best, [DEFAULT, SUBTRACT], **shared)
    alone = [protocol.evaluate_checkpoint(best, scoring=s, **shared) for s in (DEFAULT, SUBTRACT)]
    for one, two in zip(both, alone, strict=True):
        assert str({**one, "ms_per_image": 0}) == str({**two, "ms_per_image": 0})
    assert "scoring" not in both[0] and both[1]["scoring"] == {"background": "subtract"}
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
    with pytest.raises(ConfigError, match="leave --scoring out"):
        protocol.evaluate(trained, study, scoring=SUBTRACT)
