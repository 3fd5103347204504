# SPDX-License-Identifier: AGPL-3.0-or-later
"""Input that breaks the naive form of a loss, a test a row: first the naive result, then ours."""

import math

import pytest
import torch
import torch.nn.functional as F

from dataset_files import NAMES, data_yaml, yolo
from fsdet.data import sources
from fsdet.errors import DataError
from fsdet.losses.bce import bce_at, bce_loss
from fsdet.losses.ciou import ciou_loss
from fsdet.losses.cpe import cpe_loss
from fsdet.losses.dfl import dfl_loss
from fsdet.losses.focal import focal_loss
from fsdet.losses.supcon import supcon_loss
from fsdet.losses.triplet import triplet_loss
from fsdet.losses.wiou import MEAN_FLOOR, wiou_loss
from losses import definitions

R = 16


def slope(loss, leaf):
    leaf = leaf.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("naive", [lambda p: p.clamp(min=1e-6), lambda p: p + 1e-7], ids=["clamp", "plus eps"])
def test_dfl_target_bin_20_nats_below_the_others(naive):
    logits = torch.zeros(1, 4, R)
    logits[..., 5] = -20
    old = slope(lambda z: -naive(z.softmax(-1)[..., 5]).log(), logits)
    assert old.abs().max() < 0.01
    ours = slope(lambda z: dfl_loss(z, torch.full((1, 4), 5.0)), logits)
    torch.testing.assert_close(4 * ours[..., 5], -torch.ones(1, 4), rtol=1e-3, atol=0)


def test_dfl_clamped_mean_over_logits_of_std_2():
    g = torch.Generator().manual_seed(0)
    logits, distance = 2 * torch.randn(64, 4, R, generator=g), 15 * torch.rand(64, 4, generator=g)
    old = slope(lambda z: (4 * dfl_loss(z, distance)).mean().clamp(max=15), logits)
    assert (old == 0).all()
    assert (slope(lambda z: dfl_loss(z, distance), logits).abs().amax((1, 2)) > 0.1).all()


def test_dfl_nan_box_is_nan_and_no_index_out_of_range():
    distance = torch.full((2, 4), 3.5)
    distance[0, 2] = torch.nan
    assert not 0 <= int(distance[0, 2].long()) < R  # the index that a naive gather reads from
    logits = torch.zeros(2, 4, R, requires_grad=True)
    rows = dfl_loss(logits, distance)
    rows.sum().backward()
    assert rows.isnan().tolist() == [True, False] and logits.grad[1].isfinite().all()


@pytest.mark.parametrize("d", [15.0, 15.9999, 16.0, 1e4])
def test_dfl_target_at_or_beyond_the_last_bin_in_fp16_saturates(d):
    distance = torch.full((1, 4), d).half()
    assert d == 15 or int(distance[0, 0].floor()) + 1 > R - 1  # floor + 1 is no bin
    logits = torch.randn(1, 4, R, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dfl_loss(logits, distance), -logits.log_softmax(-1)[..., -1].mean(-1))


def test_class_id_beyond_nc_is_refused_at_load_with_file_and_line(tmp_path):
    with pytest.raises(IndexError):
        bce_at(torch.zeros(1, 1, 2), *(torch.tensor([i]) for i in (0, 0, 2)), torch.ones(1))
    yolo(tmp_path / "train")
    data_yaml(tmp_path, train="train/images", names=list(NAMES))
    (tmp_path / "train/labels/a.txt").write_text(f"0 0.5 0.5 0.2 0.2\n{len(NAMES)} 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match=r"train/labels/a\.txt:2: unknown class"):
        sources.load(tmp_path, policy="fail")
    assert all((record.labels < len(NAMES)).all() for record in sources.load(tmp_path).split("train"))


def test_bce_of_a_sigmoid_at_minus_120():
    z, t = torch.tensor([[-120.0]]), torch.ones(1, 1)
    assert slope(lambda x: F.binary_cross_entropy(x.sigmoid(), t), z) == 0
    assert slope(lambda x: bce_loss(x, t), z) == -1


def test_bce_beside_a_huge_logit_keeps_the_digits_of_the_other_columns():
    """softplus(z) - t z, summed over the columns, subtracts 1e4 from 1e4."""
    z, one, zero = torch.tensor([[[1e4, -3.0, -4.0]]]), torch.ones(1), torch.zeros(1, dtype=torch.long)
    naive = F.softplus(z).sum() - z[0, 0, 0]
    want = math.log1p(math.exp(-3)) + math.log1p(math.exp(-4))
    assert abs(naive - want) > 1e-4
    for known in (None, torch.ones(1, 3, dtype=torch.bool)):
        assert bce_at(z, zero, zero, zero, one, known).item() == pytest.approx(want, abs=1e-6)


def test_focal_logit_beyond_a_clamp_at_10():
    z, t = torch.tensor([[-10.1]]), torch.ones(1, 1)
    assert slope(lambda x: focal_loss(x.clamp(-10, 10), t), z) == 0
    assert slope(lambda x: focal_loss(x, t), z).item() == pytest.approx(-1.0007, abs=2e-4)


def test_focal_gamma_half_at_logit_20():
    z, t = torch.tensor([[20.0]]), torch.ones(1, 1)
    assert slope(lambda x: (1 - x.sigmoid()) ** 0.5 * -F.logsigmoid(x), z).isnan()
    assert slope(lambda x: focal_loss(x, t, 0.5), z).isfinite()


def test_any_masking_after_log_0_leaves_nan_in_the_gradient():
    """Forward finite, backward NaN; the floors forbid nan_to_num, and no loss here needs a mask."""
    x = torch.tensor([0.0, 1.0])
    assert slope(lambda p: torch.where(p > 0, p * p.log(), 0.0), x).isnan().any()
    for z in (-1e4, 1e4):
        leaf = torch.full((2, 3), z)
        for loss in (bce_loss, focal_loss):
            for t in (torch.zeros(2, 3), torch.ones(2, 3)):
                assert slope(lambda x, loss=loss, t=t: loss(x, t), leaf).isfinite().all()


def bundle():
    """Rows whose cosines are all above .7, the first on top of a row of the other class."""
    angle = torch.tensor([0.0, 0.5, 0.001, 0.3])
    return torch.stack((angle.cos(), angle.sin()), -1), torch.tensor([0, 0, 1, 1])


def contrasts(labels, background=0):
    """SupCon and CPE of the same rows at tau .07."""
    n = len(labels)
    back = lambda x: x.new_ones(background, x.shape[1])  # noqa: E731
    return {
        "supcon": lambda x: supcon_loss(x, labels, 0.07),
        "cpe": lambda x: cpe_loss(x, torch.ones(n), labels, back(x), 0.07, 0.5, "one"),
    }


@pytest.mark.parametrize("name", ["supcon", "cpe"])
def test_contrast_of_rows_whose_cosines_all_lie_above_a_logit_clamp(name):
    x, labels = bundle()

    def naive(e):
        z = F.normalize(e)
        logits = (z @ z.T / 0.07).clamp(max=10).masked_fill(torch.eye(4).bool(), -torch.inf)
        return logits.logsumexp(-1) - logits[[0, 1, 2, 3], [1, 0, 3, 2]]

    assert (F.normalize(x) @ x.T).min() > 0.7
    assert slope(naive, x).abs().max() == 0
    want = slope(lambda e: definitions.supcon(e, labels, 0.07), x.double())
    got = slope(contrasts(labels)[name], x).double()
    assert (got.norm(dim=-1) >= 0.99 * want.norm(dim=-1)).all() and want.norm() > 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["supcon", "cpe"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 0], [0, 1, 2], [], [0]], ids=str)
def test_contrast_of_identical_zero_single_class_distinct_or_no_rows(name, value, labels):
    x = torch.full((len(labels), 8), value)
    for background in (0, 2):
        leaf = x.clone().requires_grad_()
        rows = contrasts(torch.tensor(labels, dtype=torch.long), background)[name](leaf)
        (got,) = torch.autograd.grad(rows.sum(), leaf)
        assert rows.isfinite().all() and got.isfinite().all()
        assert len(rows) == (len(labels) if len(set(labels)) < len(labels) else 0)


def test_triplet_of_identical_embeddings_under_a_square_root():
    x, labels = torch.ones(4, 8), torch.tensor([0, 0, 1, 1])
    assert slope(lambda e: (e[0] - e[1]).square().sum().sqrt(), x).isnan().any()
    for mining in ("batch_hard", "semi_hard"):
        assert slope(lambda e, m=mining: triplet_loss(e, labels, 0.3, m), x).isfinite().all()


BOX_LOSSES = {"ciou": ciou_loss} | {
    f"wiou v{v}": lambda p, t, v=v: wiou_loss(p, t, 0.5, v) for v in (1, 2, 3)
}  # fmt: skip
POINT, LINE, FAR = [5.0, 5.0, 5.0, 5.0], [5.0, 0.0, 5.0, 9.0], [1e6, 1e6, 1e6 + 9, 1e6 + 7]


@pytest.mark.parametrize("name", BOX_LOSSES)
@pytest.mark.parametrize("pred", [POINT, LINE, FAR], ids=["point", "line", "far"])
@pytest.mark.parametrize("target", [POINT, LINE, FAR], ids=["point", "line", "far"])
def test_boxes_of_zero_area_in_the_same_place_or_1e6_px_apart(name, pred, target):
    p, t = torch.tensor([pred]), torch.tensor([target])
    assert BOX_LOSSES[name](p, t).isfinite().all()
    assert slope(lambda x: BOX_LOSSES[name](x, t), p).isfinite().all()


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_boxes_of_fp16_pixels_do_not_overflow_in_their_area(name):
    p, t = torch.tensor([[0.0, 0.0, 2000.0, 1500.0]]), torch.tensor([[10.0, 7.0, 1900.0, 1600.0]])
    half = p.half()
    assert ((half[:, 2] - half[:, 0]) * (half[:, 3] - half[:, 1])).isinf().all()
    torch.testing.assert_close(BOX_LOSSES[name](half, t.half()), BOX_LOSSES[name](p, t))


def test_wiou_of_points_far_apart_keeps_its_pull_where_a_clamped_exponent_would_lose_it():
    """Two points: d^2 / c^2 is 1 but for rounding, and a clamp at 1 is dead wherever that rounds up."""
    g = torch.Generator().manual_seed(0)
    place = (1e3 * torch.rand(2, 200, 2, generator=g)).repeat(1, 1, 2)
    got = slope(lambda p: wiou_loss(p, place[1], 1.0, 1), place[0])
    centre = (place[0] - place[1])[:, :2]
    want = math.e * centre / centre.square().sum(-1, keepdim=True)
    torch.testing.assert_close(got[:, :2], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e-30, MEAN_FLOOR])
def test_wiou_v3_at_beta_1000_and_mean_0(mean):
    beta = torch.tensor(1e3)
    assert (beta / (3 * 1.9 ** (beta - 3))).isfinite() and (beta**2 / 1.9**beta) == 0  # inf below, 0 above
    p, t = torch.tensor([[0.0, 0.0, 5.0, 5.0]]), torch.tensor([[50.0, 50.0, 60.0, 60.0]])
    rows = wiou_loss(p, t, torch.tensor(mean), 3)
    assert rows.isfinite().all() and slope(lambda x: wiou_loss(x, t, torch.tensor(mean), 3), p).isfinite().all()


def test_wiou_v3_one_nan_row_leaves_the_others_and_the_running_mean():
    """The mean itself: tests/test_objective.py, test_running_mean_survives_nan_rejection_and_an_empty_step."""
    p, t = torch.rand(3, 4).sort(-1).values * 50, torch.rand(3, 4).sort(-1).values * 50
    p[1, 0] = torch.nan
    rows = wiou_loss(p, t, 0.5, 3)
    assert rows.isnan().tolist() == [False, True, False]


def test_all_extremes_and_half_precision():
    """The last row of the table is tests/losses/test_numerics.py; here only that its cases do reach the extremes."""
    from losses.test_numerics import CASES

    assert {"bce", "bce at", "focal 2.0", "dfl", "supcon", "cpe one", "triplet batch_hard", "ciou", "wiou v3"} <= set(
        CASES
    )
    assert all(case.leaf.abs().max() > 5e3 for case in CASES.values())
