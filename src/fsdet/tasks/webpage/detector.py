# SPDX-License-Identifier: AGPL-3.0-or-later
"""One look of a few-shot detector at a test split, with the supports that its run has: registered, or trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fsdet.config import Config
from fsdet.data.shots import Picks, picks_sha256
from fsdet.data.sources import DataSet
from fsdet.data.store import ImageStore
from fsdet.data.transforms import support_window
from fsdet.detect.calibration import USUAL
from fsdet.detect.scoring import Vocabulary
from fsdet.detect.support import embed_instances
from fsdet.errors import DataError, counted
from fsdet.evaluation.outcomes import Outcome, outcomes
from fsdet.evaluation.scorer import Scorer
from fsdet.models.heads import unit
from fsdet.pictures import Picture
from fsdet.tasks.initial import shots_of
from fsdet.tasks.loading import Trained
from fsdet.tasks.looking import dense_batches, detect_batch
from fsdet.tasks.protocol import Study, registered
from fsdet.tasks.registration import drawn
from fsdet.tasks.supply import over_readable
from fsdet.tasks.validation import query_picture, without_classes
from fsdet.tasks.webpage.exhibit import Exhibit, looked_at
from fsdet.tasks.webpage.places import places_of
from fsdet.types import Detections, ImageRecord

USUAL_SHOTS = 5  # registered where no evaluation says another K
SHOTS_SHOWN, IMAGES_SHOWN = 10, 6


@dataclass(frozen=True, eq=False)
class Sought:
    """words: what is looked for. classes: the labels that the page is about. told: their supports, in words.

    picks, split: the supports. prototypes [N, D] of `classes` and shots {label: [K, D]} for the map; None without one.
    """

    words: Vocabulary
    classes: Sequence[int]
    told: str
    picks: Picks = field(default_factory=dict)
    split: str = "support"
    thresholds: Mapping[int, float] = field(default_factory=dict)
    prototypes: Tensor | None = None
    shots: Mapping[int, Tensor] = field(default_factory=dict)


@torch.inference_mode()
def look(trained: Trained, config: Config, data: DataSet, results: Mapping[str, Any], most: int) -> Exhibit:
    """At most `most` images of the split that eval.split names. results: the run's results.json, or nothing.

    Raises:
        DataError: no image, or too few supports.
    """
    records, told = looked_at(data, config.eval.split, most)
    sought = _sought(trained, config, data, results)
    if trained.spec["stage"] == "base" or not data.novel:
        records = without_classes(records, data.num_base)
    store = ImageStore(records, trained.spec["image_size"])
    found = over_readable(store, lambda: _detections(trained, store, sought.words))
    scores = Scorer(store.records, len(data.names), config.eval.metric).score(found)
    labels = sought.words.columns(torch.device("cpu"))[1].tolist()
    limits = dict.fromkeys(labels, USUAL) | dict(sought.thresholds)
    seen = outcomes(store.records, found, limits)
    shown = set(sought.classes)
    places = None
    if sought.prototypes is not None:
        places = places_of(trained.model, store, trained.spec["support_size"], sought.classes, sought.prototypes,
                           sought.shots)  # fmt: skip
    return Exhibit(
        f"{told}, looked at for this page by {trained.path.name}; {sought.told}. Found: IoU above .5 and a score from "
        f"{'the threshold that registration proposes' if sought.thresholds else f'{USUAL:g}'} up, as fsdet predict has "
        "it.", data.names, sought.classes, store.records, [o for o in seen if o.label in shown],
        supports=_supports(trained, data, sought), thresholds=sought.thresholds, precision=scores.class_precision,
        ap50=scores.class_ap50, chosen=_chosen(store.records, found, seen, limits, shown, data.names),
        places=places)  # fmt: skip


def _sought(trained: Trained, config: Config, data: DataSet, results: Mapping[str, Any]) -> Sought:
    base, novel = list(range(data.num_base)), list(range(data.num_base, len(data.names)))
    if trained.spec["stage"] == "base" or not novel:
        proxies = unit(trained.model.head.proxies[: len(base)]) if trained.spec["mode"] != "standard" else None
        return Sought(trained.own(base), base, "base classes through the model's own branch", prototypes=proxies)
    if trained.finetuned:
        return _tuned(trained, config, data, novel)
    k, seed = _draw(data, results)
    draws = drawn(data, [k], [seed])
    study = Study(data, config.eval.split, (k,), (seed,), config.eval.setting, config.eval.metric)
    [known] = registered(trained, study, None, draws).values()
    shots = {c: s.instances for c, s in zip(known.words.prototype_labels, known.words.shots, strict=True)}
    same = _same_draw(data, draws.picks[k, seed], results, k, seed)
    return Sought(known.words, novel, f"novel classes registered from {k} {'shot' if k == 1 else 'shots'} each, draw "
                  f"{seed} of split support{same}", draws.picks[k, seed], "support", known.thresholds or {},
                  known.words.prototypes, shots)  # fmt: skip


def _draw(data: DataSet, results: Mapping[str, Any]) -> tuple[int, int]:
    """(K, seed): the middle K and the first draw of an evaluation, else as many shots as each class has, at most 5."""
    ks = sorted(int(k) for k in results.get("shots", {}))
    if ks and results.get("seeds"):
        return ks[len(ks) // 2], int(min(results["seeds"]))
    counts = np.zeros(len(data.names), np.int64)
    for record in data.split("support"):
        counts += np.bincount(record.labels[~record.crowd], minlength=len(counts))
    return max(1, min(USUAL_SHOTS, int(counts[data.num_base :].min()))), 0


def _same_draw(data: DataSet, picks: Picks, results: Mapping[str, Any], k: int, seed: int) -> str:
    """Whether these are the shots of results.json, in words; empty where it does not say which they were."""
    theirs = results.get("draws", {}).get(str(k), {}).get("sha256", {}).get(str(seed))
    if theirs is None:
        return ""
    same = picks_sha256(data, "support", picks) == theirs
    return ", as in results.json" if same else " (results.json was made with other shots)"


def _tuned(trained: Trained, config: Config, data: DataSet, novel: Sequence[int]) -> Sought:
    """Stage 3: its novel classes are its own; the shots are those it was trained on, where they can be told."""
    setting = [*range(data.num_base), *novel] if config.eval.setting == "gfsod" else novel
    words = trained.own(setting)
    told = f"novel classes as fine-tuned on {counted(trained.spec['shots'], 'shot')} each"
    standard = trained.spec["mode"] == "standard"
    prototypes = None if standard else unit(trained.model.head.proxies[list(novel)])
    plain = Sought(words, novel, f"{told}, which cannot be told from the data any more", prototypes=prototypes)
    try:
        picks, split = shots_of(config, data)
    except DataError:
        return plain
    if picks_sha256(data, split, picks) != (trained.spec.get("draw") or {}).get("sha256"):
        return plain
    store = ImageStore(data.split(split), trained.spec["image_size"])
    shots = {} if standard else {
        c: embed_instances(trained.model, (store.instance(*p) for p in of), trained.spec["support_size"])
        for c, of in picks.items()}  # fmt: skip
    return replace(plain, told=told, picks=picks, split=split, shots=shots)


def _detections(trained: Trained, store: ImageStore, words: Vocabulary) -> list[Detections]:
    found: list[Detections] = []
    for seen in dense_batches(trained.model, store, trained.preprocessing):
        found += detect_batch(trained.model, seen, words)
    return found


def _supports(trained: Trained, data: DataSet, sought: Sought) -> dict[int, list[Picture]]:
    """Each class's shots as the detector sees them."""
    if not sought.picks:
        return {}
    store = ImageStore(data.split(sought.split), trained.spec["image_size"])
    out = {}
    for label in sought.classes:
        windows = [support_window(*store.instance(*pick), trained.spec["support_size"])
                   for pick in sought.picks.get(label, ())[:SHOTS_SHOWN]]  # fmt: skip
        out[label] = [Picture(window, box[None], colours=[label]) for window, box in windows]
    return out


def _chosen(records: Sequence[ImageRecord], found: Sequence[Detections], seen: Sequence[Outcome],
            limits: Mapping[int, float], shown: set[int], names: Sequence[str]) -> list[Picture]:  # fmt: skip
    """Images, evenly taken, among those that hold or are said to hold one of the classes."""
    telling = sorted({o.image for o in seen if o.label in shown})
    rows = np.unique(np.linspace(0, max(0, len(telling) - 1), min(IMAGES_SHOWN, len(telling))).round().astype(int))
    limit = torch.tensor([limits.get(label, torch.inf) for label in range(len(names))])
    return [query_picture(records[i].kept(np.isin(records[i].labels, sorted(shown))), found[i].above(limit), names)
            for i in (telling[row] for row in rows)]  # fmt: skip
