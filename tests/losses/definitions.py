# SPDX-License-Identifier: AGPL-3.0-or-later
"""What each loss is, written from its paper in float64, a row or a pair at a time: slow, and independent of ours.

Whatever a paper detaches is taken from `at`, the boxes where the gradient is asked for, so that finite differences of
a definition are the gradient that its paper means.
"""

import math

import torch

G = {"one": lambda u: 1.0, "linear": lambda u: u, "exp": lambda u: math.exp(u) - 1}


def bce(z, t):
    z, t = z.double(), t.double()
    return -(t * log_sigmoid(z) + (1 - t) * log_sigmoid(-z)).sum(-1)


def focal(z, t, gamma, alpha=None):
    z, t = z.double(), t.double()
    right = torch.where(t == 1, z, -z)
    weight = 1.0 if alpha is None else torch.where(t == 1, alpha, 1 - alpha)
    return (weight * (gamma * log_sigmoid(-right)).exp() * -log_sigmoid(right)).sum(-1)


def log_sigmoid(z):
    return -torch.logaddexp(torch.zeros_like(z), -z)


def dfl(logits, distance):
    """Eq. 6, one side at a time."""
    bins, out = logits.shape[-1], []
    for row, d in zip(logits.double().reshape(-1, bins), distance.double().flatten().tolist(), strict=True):
        d = min(max(d, 0.0), bins - 1.0)
        p, i = row - row.logsumexp(0), min(math.floor(d), bins - 2)
        out.append(-((1 - d + i) * p[i] + (d - i) * p[i + 1]))
    return torch.stack(out).reshape(-1, 4).mean(-1)


def unit(x):
    """x / sqrt(|x|^2 + 1e-6): the normalisation whose gradient is bounded at the zero vector."""
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def supcon(x, labels, tau):
    """Khosla's eq. 2, the double loop."""
    return cpe(x, torch.ones(len(x)), labels, x[:0], tau, 0.0, "one")


def cpe(x, iou, labels, background, tau, phi, weighting):
    """FSCE's eq. 3 to 5, the double loop."""
    z, n, out = unit(torch.cat((x, background))), len(x), []
    for i in range(n):
        positives = [p for p in range(n) if p != i and labels[p] == labels[i]]
        if labels[i] < 0 or not positives or iou[i] < phi:
            continue
        rest = [a for a in range(len(z)) if a != i and (a >= n or labels[a] >= 0)]
        log_sum = torch.stack([z[i] @ z[a] / tau for a in rest]).logsumexp(0)
        term = -sum(z[i] @ z[p] / tau - log_sum for p in positives) / len(positives)
        out.append(G[weighting](float(iou[i])) * term)
    return torch.stack(out)


def triplet(x, labels, margin, mining, background):
    """Every pair of rows."""
    z = unit(torch.cat((x, background)))
    label, out = labels.tolist() + [None] * len(background), []
    for i in range(len(x)):
        if label[i] < 0:
            continue
        d = {j: 2 - 2 * z[i] @ z[j] for j in range(len(z)) if j != i and label[j] != -1}
        positives, negatives = [d[j] for j in d if label[j] == label[i]], [d[j] for j in d if label[j] != label[i]]
        if not positives or not negatives:
            continue
        far, near = max(positives), min(negatives)
        if mining == "semi_hard":
            beyond = [n for n in negatives if n > far]
            near = min(beyond) if beyond else max(negatives)
        out.append((far - near + margin).clamp(min=0))
    return torch.stack(out)


def _overlap(p, t):
    """IoU, squared distance of the centres and squared diagonal of the enclosing box, of two boxes."""
    w = torch.minimum(p[2], t[2]) - torch.maximum(p[0], t[0])
    h = torch.minimum(p[3], t[3]) - torch.maximum(p[1], t[1])
    inter = w.clamp(min=0) * h.clamp(min=0)
    iou = inter / ((p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1]) - inter)
    apart = ((p[0] + p[2] - t[0] - t[2]) ** 2 + (p[1] + p[3] - t[1] - t[3]) ** 2) / 4
    wide = torch.maximum(p[2], t[2]) - torch.minimum(p[0], t[0])
    high = torch.maximum(p[3], t[3]) - torch.minimum(p[1], t[1])
    return iou, apart, wide**2 + high**2


def wiou(pred, target, mean, version, at=None):
    """Eq. 6 to 12, one box at a time."""
    pred, target, out = pred.double(), target.double(), []
    at = pred.detach() if at is None else at.double()
    for p, t, q in zip(pred, target, at, strict=True):
        iou, apart, _ = _overlap(p, t)
        still, _, cover = _overlap(q, t)
        beta = (1 - still.item()) / mean
        r = {1: 1.0, 2: beta**0.5, 3: beta / (3 * 1.9 ** (beta - 3))}[version]
        out.append(r * torch.exp(apart / cover.item()) * (1 - iou))
    return torch.stack(out)


def ciou(pred, target, at=None, eps=1e-3):
    """Eq. 10 and 11, one box at a time; eps px on the sides bounds the angle's gradient."""
    pred, target, out = pred.double(), target.double(), []
    at = pred.detach() if at is None else at.double()
    for p, t, q in zip(pred, target, at, strict=True):
        iou, apart, cover = _overlap(p, t)
        still, angle = _overlap(q, t)[0].item(), _angle(q, t, eps).item()
        v = _angle(p, t, eps)
        out.append(1 - iou + apart / cover + angle / (1 - still + angle + 1e-12) * v)
    return torch.stack(out)


def _angle(p, t, eps):
    a, b = (torch.atan2(x[2] - x[0] + eps, x[3] - x[1] + eps) for x in (p, t))
    return 4 / math.pi**2 * (b - a) ** 2
