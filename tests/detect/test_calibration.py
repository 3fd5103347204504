# SPDX-License-Identifier: AGPL-3.0-or-later
"""A threshold from the support alone: what counts as found, what as wrong, what the rule makes of both, odd shots."""

import math
import re
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
import torch

from fsdet.data.transforms import Sample
from fsdet.detect import calibration
from fsdet.detect.calibration import Calibrator, Place, copies, outliers, propose
from fsdet.detect.postprocess import COMPANY
from fsdet.detect.scoring import ClassShots, Scoring, Vocabulary
from fsdet.models.build import build_model, model_spec
from fsdet.models.heads import Dense, unit

D = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(model_spec("yolov8n", "P3-P5", 2, D, 16, "anchors", True, 2)).eval()


def image(boxes, embeddings):
    """One image whose places have these boxes and embeddings; nothing of a base class in it."""
    n = len(boxes)
    return Dense(torch.zeros(n, 2), torch.ones(n), torch.zeros(1, n, 4, 16), torch.tensor(boxes)[None].float(),
                 unit(torch.stack(embeddings))[None], torch.full((1, n, 2), -20.0))  # fmt: skip


def axis(i, tilt=0.0):
    """The unit vector i, tilted a little towards the last axis."""
    return torch.nn.functional.normalize(torch.eye(D)[i] + tilt * torch.eye(D)[-1], dim=0)


BOX, FAR, PART, LOOSE = [10, 10, 50, 50], [60, 60, 90, 90], [12, 12, 30, 30], [5, 5, 48, 48]


def calibrator(model, rows, places, scoring=None):
    shots = tuple(ClassShots(torch.stack(r), torch.zeros(0, D), torch.zeros(0, dtype=torch.int64)) for r in rows)
    prototypes = torch.stack([unit(s.instances.mean(0)) for s in shots])
    words = Vocabulary(prototypes=prototypes, prototype_labels=tuple(range(len(rows))), shots=shots,
                       scoring=scoring or Scoring(compete=False))  # fmt: skip
    return Calibrator(model, words, places)


def score(model, a, b):
    """Score of a place with embedding `a` for the prototype `b`, without competition."""
    scale, bias = float(model.head.log_scale.exp()), float(model.head.bias)
    return 1 / (1 + math.exp(-scale * float(unit(a) @ unit(b)) - bias))


def alone(share):
    """The score of a detection that is one box."""
    return share / COMPANY


@torch.no_grad()
def test_a_shot_is_found_by_the_others_at_its_place_and_wrong_is_what_lies_outside(model):
    """Class 0 has two shots, in images a and b; class 1 one shot in image a."""
    rows = [[axis(0, 0.2), axis(0, -0.3)], [axis(3)]]
    look = calibrator(model, rows, [[Place("a", 0), Place("b", 0)], [Place("a", 1)]])
    boxes = torch.tensor([BOX, FAR]).float()
    look.look("a", image([BOX, LOOSE, PART, FAR], [axis(0), axis(0, 0.1), axis(1), axis(2)]), boxes)
    look.look("b", image([BOX, FAR], [axis(1), axis(0, 0.5)]), boxes[:1])
    found_a = alone(score(model, axis(0), rows[0][1]) + score(model, axis(0, 0.1), rows[0][1]))  # by b's shot
    assert look.positives[0] == pytest.approx([found_a, alone(score(model, axis(1), rows[0][0]))], abs=1e-5)
    both = unit(torch.stack(rows[0]).mean(0))
    # a: FAR alone is outside of the box (PART lies in it); b: FAR, although it looks like the class
    wrong = [alone(score(model, axis(2), rows[0][1])), alone(score(model, axis(0, 0.5), rows[0][0]))]
    assert look.negatives[0] == pytest.approx(wrong, abs=1e-5)
    assert alone(score(model, axis(0, 0.5), both)) != pytest.approx(look.negatives[0][1], abs=1e-5), (
        "not by its own shot"
    )
    assert len(look.negatives[1]) == 2 and look.positives[1] == [], "one shot is found by no other"
    elsewhere = max(score(model, axis(1), axis(3)), score(model, axis(0, 0.5), axis(3)))
    assert look.negatives[1][1] == pytest.approx(alone(elsewhere), rel=1e-4), "b shows no object of class 1"
    assert look.needs_copies(1) and not look.needs_copies(0)
    look.look_at_copy(1, image([FAR, BOX], [axis(4), axis(3, 0.1)]), torch.tensor(BOX).float())
    assert look.positives[1] == pytest.approx([alone(score(model, axis(3, 0.1), axis(3)))], abs=1e-5)


@torch.no_grad()
def test_a_shot_without_an_image_helps_to_find_the_others(model):
    rows = [[axis(0, 0.2), axis(0, -0.3)], [axis(3)]]
    look = calibrator(model, rows, [[None, Place("b", 0)], [None]])
    look.look("b", image([BOX, FAR], [axis(1), axis(0, 0.5)]), torch.tensor([BOX]).float())
    assert look.positives == [[pytest.approx(alone(score(model, axis(1), rows[0][0])), abs=1e-5)], []]
    assert not look.needs_copies(1) and list(look.proposals()) == [0], "nothing is said of a class without an image"


@torch.no_grad()
def test_a_shot_that_no_box_fits_is_found_with_nothing(model):
    look = calibrator(model, [[axis(0), axis(0)]], [[Place("a", 0), Place("b", 0)]])
    look.look("a", image([FAR], [axis(0)]), torch.tensor([BOX]).float())
    assert look.positives == [[0.0]]


def wrong_places(mean, deviation, n=400):
    """n scores whose logits are the quantiles of a normal."""
    normal = NormalDist(mean, deviation)
    return [1 / (1 + math.exp(-normal.inv_cdf((i + 0.5) / n))) for i in range(n)]


def logit(share):
    return math.log(share / (1 - share))


EVEN = [round(0.05 * i, 2) for i in range(21)]  # 0 to 1: the quantile of a share is that share


def test_the_upper_end_of_what_is_wrong_is_a_tail_of_its_normal():
    proposal = propose([0.99], wrong_places(-3.0, 1.2), together=None)
    assert logit(proposal.threshold) == pytest.approx(-3.0 + calibration.TAIL * 1.2, abs=0.02)
    assert proposal.how == "1 copies of its shot, 400 images without it"


def test_places_that_show_the_class_unlabelled_move_the_threshold_little():
    """One in eleven: median and upper quartile of the mixture are the normal's at .5 * 1.1 and .75 * 1.1."""
    wrong = wrong_places(-3.0, 1.2)
    clean, mixed = (propose([0.99], w).threshold for w in (wrong, wrong + [0.999] * 40))
    centre, upper = (NormalDist().inv_cdf(q * 1.1) for q in (0.5, 0.75))
    expected = -3.0 + 1.2 * (centre + calibration.TAIL * (upper - centre) / 0.6745)
    assert logit(mixed) == pytest.approx(expected, abs=0.02) and mixed < 1.5 * clean
    logits = [logit(w) for w in wrong + [0.999] * 40]
    naive = fmean(logits) + calibration.TAIL * stdev(logits)
    assert logit(mixed) - logit(clean) < 0.25 * (naive - logit(clean)), "what mean and deviation would make of it"


@pytest.mark.parametrize(("centre", "share"), [(-6.0, 0.4), (6.0, 0.52)])
def test_whatever_is_wrong_half_to_sixty_per_cent_of_the_shots_reach_it(centre, share):
    threshold = propose(EVEN, wrong_places(centre, 0.5), together=EVEN).threshold
    assert threshold == pytest.approx(share, abs=0.01)
    assert sum(p >= threshold - 1e-9 for p in EVEN) / len(EVEN) == pytest.approx(1 - share, abs=0.05)


def test_between_the_two_what_is_wrong_decides():
    assert logit(propose(EVEN, wrong_places(-1.2, 0.7), together=EVEN).threshold) == pytest.approx(-0.15, abs=0.02)


def test_a_few_shots_are_drawn_towards_all_classes_and_many_are_not():
    """0.52-quantiles: own 0.8, all 0.52; five shots weigh 5 / (5 + 50) in logits, 15,000 nearly all."""
    few, many = ([0.8] * n for n in (5, 15_000))
    wrong = wrong_places(6.0, 0.5)
    expected = logit(0.52) + 5 / 55 * (logit(0.8) - logit(0.52))
    assert logit(propose(few, wrong, together=EVEN).threshold) == pytest.approx(expected, abs=0.01)
    assert propose(many, wrong, together=EVEN).threshold == pytest.approx(0.8, abs=0.01)


def test_few_wrong_places_leave_the_usual_threshold_and_say_so():
    few = propose([0.9], [0.001] * (calibration.FEW - 1))
    assert few.threshold == calibration.USUAL and few.how.endswith("7 images without it: under 8, so 0.25")
    assert propose([0.1], []).threshold == pytest.approx(0.1), "a copy that scores less is the limit"
    assert propose([0.0], []).threshold == calibration.LEAST == propose([0.9], [0.0] * 50).threshold


@pytest.mark.parametrize(
    ("positives", "together", "told"),
    [
        ([0.0], None, ", lowered to 0.050, the least there is"),  # no copy is found
        ([0.1], None, ", lowered to 0.100, which its shots reach"),  # the median of the copies
        ([0.5], [0.5] * 9, ", raised to 0.500, which its shots reach"),  # every quantile of equal shots
        ([0.25], [0.25] * 9, ""),
        ([0.9], None, ""),
    ],
)
def test_the_sentence_of_a_threshold_ends_in_its_number(positives, together, told):
    proposal = propose(positives, [0.001] * 3, together=together)
    assert proposal.how.endswith(f"3 images without it: under 8, so 0.25{told}")
    assert float(re.findall(r"0\.\d+", proposal.how)[-1]) == pytest.approx(proposal.threshold, abs=5e-4)


def test_classes_share_their_spreads_and_their_shots(model):
    look = calibrator(model, [[axis(0)], [axis(3)]], [[Place("a", 0)], [Place("a", 1)]])
    look.positives = [[1.0], [1.0]]
    look.negatives = [wrong_places(-2.0, 0.5), wrong_places(-2.0, 1.0)]
    logits = [logit(p.threshold) for p in look.proposals().values()]
    assert logits == pytest.approx([-2 + calibration.TAIL * 0.625, -2 + calibration.TAIL * 0.875], abs=0.05)
    two = [Place("a", 0), Place("b", 0)]
    look = calibrator(model, [[axis(0)] * 2, [axis(3)] * 2], [two, two])
    look.positives, look.negatives = [[0.9, 0.9], [0.1, 0.1]], [wrong_places(6.0, 0.5)] * 2
    high, low = (p.threshold for p in look.proposals().values())
    assert 0.1 < low < high < 0.9 and high == propose([0.9] * 2, [1.0] * 9, together=[0.9, 0.9, 0.1, 0.1]).threshold


def test_copies_are_the_same_every_time_and_show_the_box(model):
    rng = np.random.default_rng(0)
    sample = Sample(rng.integers(0, 255, (80, 120, 3), np.uint8), np.float32([[0, 0, 120, 80], [30, 20, 60, 50]]),
                    np.array([4, 5]))  # fmt: skip
    for index in (0, 1):
        made, again = copies(sample, index, 96), copies(sample, index, 96)
        assert len(made) == calibration.COPIES and len({m.image.tobytes() for m in made}) == len(made)
        for one, two in zip(made, again, strict=True):
            assert np.array_equal(one.image, two.image) and one.image.shape == (96, 96, 3)
            x0, y0, x1, y1 = one.boxes[0]
            assert one.labels.tolist() == [4 + index] and 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96
            assert (x1 - x0) / (y1 - y0) == pytest.approx(1.5 if index == 0 else 1.0, rel=0.02)


def test_an_odd_shot_is_named_and_three_alike_are_not():
    alike = torch.stack([axis(0, t) for t in (0.1, -0.1, 0.2, 0.0)])
    assert outliers(alike) == [] and outliers(alike[:2]) == []
    [(k, likeness, usual)] = outliers(torch.cat((alike[:2], axis(1)[None], alike[2:])))
    assert k == 2 and likeness == pytest.approx(0.0, abs=1e-5) and usual > 0.7
    assert outliers(torch.stack((axis(0), axis(1)))) == [], "of two nobody knows which"
