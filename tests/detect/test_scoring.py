# SPDX-License-Identifier: AGPL-3.0-or-later
"""Scores of both branches: a column's sigmoid, times its share among those it has to win against; every switch against
its formula."""

import math
from dataclasses import replace

import pytest
import torch

from fsdet.detect.scoring import ClassShots, Scoring, Vocabulary, class_scores, own_classes, worth_scoring
from fsdet.errors import ConfigError
from fsdet.models.build import build_model, model_spec
from fsdet.models.heads import Dense, unit

D = 8


@pytest.fixture(scope="module", params=["as they are", "corrected"])
def model(request):
    """Its prototypes are compared as they are, or after an MLP that is no longer the identity."""
    torch.manual_seed(0)
    spec = model_spec("yolov8n", "P3-P5", 3, D, 16, "anchors", True, 3, refine=request.param == "corrected")
    model = build_model(spec).eval()
    if model.head.refine is not None:
        torch.nn.init.normal_(model.head.refine[-1].weight)
    return model


def dense_of(standard, embeddings):
    """Each place raised by an objectness of its own."""
    points = torch.zeros(len(standard), 2)
    return Dense(points, torch.ones(len(standard)), torch.zeros(1, len(standard), 4, 16),
                 torch.zeros(1, len(standard), 4), unit(embeddings)[None], standard[None],
                 torch.linspace(-1, 1, len(standard))[None, :, None])  # fmt: skip


def compared(model, rows):
    """Unit rows as lists of float64, corrected by the MLP where the model has one, a weight at a time."""
    rows = [r.detach().double() for r in rows]
    if model.head.refine is not None:
        first, last = (model.head.refine[i].double() for i in (0, 2))
        moved = [r + last.weight @ (first.weight @ r + first.bias).clamp(min=0) + last.bias for r in rows]
        rows = [m / m.norm() for m in moved]
        model.head.refine.float()
    return [r.detach().tolist() for r in rows]


def doubles(rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def by_hand(model, dense, words):
    """One point and one column at a time, in float64."""
    scale, bias = float(model.head.log_scale.exp().detach()), float(model.head.bias.detach())
    proxies = compared(model, [unit(row) for row in model.head.proxies])
    prototypes = compared(model, [*words.prototypes] if words.prototypes is not None else [])
    out = []
    seen = (dense.embeddings, dense.standard, dense.objectness)
    for z, standard, (higher,) in zip(*(x[0].double().tolist() for x in seen), strict=True):
        learnt = [scale * sum(a * b for a, b in zip(z, row, strict=True)) + bias + higher for row in proxies]
        mean = [(a + b) / 2 for a, b in zip(standard, learnt, strict=True)]
        logits = [(mean if words.agree else standard)[c] for c in words.standard]
        logits += [scale * sum(a * b for a, b in zip(z, row, strict=True)) + bias + higher / 2 for row in prototypes]
        logits += [(mean if words.agree else learnt)[c] for c in words.proxies]
        among = [logits[: len(words.standard)] if c < len(words.standard) else logits for c in range(len(logits))]
        wholes = [sum(map(math.exp, rivals)) for rivals in among]
        out.append([math.exp(v) / whole / (1 + math.exp(-v)) for v, whole in zip(logits, wholes, strict=True)])
    return torch.tensor(out, dtype=torch.float64)[None]


@pytest.mark.parametrize("agree", [False, True])
@pytest.mark.parametrize("own", [(), (0, 2), (0, 1, 2)])
def test_scores_are_the_definition(model, own, agree):
    torch.manual_seed(1)
    dense = dense_of(3 * torch.randn(5, 3), torch.randn(5, D))
    prototypes = torch.nn.functional.normalize(torch.randn(2, D), dim=-1)
    words = Vocabulary(own, own, prototypes, (3, 4), proxies=(1,), proxy_labels=(1,), agree=agree)
    torch.testing.assert_close(class_scores(model, dense, words).double(), by_hand(model, dense, words),
                               rtol=1e-5, atol=1e-7)  # fmt: skip


def test_a_new_class_loses_to_a_base_class_and_takes_nothing_from_it(model):
    z = torch.nn.functional.normalize(torch.randn(1, D), dim=-1)
    words = Vocabulary((0, 1), (0, 1), z, (3,))
    sure, doubtful = (
        class_scores(model, dense_of(torch.tensor([[v, -20.0, -20.0]]), z), words)[0, 0] for v in (20.0, -20.0)
    )
    assert sure[2] < 0.001 * doubtful[2] and sure[0] > 0.999
    dense = dense_of(torch.tensor([[-2.0, -3.0, -20.0]]), z)
    alone = class_scores(model, dense, Vocabulary((0, 1), (0, 1)))
    assert torch.equal(class_scores(model, dense, words)[..., :2], alone)


def test_a_class_alone_scores_its_sigmoid_two_share_and_nothing_is_empty(model):
    dense = dense_of(torch.tensor([[0.0, 0.0, 2.0]]), torch.ones(1, D))
    assert class_scores(model, dense, own_classes((0,), 3))[0, 0].tolist() == pytest.approx([0.5])
    assert class_scores(model, dense, own_classes((0, 1), 3))[0, 0].tolist() == pytest.approx([0.25, 0.25])
    assert class_scores(model, dense, Vocabulary()).shape == (1, 1, 0)


@pytest.mark.parametrize("agree", [False, True])
@pytest.mark.parametrize("least", [0.0, 0.05, 0.3, 0.9, 1.0])
@torch.no_grad()
def test_places_left_out_score_nothing_and_the_others_the_same(model, agree, least):
    torch.manual_seed(2)
    dense = dense_of(4 * torch.randn(200, 3) - 4, torch.randn(200, D))
    prototypes = torch.nn.functional.normalize(torch.randn(2, D), dim=-1)
    words = Vocabulary((0, 2), (0, 2), prototypes, (3, 4), proxies=(1,), proxy_labels=(1,), agree=agree)
    every = class_scores(model, dense, words)[0]
    left = worth_scoring(model, dense, words, least)
    some = class_scores(model, left, words)[0]
    found = (every.amax(1) > least).nonzero()[:, 0]
    places = [int((dense.embeddings[0] == row).all(1).nonzero()) for row in left.embeddings[0]]
    assert set(found.tolist()) <= set(places) and places == sorted(places)
    torch.testing.assert_close(some, every[places], atol=1e-6, rtol=1e-5)
    assert least < 0.3 or len(places) < 200
    switched = replace(words, scoring=Scoring(calibration=0.5))
    assert worth_scoring(model, dense, switched, least) is dense, "what is lifted is not bounded"
    assert worth_scoring(model, dense, Vocabulary(), least) is dense


def test_no_logit_is_too_large(model):
    dense = dense_of(torch.tensor([[1e4, -1e4, 0.0]]), torch.ones(1, D))
    words = Vocabulary((0, 1, 2), (0, 1, 2), unit(torch.ones(1, D)), (3,))
    assert class_scores(model, dense, words).isfinite().all()


def registered(scoring=None, negatives=(3, 0), own=(0, 2)):
    """Two classes of 1 and 3 shots, the first with negatives, beside base classes and one proxy."""
    g = torch.Generator().manual_seed(3)
    rows = [torch.nn.functional.normalize(torch.randn(k, D, generator=g), dim=-1) for k in (1, 3)]
    wrong = [torch.nn.functional.normalize(torch.randn(m, D, generator=g), dim=-1) for m in negatives]
    shots = tuple(ClassShots(r, n, torch.arange(len(n)) % len(r)) for r, n in zip(rows, wrong, strict=True))
    prototypes = torch.stack([unit(r.mean(0)) for r in rows])
    return Vocabulary(own, own, prototypes, (3, 4), proxies=(1,), proxy_labels=(1,), shots=shots,
                      scoring=scoring or Scoring())  # fmt: skip


def shared(logit, whole):
    """A sigmoid, times its share in `whole` where columns compete."""
    return (1 if whole is None else math.exp(logit) / whole) / (1 + math.exp(-logit))


def switched_by_hand(model, dense, words):
    """One point, one class, one instance at a time, in float64; all switches as the formulas have them."""
    how, scale, bias = words.scoring, float(model.head.log_scale.exp().detach()), float(model.head.bias.detach())
    raised, out = bias, []
    seen = (dense.embeddings, dense.standard, dense.objectness)
    [learnt_row, *prototypes] = doubles(compared(model, [unit(model.head.proxies[1]), *words.prototypes]))
    for z, standard, higher in zip(*(x[0].double() for x in seen), strict=True):
        bias, standard = raised + float(higher) / 2, standard.tolist()
        own = [standard[c] for c in words.standard]
        proxy = scale * float(z @ learnt_row) + raised + float(higher)
        logits, rivals = [], []
        for prototype, of in zip(prototypes, words.shots, strict=True):
            each = [scale * float(z @ row) + bias for row in doubles(compared(model, of.instances))]
            reduced = {"mean": scale * float(z @ prototype) + bias, "best": max(each),
                       "lse": math.log(sum(map(math.exp, each)) / len(each))}[how.reduce]  # fmt: skip
            logits.append(reduced)
            beside = doubles(compared(model, of.negatives))
            rivals.append(max((scale * float(z @ row) + bias for row in beside), default=None))
        whole = sum(math.exp(v) for v in [*own, *logits, proxy])
        row = [shared(v, sum(map(math.exp, own))) for v in own]
        for logit, rival in zip(logits, rivals, strict=True):
            sure = logit - rival if how.background == "subtract" and rival is not None else logit
            score, all_ = 1 / (1 + math.exp(-sure)), whole
            if how.background == "compete" and rival is not None:
                all_ += math.exp(rival)
            if how.compete:
                score *= math.exp(logit) / all_
            if how.objectness:
                score = math.sqrt(score / (1 + math.exp(-max(standard))))
            if how.calibration < 1 and score > 0.05:
                cosine = min(max((logit - bias) / scale, 0), 1)
                score = how.calibration * score + (1 - how.calibration) * cosine
            row.append(score)
        out.append([*row, shared(proxy, whole if how.compete else None)])
    return torch.tensor(out, dtype=torch.float64)[None]


SWITCHES = ["reduce=best", "reduce=lse", "compete=false", "background=subtract", "background=compete",
            "objectness=true", "calibration=.5", "compete=off,background=true",
            "reduce=best,background=compete,objectness=true,calibration=0.25"]  # fmt: skip


@pytest.fixture
def likely(model):
    """The model with a temperature at which scores are neither 0 nor 1."""
    old = {name: getattr(model.head, name).data.clone() for name in ("log_scale", "bias")}
    model.head.log_scale.data.fill_(math.log(4.0))
    model.head.bias.data.fill_(-0.5)
    yield model
    for name, value in old.items():
        getattr(model.head, name).data.copy_(value)


@pytest.mark.parametrize("text", SWITCHES)
def test_a_switch_is_its_formula(likely, text):
    torch.manual_seed(2)
    dense, words = dense_of(2 * torch.randn(40, 3), torch.randn(40, D)), registered(Scoring.parse(text))
    scores = class_scores(likely, dense, words)
    torch.testing.assert_close(scores.double(), switched_by_hand(likely, dense, words), rtol=1e-4, atol=1e-6)
    plain = class_scores(likely, dense, registered())
    assert (scores[..., 2:4] - plain[..., 2:4]).abs().max() > 0.01, "it changes the classes that are registered"
    assert torch.equal(scores[..., :2], plain[..., :2]), "and no base class"


def test_one_instance_is_the_same_in_every_reduction(likely):
    dense = dense_of(torch.randn(9, 3), torch.randn(9, D))
    hows = (Scoring(how, compete=False) for how in ("mean", "best", "lse"))  # the other class has three
    mean, best, lse = (class_scores(likely, dense, registered(how))[..., 2] for how in hows)
    torch.testing.assert_close(best, mean, rtol=1e-3, atol=1e-4)  # unit() divides by a length of 1 + 5e-7
    torch.testing.assert_close(lse, best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", SWITCHES)
def test_no_logit_is_too_large_for_a_switch(model, text):
    dense = dense_of(torch.tensor([[1e4, -1e4, 0.0]]), torch.ones(1, D))
    assert class_scores(model, dense, registered(Scoring.parse(text))).isfinite().all()
    assert class_scores(model, dense, registered(Scoring.parse(text), own=())).isfinite().all()


def test_a_class_without_some_shots_loses_their_rows_and_what_was_beside_them():
    shots = ClassShots(torch.eye(3, D), torch.arange(4.0)[:, None].expand(4, D), torch.tensor([0, 1, 1, 2]))
    left = shots.without([1])
    assert torch.equal(left.instances, torch.eye(3, D)[[0, 2]])
    assert left.negatives[:, 0].tolist() == [0, 3] and left.shot.tolist() == [0, 1]
    words = Vocabulary(prototypes=unit(torch.eye(3, D).mean(0))[None], prototype_labels=(0,), shots=(shots,))
    torch.testing.assert_close(words.without(0, [0, 1]).prototypes[0], torch.eye(3, D)[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "told"),
    [("reduse=best", "Did you mean 'reduce'"), ("reduce=bset", "Did you mean 'best'"), ("reduce", "switch=value"),
     ("objectness=maybe", "true or false"), ("calibration=2", "0 to 1"), ("calibration=x", "a number"),
     ("compete=false,background=compete", "compete beside background"), ("reduce=true", "mean or best or lse")],
)  # fmt: skip
def test_a_wrong_switch_is_one_clear_line(text, told):
    with pytest.raises(ConfigError, match=told):
        Scoring.parse(text)


def test_a_study_files_values_are_the_same_as_the_command_lines():
    assert Scoring.of({"background": True, "calibration": 0.5}) == Scoring.parse("background=true,calibration=.5")
    assert Scoring.of({"background": False, "compete": True}) == Scoring()


@pytest.mark.parametrize(
    ("mode", "tuned", "standard", "proxies", "agree"),
    [("dual", False, (0, 1), (2,), False), ("dual", True, (0, 1), (2,), True),
     ("standard", True, (0, 1, 2), (), False), ("prototype", True, (), (0, 1, 2), False)],
)  # fmt: skip
def test_a_class_is_read_from_what_its_stage_has_trained(mode, tuned, standard, proxies, agree):
    words = own_classes(range(3), 2, mode, tuned=tuned)
    assert (words.standard, words.proxies, words.agree) == (standard, proxies, agree)
