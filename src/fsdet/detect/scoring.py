# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which column of which branch speaks for which class, and how sure it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fsdet.detect.postprocess import PROTOTYPE, STANDARD
from fsdet.errors import ConfigError, did_you_mean, explain
from fsdet.models.detector import DualDetector
from fsdet.models.heads import Dense, unit

ROUNDING = 1e-5  # relative, of sigmoids that are computed twice
TRUST = 0.5  # in the objectness of a place, where a registered class is looked for: base classes have taught it
CALIBRATED_FROM = 0.05  # a lower score is not calibrated: it would be lifted by a cosine that says nothing
CHOICES = {"reduce": ("mean", "best", "lse"), "background": ("off", "subtract", "compete")}


@dataclass(frozen=True)
class Scoring:
    """How columns of registered classes are scored. The default is what README and notebook measure.

    reduce: of a class's K instances, their mean embedding; the best of K cosines; or the mean of exponentials (lse),
    log(1/K sum exp(logit_k)). compete: the sigmoid is multiplied by the share in a softmax over all columns.
    background: rows of the support images that are not the object, as `sigmoid(s (cos - largest background cos))`
    (subtract), or as further columns of the class's own softmax (compete, which needs `compete`).
    objectness: sqrt(objectness * score), by the standard branch's largest sigmoid; what `model.objectness` adds to
    logits is no probability. calibration: a in a * score + (1 - a) * cosine, for scores above .05; as Qiao et al. 2021
    (DeFRCN). rescore: what was found, of any class, is looked at a second time (`detect/rescore.py`).
    """

    reduce: str = "mean"
    compete: bool = True
    background: str = "off"
    objectness: bool = False
    calibration: float = 1.0
    rescore: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(explain(f"{' or '.join(allowed)}", f"'{getattr(self, name)}'", f"scoring {name}",
                                          f"use one of them.{did_you_mean(getattr(self, name), allowed)}"))  # fmt: skip
        if not 0 <= self.calibration <= 1:
            raise ConfigError(explain("a number from 0 to 1", str(self.calibration), "scoring calibration",
                                      "1 is without, .5 is usual"))  # fmt: skip
        if self.background == "compete" and not self.compete:
            raise ConfigError(explain("compete beside background=compete", "compete=false", "scoring",
                                      "background=subtract does without the softmax"))  # fmt: skip

    @property
    def usual(self) -> bool:
        """Whether a first look scores as by default."""
        return replace(self, rescore=False) == DEFAULT

    def changed(self) -> dict[str, Any]:
        """{switch: value} of what differs from the default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @staticmethod
    def of(values: Mapping[str, Any]) -> "Scoring":
        """From a mapping, as a study file has it, or as `parse` reads it; background: true is its better form.

        Raises:
            ConfigError: an unknown switch, or a value it does not take.
        """
        kinds = {f.name: type(f.default) for f in fields(Scoring)}
        out: dict[str, Any] = {}
        for name, value in values.items():
            if name not in kinds:
                raise ConfigError(explain(f"one of {', '.join(kinds)}", f"'{name}'", "scoring",
                                          f"correct the switch.{did_you_mean(str(name), kinds)}"))  # fmt: skip
            out[name] = _value(name, value, kinds[name])
        return Scoring(**out)

    @staticmethod
    def parse(text: str) -> "Scoring":
        """From `reduce=best,background=true`. Raises ConfigError."""
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if any(not sign or not value for _, sign, value in pairs):
            raise ConfigError(explain("switch=value,switch=value", f"'{text}'", "scoring", "write reduce=best"))
        return Scoring.of({name.strip(): value.strip() for name, _, value in pairs})


def _value(name: str, value: Any, kind: type) -> Any:
    """`value` of a switch as its own type."""
    truth = {"true": True, "on": True, "false": False, "off": False}.get(str(value).lower())
    if name == "background" and truth is not None:
        return BACKGROUND_FORM if truth else "off"
    if kind is bool and truth is not None:
        return truth
    try:
        return kind(value) if kind is not bool and not isinstance(value, bool) else {}[value]
    except (TypeError, ValueError, KeyError):
        wanted = {bool: "true or false", float: "a number", str: " or ".join(CHOICES.get(name, ()))}[kind]
        raise ConfigError(explain(wanted, repr(value), f"scoring {name}", "correct the value")) from None


BACKGROUND_FORM = "subtract"  # what background=true means
DEFAULT = Scoring()


@dataclass(frozen=True, eq=False)
class ClassShots:
    """One class's support: instances [K, D] unit rows; negatives [m, D] unit rows of the same images that are not the
    object, and the shot [m] that each of them is from."""

    instances: Tensor
    negatives: Tensor
    shot: Tensor

    def without(self, shots: Sequence[int]) -> "ClassShots":
        """The class as if it had been registered without these of its shots."""
        left = torch.ones(len(self.instances), dtype=torch.bool, device=self.instances.device)
        left[list(shots)] = False
        number = left.cumsum(0) - 1
        kept = left[self.shot]
        return ClassShots(self.instances[left], self.negatives[kept], number[self.shot[kept]])


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What to look for. standard: classes read from the standard branch, as its columns; labels they get.

    prototypes: [N, D] unit rows with `prototype_labels` [N]; `proxies`: learnt prototypes read as classes, as rows of
    the model's proxies, with their labels; agree: the logit of each of the model's own classes is the mean of its
    standard column and its proxy. shots: what each prototype was made of, for `scoring` other than the default, which
    needs the prototypes alone.
    """

    standard: tuple[int, ...] = ()
    standard_labels: tuple[int, ...] = ()
    prototypes: Tensor | None = None
    prototype_labels: tuple[int, ...] = ()
    proxies: tuple[int, ...] = ()
    proxy_labels: tuple[int, ...] = ()
    agree: bool = False
    shots: tuple[ClassShots, ...] = ()
    scoring: Scoring = DEFAULT

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(branch [T] uint8, labels [T] int64) of the score columns."""
        learnt = len(self.prototype_labels) + len(self.proxy_labels)
        branch = [STANDARD] * len(self.standard) + [PROTOTYPE] * learnt
        labels = [*self.standard_labels, *self.prototype_labels, *self.proxy_labels]
        return (torch.tensor(branch, dtype=torch.uint8, device=device),
                torch.tensor(labels, dtype=torch.int64, device=device))  # fmt: skip

    def without(self, column: int, shots: Sequence[int]) -> "Vocabulary":
        """The same with prototype `column` made without these of its shots; at least one is left."""
        kept = self.shots[column].without(shots)
        prototypes = self.prototypes.clone()  # type: ignore[union-attr]
        prototypes[column] = unit(kept.instances.mean(0))
        every = (*self.shots[:column], kept, *self.shots[column + 1 :])
        return replace(self, prototypes=prototypes, shots=every)


def class_scores(model: DualDetector, dense: Dense, words: Vocabulary) -> Tensor:
    """[B, A, T] scores in [0, 1] in the order of `Vocabulary.columns`.

    A column scores its sigmoid times its share in a softmax: what another class explains better is no find of this one
    (docs/notebook.md). A standard column shares with standard columns, so that no class that is registered takes from
    a base class; a column of the prototype branch shares with all. `Scoring` changes that for the support's
    prototypes, `compete` for proxies too.
    """
    own, *others = _columns(model, dense, words)
    scores, logits = own.sigmoid() * own.softmax(-1), torch.cat(others, -1)
    if not logits.shape[-1]:
        return scores
    if not words.scoring.usual and words.prototype_labels:
        return torch.cat((scores, _switched(model, dense, words, own, logits)), -1)
    share = torch.cat((own, logits), -1).softmax(-1)[..., own.shape[-1] :]
    return torch.cat((scores, logits.sigmoid() * share), -1)


def _columns(model: DualDetector, dense: Dense, words: Vocabulary) -> list[Tensor]:
    """Logits [B, A, n] of the standard columns, of the prototypes where there are any, and of the proxies."""

    def by_proxy(classes: Sequence[int]) -> Tensor:
        return model.head.similarity_logits(dense, unit(model.head.proxies[list(classes)]))

    standard, proxies = (_of(dense.standard, classes) for classes in (words.standard, words.proxies))
    if words.agree and words.standard:
        standard = (standard + by_proxy(words.standard)) / 2
    if words.proxies:
        learnt = by_proxy(words.proxies)
        proxies = (learnt + proxies) / 2 if words.agree else learnt
    if words.prototypes is None or not words.prototypes.shape[0]:  # not len(): an exported graph keeps it open
        return [standard, proxies]
    return [standard, model.head.similarity_logits(dense, words.prototypes, TRUST), proxies]


def _of(columns: Tensor, classes: Sequence[int]) -> Tensor:
    """Those of [B, A, C] columns; no copy where they are the first ones in order, as a detector's own classes are."""
    first = tuple(classes) == tuple(range(len(classes)))
    return columns[..., : len(classes)] if first else columns[..., list(classes)]


def worth_scoring(model: DualDetector, dense: Dense, words: Vocabulary, least: float) -> Dense:
    """One image without the places that no column scores above `least`, in their order.

    A score is a sigmoid times a share, so the sigmoid of the largest logit bounds it; of hundreds of registered classes
    the softmax is then made at a few places only. Scores of the places that stay are the same.
    """
    if not words.scoring.usual:
        return dense
    largest = [logits[0].amax(-1) for logits in _columns(model, dense, words) if logits.shape[-1]]
    if not largest:
        return dense
    sure = torch.stack(largest).amax(0).sigmoid()
    return dense.cut(slice(None), (sure > least * (1 - ROUNDING)).nonzero()[:, 0])


def _switched(model: DualDetector, dense: Dense, words: Vocabulary, own: Tensor, logits: Tensor) -> Tensor:
    """[B, A, N + proxies] scores of the prototype branch under `words.scoring`."""
    how, n = words.scoring, len(words.prototype_labels)
    logits = torch.cat((_reduced(model, dense, words, logits[..., :n]), logits[..., n:]), -1)
    sure, rivals = logits, None
    if how.background != "off":
        rivals = _largest_negative(model, dense, words)
    if how.background == "subtract":  # biases cancel: scale * (cosine - cosine)
        sure = torch.cat((torch.where(rivals > -torch.inf, logits[..., :n] - rivals, logits[..., :n]), logits[..., n:]),
                         -1)  # fmt: skip
    score = sure.sigmoid()
    if how.compete:
        whole = torch.cat((own, logits), -1).logsumexp(-1, keepdim=True).expand_as(logits)
        if how.background == "compete":
            whole = torch.cat((torch.logaddexp(whole[..., :n], rivals), whole[..., n:]), -1)
        score = score * (logits - whole).exp()
    score, learnt = score[..., :n], score[..., n:]
    if how.objectness and dense.standard.shape[-1]:
        score = (dense.standard.amax(-1, keepdim=True).sigmoid() * score).sqrt()
    if how.calibration < 1:
        raised = model.head.bias if dense.objectness is None else model.head.bias + TRUST * dense.objectness
        cosine = (logits[..., :n] - raised) / model.head.scale()
        mixed = how.calibration * score + (1 - how.calibration) * cosine.clamp(0, 1)
        score = torch.where(score > CALIBRATED_FROM, mixed, score)
    return torch.cat((score, learnt), -1)


def _reduced(model: DualDetector, dense: Dense, words: Vocabulary, mean: Tensor) -> Tensor:
    """[B, A, N] logits of classes from those of their instances."""
    if words.scoring.reduce == "mean":
        return mean
    each = _of_classes(model, dense, [s.instances for s in words.shots])
    if words.scoring.reduce == "best":
        return torch.stack([logits.amax(-1) for logits in each], -1)
    return torch.stack([logits.logsumexp(-1) - torch.tensor(float(logits.shape[-1])).log() for logits in each], -1)


def _largest_negative(model: DualDetector, dense: Dense, words: Vocabulary) -> Tensor:
    """[B, A, N] logits of the background row that is most like a place, by class; -inf for a class that has none.

    Only a class's own rows count: what stands beside one class in its support may be an object of another.
    """
    each = _of_classes(model, dense, [s.negatives for s in words.shots])
    lost = dense.embeddings.new_full(dense.embeddings.shape[:2], -torch.inf)
    return torch.stack([logits.amax(-1) if logits.shape[-1] else lost for logits in each], -1)


def _of_classes(model: DualDetector, dense: Dense, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Logits of all rows in one product, cut by class."""
    return model.head.similarity_logits(dense, torch.cat(list(rows)), TRUST).split([len(r) for r in rows], -1)


def own_classes(classes: Sequence[int], base: int, mode: str = "dual", *, tuned: bool = False) -> Vocabulary:
    """The model's own classes, by their numbers: base ones (below `base`) from the standard branch, novel ones that
    stage 3 added from their proxies. A model in prototype mode has never trained its standard branch, one in standard
    mode never its proxies: all from the other one.

    tuned: by stage 3, which trains both branches on every class, so that both speak for each. An episode trains the
    proxies of the base classes that it does not show, which may be none.
    """
    standard = tuple(c for c in classes if mode == "standard" or (c < base and mode != "prototype"))
    proxies = tuple(c for c in classes if c not in standard)
    return Vocabulary(standard, standard, proxies=proxies, proxy_labels=proxies, agree=tuned and mode == "dual")
