# SPDX-License-Identifier: AGPL-3.0-or-later
"""MultiLoss: assign once, evaluate the active terms in float32, weigh, reduce once.

No other place reduces, weighs or masks a loss. A term with weight 0 is not evaluated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fsdet.assign import Assignment, assign
from fsdet.boxes import decode, encode, iou_pairs
from fsdet.errors import ConfigError, ShapeError, did_you_mean
from fsdet.losses.bce import bce_at
from fsdet.losses.ciou import ciou_loss
from fsdet.losses.clamped import cpe_clamped, dfl_clamped, supcon_clamped
from fsdet.losses.cpe import cpe_loss, cpe_rows
from fsdet.losses.dfl import dfl_loss
from fsdet.losses.supcon import rows_with_positive, supcon_loss
from fsdet.losses.triplet import triplet_loss, triplet_rows
from fsdet.losses.wiou import MEAN_FLOOR, wiou_loss
from fsdet.pairs import PairRows, background, balanced, pooled
from fsdet.peers import ALONE, Peers
from fsdet.types import BACKGROUND, IGNORED, DualOutput, LossReport, Targets

NAMES = ("bbox", "cls", "dfl", "supcon", "cpe", "triplet")
BBOX = ("wiou_v3", "wiou_v2", "wiou_v1", "ciou")
KINDS = {"dfl": (dfl_loss, dfl_clamped), "supcon": (supcon_loss, supcon_clamped), "cpe": (cpe_loss, cpe_clamped)}
MODES = {"standard": ("standard",), "prototype": ("prototype",), "dual": ("standard", "prototype")}


@dataclass(frozen=True, eq=False)
class Branch:
    """One classifier: logits [B, A, C]; column [B, M] of each box, -1 none, -2 ignored; known [B, C]."""

    logits: Tensor
    column: Tensor
    known: Tensor


@dataclass(frozen=True, eq=False)
class Positives:
    """The P anchors that answer for a box: image, anchor, box index [P], weight [P], target box [P, 4] px."""

    image: Tensor
    anchor: Tensor
    box: Tensor
    weight: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows of the pairwise losses: image and anchor of the labelled ones [N] and of the background ones [K]; weight [N]
    that the assigner gave them.
    """

    image: Tensor
    anchor: Tensor
    label: Tensor
    iou: Tensor
    back_image: Tensor
    back_anchor: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """One loss reduced: value with graph; count rows averaged over; rows detached, images their image index;
    saturated: which rows [count] a clamp has cut off, None for losses without a clamp.
    """

    value: Tensor
    count: int
    rows: Tensor
    images: Tensor
    saturated: Tensor | None = None


class MultiLoss(nn.Module):
    """The six losses of the dual-head detector as one objective.

    Args:
        weights: {loss: weight}; losses not named have weight 0.
        bbox: wiou_v3 | wiou_v2 | wiou_v1 | ciou.
        dfl, supcon, cpe: each its own name, or clamped: as older trainings clamped it, told by LossReport.saturated.
        pair_rows: at most this many embeddings, background included, enter a pairwise loss.
        mode: which classifiers train: standard | prototype | dual.
        topk: anchors a box may take.
        wiou_momentum: share of a committed step in WIoU's running mean.
    Raises:
        ConfigError: unknown loss, box loss or mode.
    """

    wiou_mean: Tensor
    wiou_pending: Tensor

    def __init__(
        self,
        weights: Mapping[str, float],
        bbox: str = "ciou",
        supcon_tau: float = 0.1,
        cpe_tau: float = 0.2,
        cpe_iou: float = 0.7,
        cpe_weighting: str = "linear",
        triplet_margin: float = 0.3,
        triplet_mining: str = "batch_hard",
        pair_rows: int = 512,
        mode: str = "dual",
        topk: int = 10,
        wiou_momentum: float = 0.01,
        dfl: str = "dfl",
        supcon: str = "supcon",
        cpe: str = "cpe",
    ) -> None:
        super().__init__()
        for key, word, choices in (("loss.bbox", bbox, BBOX), ("stage.mode", mode, MODES)):
            _one_of(key, word, choices)
        self.kinds = {"dfl": dfl, "supcon": supcon, "cpe": cpe}
        for name, word in self.kinds.items():
            _one_of(f"loss.{name}", word, (name, "clamped"))
        for name in weights:
            _one_of("loss.weights", name, NAMES)
        self.weights = {name: float(weights[name]) for name in NAMES if weights.get(name, 0.0) != 0}
        self.bbox, self.mode, self.topk, self.pair_rows = bbox, mode, topk, pair_rows
        self.supcon_tau, self.cpe_tau, self.cpe_iou, self.cpe_weighting = supcon_tau, cpe_tau, cpe_iou, cpe_weighting
        self.triplet_margin, self.triplet_mining, self.wiou_momentum = triplet_margin, triplet_mining, wiou_momentum
        self.peers: Peers = ALONE  # the processes whose images make up a batch with these
        self.register_buffer("wiou_mean", torch.ones(()))
        self.register_buffer("wiou_pending", torch.zeros(2))  # sum and count of finite 1 - IoU since the last commit

    def forward(
        self,
        output: DualOutput,
        targets: Targets,
        class_ids: Tensor,
        *,
        contrast: Callable[[Tensor], Tensor] | None = None,
        probe_at: tuple[Tensor, ...] = (),
        image_ids: tuple[str, ...] = (),
    ) -> LossReport:
        """The losses of one batch.

        Args:
            output: what the detector said. targets: the truth. class_ids: [N] data-set classes of the ways.
            contrast: [n, D] -> [n, Dp], the projection that CPE compares behind; None compares the embeddings.
        Returns:
            LossReport; every loss is float32, finite and connected also when there is no box, no way, no proxy.
        """
        with torch.autocast(output.boxes.device.type, enabled=False):
            branches = self._branches(output, targets, class_ids)
            found = self._assign(output, targets, branches)
            pos = _positives(found, targets)
            normaliser = self.peers.total(found.weight.sum()).clamp(min=1)
            terms = self._dense(output, branches, pos, normaliser)
            if self.weights.keys() & {"supcon", "cpe", "triplet"}:
                pairs = self._pairs(output, targets, class_ids, branches, found, pos)
                terms |= self._pairwise(self._pair_rows(output, contrast, pairs, branches))
        raw = {name: term.value for name, term in terms.items()}
        weighted = {name: self.weights[name] * value for name, value in raw.items()}
        return LossReport(
            total=torch.stack(tuple(weighted.values())).sum() if weighted else output.box_logits[:, :0].sum(),
            raw=raw,
            weighted=weighted,
            rows={name: term.count for name, term in terms.items()},
            positives=len(pos.image),
            normaliser=normaliser,
            row_values={name: term.rows for name, term in terms.items()},
            row_images={name: term.images for name, term in terms.items()},
            probe_at=probe_at,
            image_ids=image_ids,
            saturated={name: self._share(term) for name, term in terms.items() if term.saturated is not None},
            shared=not self.peers.alone,
        )

    @torch.no_grad()
    def commit(self) -> None:
        """Let the step just taken count in WIoU's running mean; the engine calls it for committed steps only."""
        total, count = self.peers.total(self.wiou_pending).unbind()
        mean = self.wiou_mean.lerp(total / count.clamp(min=1), self.wiou_momentum).clamp(min=MEAN_FLOOR)
        self.wiou_mean.copy_(torch.where(count > 0, mean, self.wiou_mean))
        self.discard()

    def discard(self) -> None:
        """Forget the forwards since the last commit: their step was rejected."""
        self.wiou_pending.zero_()

    def _branches(self, output: DualOutput, targets: Targets, class_ids: Tensor) -> list[Branch]:
        """The active classifiers with each box's column in them."""
        make = {"standard": _standard_branch, "prototype": _prototype_branch}
        return [make[name](output, targets, class_ids) for name in MODES[self.mode]]

    def _assign(self, output: DualOutput, targets: Targets, branches: list[Branch]) -> Assignment:
        """One assignment for all branches; a box scores by the branch that knows it best: novel classes start cold."""

        def score(image: Tensor, box: Tensor, anchor: Tensor) -> Tensor:
            found = torch.zeros(len(image), device=image.device)
            placed = torch.zeros_like(found, dtype=torch.bool)
            for branch in (b for b in branches if b.logits.shape[-1]):
                column = branch.column[image, box]
                logit = branch.logits.detach()[image, anchor, column.clamp(min=0)].float()
                found = torch.where(column >= 0, found.maximum(logit.sigmoid()), found)
                placed = placed | (column >= 0)
            return torch.where(placed, found, 1.0)  # a constant ranks by overlap alone

        boxes, reach = output.boxes.detach(), output.box_logits.shape[-1]
        return assign(
            boxes, score, output.points, output.strides, targets.boxes, targets.valid, reg_max=reach, topk=self.topk
        )

    def _dense(self, output: DualOutput, branches: list[Branch], pos: Positives, normaliser: Tensor) -> dict[str, Term]:
        """bbox, cls, dfl: weighted sums over the batch's normaliser, as YOLOv8 has them."""
        terms = {}
        points, strides = output.points[pos.anchor], output.strides[pos.anchor]
        bins = output.box_logits[pos.image, pos.anchor]
        if "bbox" in self.weights:
            # decoded again from the bins: the backward of output.boxes would visit every anchor for these few
            rows = self._box_rows(decode(bins, points, strides), pos.target)
            terms["bbox"] = Term((rows * pos.weight).sum() / normaliser, len(rows), rows.detach(), pos.image)
        if "cls" in self.weights:
            images = sum(_cls_rows(branch, pos).sum(1) for branch in branches)
            where = torch.arange(len(images), device=images.device)
            terms["cls"] = Term(images.sum() / normaliser, output.boxes[..., 0].numel(), images.detach(), where)
        if "dfl" in self.weights:
            rows, cut = self._rows("dfl", bins, encode(points, strides, pos.target))
            terms["dfl"] = Term((rows * pos.weight).sum() / normaliser, len(rows), rows.detach(), pos.image, cut)
        return terms

    def _rows(self, name: str, *args: object) -> tuple[Tensor, Tensor | None]:
        """Rows of dfl, supcon or cpe as configured, and which of them are saturated: None where nothing clamps."""
        loss, clamped = KINDS[name]
        return clamped(*args) if self.kinds[name] == "clamped" else (loss(*args), None)

    def _box_rows(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.bbox == "ciou":
            return ciou_loss(pred, target)
        if self.training:
            with torch.no_grad():
                miss = 1 - iou_pairs(pred, target)
                sound = miss.isfinite()
                self.wiou_pending += torch.stack((torch.where(sound, miss, 0.0).sum(), sound.sum()))
        return wiou_loss(pred, target, self.wiou_mean, version=int(self.bbox[-1]))

    def _pairs(
        self,
        output: DualOutput,
        targets: Targets,
        class_ids: Tensor,
        branches: list[Branch],
        found: Assignment,
        pos: Positives,
    ) -> Pairs:
        """Rows for the pairwise losses: positives balanced over classes, and the most confident clear background.

        Of several processes these are those of which `pooled` chooses, in the order of their images.
        """
        back_image, back_anchor = background(_clear(branches, targets, found), self.pair_rows // 4)
        label = _dataset_class(targets, class_ids, pos)
        keep = balanced(label, pos.weight, self.pair_rows - (len(back_image) if self.peers.alone else 0))
        keep = keep if self.peers.alone else keep.sort().values
        image, anchor = pos.image[keep], pos.anchor[keep]
        iou = iou_pairs(output.boxes[image, anchor].detach(), pos.target[keep])
        return Pairs(image, anchor, label[keep], iou, back_image, back_anchor, pos.weight[keep])

    def _pair_rows(
        self, output: DualOutput, contrast: Callable[[Tensor], Tensor] | None, pairs: Pairs, branches: list[Branch]
    ) -> PairRows:
        """Embeddings and projections of those rows, of all processes."""
        z = output.embeddings[pairs.image, pairs.anchor]
        back = output.embeddings[pairs.back_image, pairs.back_anchor]
        p, b = z, back
        if contrast is not None and "cpe" in self.weights:
            p, b = contrast(torch.cat((z, back)).float()).split((len(z), len(back)))
        own = PairRows(pairs.image, pairs.label, pairs.iou, z, p, back, b)
        if self.peers.alone:
            return own
        score = _confidence(branches)[pairs.back_image, pairs.back_anchor]
        return pooled(own, pairs.weight, score, self.pair_rows, self.peers)

    def _pairwise(self, pairs: PairRows) -> dict[str, Term]:
        """supcon, cpe, triplet: means over their rows."""
        z, label, terms = pairs.z, pairs.label, {}
        if "supcon" in self.weights:
            rows, cut = self._rows("supcon", z, label, self.supcon_tau)
            terms["supcon"] = self._mean(rows, pairs.image[rows_with_positive(label)], cut)
        if "cpe" in self.weights:
            rows, cut = self._rows(
                "cpe", pairs.p, pairs.iou, label, pairs.back_p, self.cpe_tau, self.cpe_iou, self.cpe_weighting
            )
            terms["cpe"] = self._mean(rows, pairs.image[cpe_rows(label, pairs.iou, self.cpe_iou)], cut)
        if "triplet" in self.weights:
            rows = triplet_loss(z, label, self.triplet_margin, self.triplet_mining, pairs.back_z)
            terms["triplet"] = self._mean(rows, pairs.image[triplet_rows(label, len(pairs.back_z))])
        return terms

    def _mean(self, rows: Tensor, images: Tensor, saturated: Tensor | None = None) -> Term:
        """The mean of a pairwise loss. Each process has all rows, so its share of the value is the world's part of it,
        its gradient that of its own rows, whole (peers.Peers.rows).
        """
        value = rows.sum() / max(1, len(rows))
        if not self.peers.alone:
            value = value - value.detach() * (1 - 1 / self.peers.world)
        return Term(value, len(rows), rows.detach(), images, saturated)

    def _share(self, term: Term) -> Tensor:
        """Which part of all rows a clamp has cut off here."""
        if self.peers.alone:
            return term.saturated.sum() / max(1, len(term.saturated))
        counts = torch.stack((term.saturated.sum(), term.saturated.new_tensor(len(term.saturated), dtype=torch.long)))
        return counts[0] / self.peers.total(counts)[1].clamp(min=1)


def _one_of(key: str, word: str, choices: Mapping | tuple) -> None:
    if word not in choices:
        raise ConfigError(f"{key}: expected one of {', '.join(choices)}, got {word!r}.{did_you_mean(word, choices)}")


def _standard_branch(output: DualOutput, targets: Targets, class_ids: Tensor) -> Branch:
    if output.standard.shape[-1] != targets.base_known.shape[-1]:
        raise ShapeError(
            f"MultiLoss expects targets.base_known [B, {output.standard.shape[-1]}] as output.standard has, "
            f"got {list(targets.base_known.shape)}"
        )
    return Branch(output.standard, targets.base_labels, targets.base_known)


def _prototype_branch(output: DualOutput, targets: Targets, class_ids: Tensor) -> Branch:
    """A box's column is its way, else the proxy of its base class unless a support prototype stands for that class."""
    ways, base = len(class_ids), targets.base_known.shape[-1]
    proxies = output.prototype.shape[-1] - ways
    if proxies not in (0, base) or targets.way_known.shape[-1] != ways:
        raise ShapeError(
            f"MultiLoss expects prototype logits of {ways} ways and 0 or {base} proxies and way_known [B, {ways}], "
            f"got {list(output.prototype.shape)} and {list(targets.way_known.shape)}"
        )
    column, known = targets.way_labels, targets.way_known
    if proxies:
        free = (torch.arange(base, device=known.device)[:, None] != class_ids[None]).all(1)
        label = targets.base_labels
        proxied = (column < 0) & (label >= 0) & free[label.clamp(min=0)]
        unsure = (column == BACKGROUND) & (label == IGNORED)
        column = torch.where(proxied, ways + label, column.masked_fill(unsure, IGNORED))
        known = torch.cat((known, targets.base_known & free), -1)
    return Branch(output.prototype, column, known)


def _positives(found: Assignment, targets: Targets) -> Positives:
    image, anchor = found.fg.nonzero(as_tuple=True)
    box = found.gt_index[image, anchor]
    return Positives(image, anchor, box, found.weight[image, anchor], targets.boxes[image, box].float())


def _cls_rows(branch: Branch, pos: Positives) -> Tensor:
    """[B, A] cross-entropy of one classifier; anchors of boxes it ignores count nothing."""
    column = branch.column[pos.image, pos.box]
    at = (column >= 0).nonzero().squeeze(-1)
    rows = bce_at(branch.logits, pos.image[at], pos.anchor[at], column[at], pos.weight[at], branch.known)
    heard = torch.ones_like(rows).index_put((pos.image, pos.anchor), (column != IGNORED).to(rows.dtype))
    return rows * heard


def _dataset_class(targets: Targets, class_ids: Tensor, pos: Positives) -> Tensor:
    """[P] data-set class of each positive's box, -1 where no label names it."""
    base, way = targets.base_labels[pos.image, pos.box], targets.way_labels[pos.image, pos.box]
    classes = torch.cat((class_ids, class_ids.new_full((1,), -1)))
    return torch.where(base >= 0, base, classes[torch.where(way >= 0, way, len(class_ids))])


def _confidence(branches: list[Branch]) -> Tensor:
    """[B, A] the highest logit of any branch."""
    score = torch.full(branches[0].logits.shape[:2], -1e9, device=branches[0].logits.device)
    for branch in (b for b in branches if b.logits.shape[-1]):
        score = score.maximum(branch.logits.detach().float().amax(-1))
    return score


def _clear(branches: list[Branch], targets: Targets, found: Assignment) -> Tensor:
    """[B, A] the `_confidence`, -inf within a box and in images where not every class is labelled."""
    sure = targets.base_known.all(-1) & targets.way_known.all(-1)
    return _confidence(branches).masked_fill(found.inside | found.fg | ~sure[:, None], -torch.inf)
