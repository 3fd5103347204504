# SPDX-License-Identifier: AGPL-3.0-or-later
"""MultiLoss equals Ultralytics' loss where the two mean the same, and a loop over cells where only we mean it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.utils.loss import v8DetectionLoss

from fsdet.boxes import anchor_points, decode, iou_pairs, xyxy_to_xywh
from fsdet.errors import ConfigError, ShapeError
from fsdet.objective import MultiLoss, Term, _clear, _dataset_class, _positives
from fsdet.pairs import background
from fsdet.peers import Peers
from fsdet.types import DualOutput, Targets

STRIDES, SIZE, R = (8, 16, 32), 192, 16
SHAPES = [(SIZE // s, SIZE // s) for s in STRIDES]
POINTS, STRIDE = anchor_points(SHAPES, STRIDES)
A = len(POINTS)
DENSE = {"bbox": 7.5, "cls": 0.5, "dfl": 1.5}
ALL = {**DENSE, "supcon": 0.1, "cpe": 0.2, "triplet": 0.3}
MODES = ("standard", "prototype", "dual")


def make_output(images=2, base=5, ways=3, proxies=True, seed=0, width=8):
    """A detector's answer with leaves box_logits, embeddings, standard, prototype."""
    g = torch.Generator().manual_seed(seed)
    bins = (2 * torch.randn(images, A, 4, R, generator=g)).requires_grad_()
    embeddings = torch.randn(images, A, width, generator=g).requires_grad_()
    standard = (torch.randn(images, A, base, generator=g) - 3).requires_grad_()
    prototype = (torch.randn(images, A, ways + base * proxies, generator=g) - 3).requires_grad_()
    return DualOutput(POINTS, STRIDE, bins, decode(bins, POINTS, STRIDE), embeddings, standard, prototype)


def make_targets(images=2, base=5, ways=3, boxes=5, seed=0, valid=True):
    """Boxes of base classes 0..base-1; ways stand for classes base-1, base, base+1."""
    g = torch.Generator().manual_seed(seed)
    corner = 0.7 * SIZE * torch.rand(images, boxes, 2, generator=g)
    truth = torch.cat((corner, corner + 12 + 45 * torch.rand(images, boxes, 2, generator=g)), -1)
    kind = torch.randint(base + max(ways - 1, 0), (images, boxes), generator=g)
    base_labels = torch.where(kind < base, kind, -1)
    way_labels = torch.where((kind >= base - 1) & (ways > 0), kind - base + 1, -1)
    known = torch.ones(images, base, dtype=torch.bool), torch.ones(images, ways, dtype=torch.bool)
    return Targets(truth, base_labels, way_labels, torch.full_like(kind, valid, dtype=torch.bool), *known)


def ids(ways=3, base=5):
    return torch.arange(base - 1, base - 1 + ways)


def run(output, targets, weights=ALL, class_ids=None, contrast=None, **kwargs):
    return MultiLoss(weights, **kwargs)(output, targets, ids() if class_ids is None else class_ids, contrast=contrast)


def library(classes):
    model = nn.Linear(1, 1)
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    model.model = [SimpleNamespace(stride=torch.tensor([8.0, 16.0, 32.0]), nc=classes, reg_max=R)]
    return v8DetectionLoss(model)


@pytest.mark.parametrize("seed", range(4))
def test_standard_mode_equals_the_librarys_three_losses_and_their_gradient(seed):
    output, targets = make_output(seed=seed), make_targets(seed=seed, ways=0)
    output = replace(output, prototype=output.prototype[..., :0])
    report = MultiLoss(DENSE, mode="standard")(output, targets, ids(0))
    predictions = {
        "boxes": output.box_logits.flatten(2).permute(0, 2, 1),
        "scores": output.standard.permute(0, 2, 1),
        "feats": [torch.zeros(2, 1, *s) for s in SHAPES],
    }
    batch = {
        "batch_idx": torch.arange(2.0).repeat_interleave(5),
        "cls": targets.base_labels.flatten().float(),
        "bboxes": xyxy_to_xywh(targets.boxes).reshape(-1, 4) / SIZE,
    }
    want = library(5)(predictions, batch)[0] / 2  # the library multiplies by the batch
    got = torch.stack([report.weighted[name] for name in ("bbox", "cls", "dfl")])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    leaves = (output.box_logits, output.standard)
    for ours, theirs in zip(
        torch.autograd.grad(report.total, leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def own_columns(targets, ways, base, proxies, class_ids):
    """{branch: [B][M] column | 'none' | 'ignored'} and known, written out case by case."""
    standard, prototype = [], []
    for b_row, w_row in zip(targets.base_labels.tolist(), targets.way_labels.tolist(), strict=True):
        standard.append([{-1: "none", -2: "ignored"}.get(b, b) for b in b_row])
        row = []
        for b, w in zip(b_row, w_row, strict=True):
            if w >= 0:
                row.append(w)
            elif proxies and b >= 0 and b not in class_ids:
                row.append(ways + b)
            else:
                row.append("ignored" if w == -2 or (proxies and b == -2) else "none")
        prototype.append(row)
    known_base = targets.base_known.tolist()
    free = [[k and c not in class_ids for c, k in enumerate(row)] for row in known_base]
    known_proto = [w + (f if proxies else []) for w, f in zip(targets.way_known.tolist(), free, strict=True)]
    return {"standard": (standard, known_base), "prototype": (prototype, known_proto)}


def bce_by_loop(output, columns, report, assignment):
    """Sum of the cross-entropy of every cell that counts, in float64."""
    total = 0.0
    for name, (column, known) in columns.items():
        z = getattr(output, name).detach().double()
        cost0, cost1 = -torch.nn.functional.logsigmoid(-z), -torch.nn.functional.logsigmoid(z)
        for i in range(z.shape[0]):
            for a in range(z.shape[1]):
                own = column[i][assignment.gt_index[i, a]] if assignment.fg[i, a] else "none"
                w = assignment.weight[i, a].double()
                for c in range(z.shape[2]) if own != "ignored" else ():
                    if c == own:
                        total += w * cost1[i, a, c] + (1 - w) * cost0[i, a, c]
                    elif known[i][c]:
                        total += cost0[i, a, c]
    return total / report.normaliser.double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("proxies", [True, False])
def test_cls_is_the_sum_over_every_cell_that_counts(mode, proxies):
    output, targets = make_output(proxies=proxies), make_targets()
    targets.base_labels[0, 0], targets.way_labels[0, 0] = 1, -1
    targets.base_labels[0, 1], targets.way_labels[0, 1] = -2, -1
    targets.base_labels[1, 0], targets.way_labels[1, 0] = -1, -2
    targets.base_labels[1, 1], targets.way_labels[1, 1] = 4, -1  # a class that is a way, yet not labelled as one
    targets.base_labels[1, 2], targets.way_labels[1, 2] = 3, -2
    targets.base_known[0, :3] = False
    targets.way_known[1, 1] = False
    objective = MultiLoss(DENSE, mode=mode)
    report = objective(output, targets, ids())
    branches = objective._branches(output, targets, ids())
    assignment = objective._assign(output, targets, branches)
    columns = own_columns(targets, 3, 5, proxies, ids().tolist())
    columns = {k: v for k, v in columns.items() if mode in (k, "dual")}
    want = bce_by_loop(output, columns, report, assignment)
    torch.testing.assert_close(report.raw["cls"].double(), want, rtol=1e-5, atol=1e-5)


def test_a_base_class_that_is_a_way_trains_its_support_prototype_and_not_its_proxy():
    output, targets = make_output(), make_targets()
    run(output, targets, {"cls": 1.0}).total.backward()
    dropped = 3 + 4  # way 0 stands for base class 4
    assert (output.prototype.grad[..., dropped] == 0).all()
    assert (output.prototype.grad[..., :dropped] != 0).all()


def test_a_class_that_is_not_labelled_in_an_image_is_judged_only_at_its_own_boxes():
    output, targets = make_output(), make_targets(ways=0)
    output = replace(output, prototype=output.prototype[..., :0])
    targets.base_labels[0] = 2
    targets.base_known[0, 2] = targets.base_known[0, 3] = False
    report = run(output, targets, {"cls": 1.0}, ids(0), mode="standard")
    report.total.backward()
    touched = (output.standard.grad[0] != 0).any(0).tolist()
    assert touched == [True, True, True, False, True]
    assert 0 < (output.standard.grad[0, :, 2] != 0).sum() <= 50
    assert (output.standard.grad[1] != 0).all()


def test_one_assignment_serves_both_branches_and_counts_the_box_loss_once():
    output, targets = make_output(), make_targets()
    dual = run(output, targets, DENSE)
    assert dual.positives == dual.rows["bbox"] == dual.rows["dfl"] > 0
    same = replace(
        output, standard=torch.full_like(output.standard, -4), prototype=torch.full_like(output.prototype, -4)
    )
    a, b = run(same, targets, DENSE), run(same, targets, DENSE, mode="prototype")
    torch.testing.assert_close(a.raw["bbox"], b.raw["bbox"])
    assert a.raw["cls"] > b.raw["cls"]


def test_a_novel_class_is_assigned_by_the_branch_that_knows_it():
    """The prototype branch is cold (-20); the standard one is sure of one anchor, and that one must be chosen."""
    output, targets = make_output(), make_targets(boxes=1)
    targets.base_labels[:], targets.way_labels[:] = 2, -1
    truth = targets.boxes[0, 0]
    inside = ((truth[:2] < POINTS) & (truth[2:] > POINTS)).all(-1).nonzero().squeeze(-1)
    output = replace(output, boxes=truth.expand(2, A, 4), standard=torch.full_like(output.standard, -20.0))
    output = replace(output, prototype=torch.full_like(output.prototype, -20.0))
    output.standard[0, inside[-1], 2] = 5
    objective = MultiLoss(DENSE, topk=1)
    found = objective._assign(output, targets, objective._branches(output, targets, ids()))
    assert found.fg[0].nonzero().flatten().tolist() == [inside[-1]]


def test_a_box_that_no_branch_names_still_trains_the_box_branch():
    output, targets = make_output(proxies=False), make_targets()
    targets.base_labels[:], targets.way_labels[:] = 3, -1
    report = run(output, targets, DENSE, mode="prototype")
    assert report.positives > 0 and report.raw["bbox"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ways", "proxies"), [(0, True), (0, False), (3, False), (3, True)])
@pytest.mark.parametrize("bbox", ["ciou", "wiou_v3"])
@pytest.mark.parametrize("valid", [True, False])
def test_every_term_is_finite_and_connected_in_every_stage_and_without_boxes(mode, ways, proxies, bbox, valid):
    output, targets = make_output(ways=ways, proxies=proxies), make_targets(ways=ways, valid=valid)
    report = run(output, targets, class_ids=ids(ways), mode=mode, bbox=bbox)
    assert set(report.raw) == set(report.weighted) == set(report.rows) == set(ALL)
    for name, value in report.raw.items():
        assert value.requires_grad and value.isfinite() and value.dtype == torch.float32
        assert valid or name == "cls" or value == 0
    report.total.backward()
    assert output.box_logits.grad.isfinite().all() and output.embeddings.grad.isfinite().all()
    assert report.normaliser >= 1 and (valid or report.normaliser == 1)


def test_images_of_which_one_is_empty():
    output, targets = make_output(), make_targets()
    targets.valid[0] = False
    report = run(output, targets)
    assert report.positives > 0 and report.total.isfinite()
    assert (report.row_images["bbox"] == 1).all()


def test_a_single_positive_counts():
    output, targets = make_output(images=1), make_targets(images=1, boxes=1)
    report = run(output, targets, topk=1)
    assert report.positives == report.rows["bbox"] == report.rows["dfl"] == 1
    assert report.raw["bbox"] > 0 and report.raw["dfl"] > 0
    assert report.rows["supcon"] == 0 and report.raw["supcon"] == 0


def test_predictions_and_targets_are_compared_in_pixels():
    """A detector whose bins say exactly the truth at every anchor pays nothing for its boxes."""
    output, targets = make_output(images=1), make_targets(images=1, boxes=1)
    distance = torch.cat((POINTS - targets.boxes[0, 0, :2], targets.boxes[0, 0, 2:] - POINTS), -1) / STRIDE[:, None]
    low = distance.clamp(0, R - 1.001).floor().long()
    share = (distance - low).clamp(1e-9, 1 - 1e-9)
    bins = torch.full((1, A, 4, R), -30.0)
    bins.scatter_(-1, low[None, ..., None], (1 - share).log()[None, ..., None])
    bins.scatter_(-1, low[None, ..., None] + 1, share.log()[None, ..., None])
    output = replace(output, box_logits=bins, boxes=decode(bins, POINTS, STRIDE))
    report = run(output, targets, DENSE)
    assert report.positives > 0
    assert report.raw["bbox"].item() == pytest.approx(0, abs=1e-3)
    assert report.raw["dfl"] < 0.7  # the entropy of two bins is at most ln 2


def test_total_is_the_sum_of_the_weighted_and_weights_scale_the_raw():
    report = run(make_output(), make_targets())
    torch.testing.assert_close(report.total, sum(report.weighted.values()))
    for name, value in report.raw.items():
        torch.testing.assert_close(report.weighted[name], ALL[name] * value)


def test_a_loss_of_weight_zero_is_not_evaluated():
    output, targets = make_output(), make_targets()
    report = run(
        replace(output, embeddings=output.embeddings * torch.nan),
        targets,
        {**ALL, "supcon": 0, "cpe": 0, "triplet": 0.0},
    )
    assert set(report.raw) == set(DENSE) and report.total.isfinite()
    nothing = run(output, targets, {})
    assert nothing.total == 0 and nothing.total.requires_grad


def poison(output, field, where):
    value = getattr(output, field).detach().clone()
    value[where] = torch.nan
    changed = replace(output, **{field: value})
    return replace(changed, boxes=decode(changed.box_logits, POINTS, STRIDE))


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("standard", {"cls"}),
        ("prototype", {"cls"}),
        ("embeddings", {"supcon", "cpe", "triplet"}),
        ("box_logits", {"bbox", "dfl"}),
    ],
)
def test_nan_in_gives_nan_out_in_its_own_loss_and_names_its_image(field, names):
    output, targets = make_output(), make_targets()
    report = run(poison(output, field, 1), targets, cpe_iou=0.0)
    broken = {name for name, value in report.raw.items() if value.isnan()}
    assert names <= broken and report.total.isnan()
    for name in names:
        bad = report.row_values[name].isnan()
        assert 1 in report.row_images[name][bad].tolist()
    for name in names & {"cls", "bbox", "dfl"}:
        assert report.row_images[name][report.row_values[name].isnan()].unique().tolist() == [1]


def test_row_values_are_detached_and_reduce_to_the_raw_value():
    report = run(make_output(), make_targets(), cpe_iou=0.3)
    for name, values in report.row_values.items():
        assert not values.requires_grad and len(values) == len(report.row_images[name])
    for name in ("supcon", "cpe", "triplet"):
        assert report.rows[name] == len(report.row_values[name]) > 0
        torch.testing.assert_close(report.row_values[name].mean(), report.raw[name].detach())
    torch.testing.assert_close(report.row_values["cls"].sum() / report.normaliser, report.raw["cls"].detach())


def test_autocast_changes_nothing():
    output, targets = make_output(), make_targets()
    want = run(output, targets)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(output, targets)
    for name, value in want.raw.items():
        assert got.raw[name].dtype == torch.float32
        torch.testing.assert_close(got.raw[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_cost_what_their_float32_copy_does(dtype):
    output, targets = make_output(), make_targets()
    half = {n: getattr(output, n).detach().to(dtype) for n in ("box_logits", "embeddings", "standard", "prototype")}
    projector = nn.Linear(8, 6)  # float32, as a model's parameters are
    a = run(replace(output, **half), targets, contrast=projector)
    b = run(replace(output, **{n: v.float() for n, v in half.items()}), targets, contrast=projector)
    for name in ALL:
        torch.testing.assert_close(a.raw[name], b.raw[name], rtol=1e-5, atol=1e-5)


def test_two_micro_batches_weighed_by_their_normalisers_are_one_big_batch():
    output, targets = make_output(images=4), make_targets(images=4)

    def part(rows):
        fields = ("box_logits", "boxes", "embeddings", "standard", "prototype")
        o = replace(output, **{n: getattr(output, n)[rows] for n in fields})
        t = Targets(**{n: getattr(targets, n)[rows] for n in targets.__dataclass_fields__})
        return run(o, t, DENSE)

    whole, parts = run(output, targets, DENSE), (part(slice(0, 1)), part(slice(1, 4)))
    total = sum(p.normaliser for p in parts)
    torch.testing.assert_close(whole.normaliser, total)
    for name in DENSE:
        torch.testing.assert_close(whole.raw[name], sum(p.raw[name] * p.normaliser for p in parts) / total)


def test_pairwise_rows_are_capped_balanced_and_the_same_every_time():
    output, targets = make_output(), make_targets(boxes=8)
    corners = targets.boxes[:, :, None].split(2, -1)
    output.standard.data[((POINTS > corners[0]) & (POINTS < corners[1])).all(-1).any(1)] += 9  # confident inside boxes
    objective = MultiLoss(ALL, pair_rows=16)
    branches = objective._branches(output, targets, ids())
    found = objective._assign(output, targets, branches)
    pos = _positives(found, targets)
    pairs = objective._pairs(output, targets, ids(), branches, found, pos)
    again = objective._pairs(output, targets, ids(), branches, found, pos)
    assert len(pairs.label) == 12 and len(pairs.back_image) == 4
    assert torch.equal(pairs.anchor, again.anchor) and torch.equal(pairs.back_anchor, again.back_anchor)
    count = pairs.label.unique(return_counts=True)[1]
    assert count.max() - count.min() <= 1
    assert not found.inside[pairs.back_image, pairs.back_anchor].any()


def test_labels_of_pairs_are_data_set_classes_whichever_branch_names_them():
    """A novel way (class 5) in one image and a base class in the other: no positives across, one class each."""
    output, targets = make_output(), make_targets(boxes=1)
    targets.base_labels[:], targets.way_labels[:] = torch.tensor([[-1], [1]]), torch.tensor([[1], [-1]])
    objective = MultiLoss(ALL)
    found = objective._assign(output, targets, objective._branches(output, targets, ids()))
    pos = _positives(found, targets)
    classes = _dataset_class(targets, ids(), pos)
    assert classes[pos.image == 0].unique().tolist() == [5] and classes[pos.image == 1].unique().tolist() == [1]


def test_background_rows_come_only_from_images_where_everything_is_labelled():
    output, targets = make_output(), make_targets()
    targets.base_known[0, 1] = False
    objective = MultiLoss(ALL)
    branches = objective._branches(output, targets, ids())
    image, _ = background(_clear(branches, targets, objective._assign(output, targets, branches)), 20)
    assert image.tolist() == [1] * 20


def test_cpe_reads_rows_through_the_projector_when_one_is_given():
    output, targets = make_output(), make_targets()
    projector = nn.Linear(8, 6)
    same, other = (run(output, targets, {"cpe": 1.0}, contrast=c, cpe_iou=0.0) for c in (nn.Identity(), projector))
    torch.testing.assert_close(same.total, run(output, targets, {"cpe": 1.0}, cpe_iou=0.0).total)
    assert same.total != other.total
    other.total.backward()
    assert projector.weight.grad.abs().sum() > 0 and output.embeddings.grad.abs().sum() > 0


def test_every_head_output_gets_a_gradient():
    output, targets = make_output(), make_targets()
    run(output, targets).total.backward()
    for leaf in (output.box_logits, output.embeddings, output.standard, output.prototype):
        assert leaf.grad.abs().sum() > 0


def test_running_mean_moves_on_commit_only_and_not_in_evaluation():
    output, targets = make_output(), make_targets()
    objective = MultiLoss(DENSE, bbox="wiou_v3", wiou_momentum=0.25)
    objective(output, targets, ids())
    assert objective.wiou_mean == 1
    total, count = objective.wiou_pending.clone()
    assert count > 0
    objective.commit()
    torch.testing.assert_close(objective.wiou_mean, 1 + 0.25 * (total / count - 1))
    kept = objective.wiou_mean.clone()
    objective.commit()  # nothing new
    objective.eval()
    objective(output, targets, ids())
    objective.commit()
    assert torch.equal(objective.wiou_mean, kept)


def test_running_mean_is_that_of_the_positives_overlap():
    output, targets = make_output(), make_targets()
    objective = MultiLoss(DENSE, bbox="wiou_v3")
    found = objective._assign(output, targets, objective._branches(output, targets, ids()))
    pos = _positives(found, targets)
    objective(output, targets, ids())
    miss = 1 - iou_pairs(output.boxes[pos.image, pos.anchor], pos.target)
    torch.testing.assert_close(objective.wiou_pending[0] / objective.wiou_pending[1], miss.mean())


def test_running_mean_survives_nan_rejection_and_an_empty_step():
    output, targets = make_output(), make_targets()
    objective = MultiLoss(DENSE, bbox="wiou_v3")
    objective(poison(output, "box_logits", (0, slice(None))), targets, ids())
    assert objective.wiou_pending.isfinite().all()
    objective.discard()
    objective.commit()
    assert objective.wiou_mean == 1
    saved = {k: v.clone() for k, v in objective.state_dict().items()}
    objective(output, targets, ids())
    objective.load_state_dict(saved)  # what a rejected step does
    objective.commit()
    assert objective.wiou_mean == 1
    objective(output, make_targets(valid=False), ids())
    objective.commit()
    assert objective.wiou_mean == 1


def test_running_mean_never_falls_below_its_floor():
    objective = MultiLoss(DENSE, bbox="wiou_v3", wiou_momentum=1.0)
    objective.wiou_pending.copy_(torch.tensor([0.0, 10.0]))
    objective.commit()
    assert objective.wiou_mean.item() == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": {"bboxx": 1.0}}, "Did you mean 'bbox'"),
        ({"weights": DENSE, "bbox": "wiou_v4"}, "loss.bbox: expected one of wiou_v3"),
        ({"weights": DENSE, "mode": "dul"}, "Did you mean 'dual'"),
        ({"weights": DENSE, "dfl": "clamp"}, "loss.dfl: .*Did you mean 'clamped'"),
    ],
)
def test_unknown_names_are_refused_at_birth(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        MultiLoss(**kwargs)


def test_targets_that_do_not_fit_the_branches_are_refused():
    with pytest.raises(ShapeError, match="ways"):
        run(make_output(ways=2), make_targets(ways=3))
    with pytest.raises(ShapeError, match="base_known"):
        run(make_output(base=5), make_targets(base=4), mode="standard")


@pytest.mark.parametrize("name", ["dfl", "supcon", "cpe"])
def test_a_clamped_variant_is_off_by_default_and_tells_its_saturated_share(name):
    output, targets = make_output(), make_targets()
    live = run(output, targets, cpe_iou=0.0)
    assert live.saturated == {}
    sharp = {"supcon_tau": 0.02, "cpe_tau": 0.02, "cpe_iou": 0.0}
    report = run(output, targets, **sharp, **{name: "clamped"})
    assert set(report.saturated) == {name} and set(report.raw) == set(live.raw)
    share = report.saturated[name]
    assert 0 < share <= 1 and share.dtype == torch.float32 and not share.requires_grad and report.total.isfinite()
    assert run(output, make_targets(valid=False), **{name: "clamped"}).saturated[name] == 0


def test_the_clamped_dfl_kills_the_box_gradient_that_the_live_one_has():
    output, targets = make_output(), make_targets()  # bins of std 2: a mean above 15 over the four sides
    for kind, dead in (("dfl", False), ("clamped", True)):
        report = run(output, targets, {"dfl": 1.0}, dfl=kind)
        (got,) = torch.autograd.grad(report.total, output.box_logits)
        assert (got == 0).all() == dead
        assert report.saturated == ({"dfl": 1} if dead else {})


def test_with_as_many_ways_as_images_a_way_is_still_a_class_and_no_position():
    """Two ways, two images: exchanging the images exchanges nothing but the order of the rows."""
    output, targets = make_output(ways=2), make_targets(ways=2)
    assert targets.way_labels.max() > -1 and len(targets.boxes) == 2
    fields = ("box_logits", "boxes", "embeddings", "standard", "prototype")
    turned = replace(output, **{n: getattr(output, n).flip(0) for n in fields})
    flipped = Targets(**{n: getattr(targets, n).flip(0) for n in targets.__dataclass_fields__})
    a, b = run(output, targets, class_ids=ids(2)), run(turned, flipped, class_ids=ids(2))
    for name, value in a.raw.items():
        torch.testing.assert_close(b.raw[name], value)


def test_dfl_targets_are_distances_from_the_anchor_and_no_coordinates():
    """The same bins at anchors a cell apart, before boxes moved as far: the same loss."""
    moved = [
        run(replace(make_output(images=1), points=POINTS + s, boxes=make_output(images=1).boxes + s),
            replace(make_targets(images=1), boxes=make_targets(images=1).boxes + s), {"dfl": 1.0}).raw["dfl"]
        for s in (0.0, 64.0)
    ]  # fmt: skip
    torch.testing.assert_close(moved[0], moved[1])


class Two(Peers):
    """Process 0 of two, whose peer has said `theirs` beforehand."""

    def __init__(self, theirs):
        super().__init__(0, 2)
        self.theirs = torch.tensor(theirs)

    def total(self, values):
        return values + self.theirs if values.shape == self.theirs.shape else values


def test_the_share_of_clamped_rows_is_of_the_rows_of_all_processes():
    """3 of 4 here and 5 of 12 there: this process's part of 8 of 16."""
    loss = MultiLoss({"dfl": 1.0})
    cut = torch.tensor([True, True, True, False])
    term = Term(torch.zeros(()), 4, torch.zeros(4), torch.zeros(4, dtype=torch.long), cut)
    assert float(loss._share(term)) == 0.75
    loss.peers = Two([5, 12])
    assert float(loss._share(term)) == 3 / 16


def test_processes_choose_pairs_in_the_order_of_their_images(monkeypatch):
    """Rows of equal weight are taken by order; only that of the images is the same as one process has."""
    chosen, honest = [], MultiLoss._pair_rows
    monkeypatch.setattr(MultiLoss, "_pair_rows", lambda self, output, contrast, pairs, branches:
                        (chosen.append(pairs), honest(self, output, contrast, pairs, branches))[1])  # fmt: skip
    for peers in (Peers(), Peers(0, 2)):
        loss = MultiLoss({"supcon": 1.0})
        loss.peers = peers
        loss(make_output(), make_targets(), ids())
    alone, together = (pairs.image * A + pairs.anchor for pairs in chosen)
    assert torch.equal(together, together.sort().values) and set(alone.tolist()) == set(together.tolist())
    assert not torch.equal(alone, together), "alone, the best of each class come first"
