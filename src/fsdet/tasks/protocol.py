# SPDX-License-Identifier: AGPL-3.0-or-later
"""The few-shot protocol: K shots x draws on a test split, base and novel classes in one detection list."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fsdet.bank import PrototypeBank
from fsdet.data import sources
from fsdet.data.shots import ShotFile, possible
from fsdet.data.sources import DataSet
from fsdet.data.store import ImageStore
from fsdet.detect.calibration import USUAL
from fsdet.detect.predictor import class_shots
from fsdet.detect.rescore import KEPT
from fsdet.detect.scoring import DEFAULT, Scoring, Vocabulary, own_classes
from fsdet.errors import ConfigError, DataError, are, counted, explain
from fsdet.evaluation import summary
from fsdet.evaluation.scorer import Scorer, Scores, fp_per_image
from fsdet.models.build import model_sha256
from fsdet.progress import track
from fsdet.tasks.gallery import draw_gallery
from fsdet.tasks.loading import Trained, data_of, load_trained
from fsdet.tasks.looking import dense_batches, detect_batch
from fsdet.tasks.registration import Draws, Key, Registered, draw_registered, drawn
from fsdet.tasks.stamps import data_stamp, draws_stamp, tuned_stamp
from fsdet.tasks.validation import without_classes
from fsdet.types import Detections

log = logging.getLogger("fsdet")
FP_THRESHOLD = USUAL
USUAL_SHOTS = (1, 3, 5, 10)


@dataclass(frozen=True, eq=False)
class Study:
    """What is evaluated: data, classes, K and draws; shot_file: the one draw, instead of draws from split support."""

    data: DataSet
    split: str
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    setting: str
    metric: str
    shot_file: ShotFile | None = None

    @property
    def base(self) -> list[int]:
        return list(range(len(self.data.base)))

    @property
    def novel(self) -> list[int]:
        return list(range(len(self.data.base), len(self.data.names)))


def _own(trained: Trained, study: Study) -> Vocabulary:
    """The model's base classes in G-FSOD, none in FSOD."""
    return trained.own(study.base if study.setting == "gfsod" else ())


@torch.inference_mode()
def detections_of(trained: Trained, study: Study, words: Mapping[object, Vocabulary]) -> tuple[dict, dict]:
    """({key: [Detections per image]}, {key: ms per image of a pass with that vocabulary alone}); one pass in all."""
    store = ImageStore(study.data.split(study.split), trained.spec["image_size"])
    found: dict[object, list[Detections]] = {key: [] for key in words}
    batches = dense_batches(trained.model, store, trained.preprocessing)
    began, selecting = time.perf_counter(), dict.fromkeys(words, 0.0)
    for seen in track(batches, "evaluate", -(-len(store.records) // 16)):
        for key, vocabulary in words.items():
            start = time.perf_counter()
            found[key] += detect_batch(trained.model, seen, vocabulary)
            selecting[key] += time.perf_counter() - start
    network = time.perf_counter() - began - sum(selecting.values())
    images = max(len(store.records), 1)
    return found, {key: 1000 * (network + own) / images for key, own in selecting.items()}


def evaluate(trained: Trained, study: Study, bank: PrototypeBank | None = None, json_out: Path | None = None,
             scoring: Scoring = DEFAULT) -> dict:  # fmt: skip
    """The dict of results.json for one checkpoint.

    A stage-3 checkpoint knows its novel classes itself: it is evaluated once, under the K it was fine-tuned with.
    It is written to `json_out`, and pictures of the evaluation beside it.
    Raises:
        DataError: no novel classes, no such split, or too few instances for the largest K.
    """
    if not study.novel:
        raise DataError(explain("novel classes to evaluate", "none in the data YAML", "key novel",
                                "list them under novel:"))  # fmt: skip
    if not scoring.usual and bank is None and trained.finetuned:
        raise ConfigError(explain("a checkpoint that registers classes, or a bank", "one of stage 3",
                                  str(trained.path), "its novel classes are its own; leave out all of --scoring but "
                                  "rescore"))  # fmt: skip
    [(results, keyed, found)] = evaluations(trained, study, bank, (scoring,))
    if json_out is not None:
        summary.write_json(json_out, results)
        draw_gallery(trained, study, keyed, found, results, json_out.parent, drawn_shots=bank is None)
    return results


def evaluations(trained: Trained, study: Study, bank: PrototypeBank | None,
                scorings: Sequence[Scoring]) -> list[tuple[dict, dict, dict]]:  # fmt: skip
    """(results, {(K, seed): vocabulary}, {(K, seed): detections}) of each scoring; the images are looked at once."""
    draws = None
    if bank is None and not trained.finetuned:
        draws = drawn(study.data, study.shots, study.seeds, study.shot_file)
    if bank is None and study.split == (draws.split if draws else trained.spec.get("shot_split")):
        log.warning("split %s is where the shots are from: their own images are judged too, so that figures on it "
                    "are too good. Next: --split test", study.split)  # fmt: skip
    keyed = registered(trained, study, bank, draws, scorings)
    stamp = draws_stamp(study.data, draws) if draws else {} if bank else tuned_stamp(trained.spec)
    alone = own_classes(study.base, len(study.base), trained.spec["mode"])
    found, ms = detections_of(trained, study, {"standard": alone, **{key: r.words for key, r in keyed.items()}})
    judge = Judge(study)
    out = []
    for scoring in scorings:
        mine = {key: (keyed[key], found[key]) for key in keyed if key[0] == scoring}
        results = judge.results(trained, found["standard"], mine, sum(ms[key] for key in mine) / len(mine))
        results |= {"draws": stamp} if stamp else {}
        words = {key[1:]: r.words for key, (r, _) in mine.items()}
        out.append((results, words, {key[1:]: detections for key, (_, detections) in mine.items()}))
    return out


def registered(trained: Trained, study: Study, bank: PrototypeBank | None, draws: Draws | None,
               scorings: Sequence[Scoring] = (DEFAULT,)) -> dict[Key, Registered]:  # fmt: skip
    """{(scoring, K, seed): what to look for}: the model's own classes in stage 3, a bank's, or those of `draws`.

    The seed of stage 3 is that of the draw it was trained on; 0 where an older checkpoint does not say it.
    """
    if bank is None and trained.finetuned:
        classes = [*study.base, *study.novel] if study.setting == "gfsod" else study.novel
        seed = int((trained.spec.get("draw") or {}).get("seed", 0))
        own, shots = trained.own(classes), int(trained.spec["shots"])
        return {(scoring, shots, seed): Registered(replace(own, scoring=scoring)) for scoring in scorings}
    if draws is not None:
        return draw_registered(trained, study.data, draws, _own(trained, study), scorings)
    bank.check_model(model_sha256(trained.model), "bank")
    known = [i for i, n in enumerate(bank.names) if n in study.data.names]
    if known and (absent := [n for n in study.data.novel if n not in bank.names]):
        told = f"{len(absent)} of {counted(len(study.novel), 'novel class', 'es')} {are(len(absent))}"
        log.warning("%s not in the bank, which counts as 0: %s", told,
                    ", ".join(absent[:6]) + (", ..." if len(absent) > 6 else ""))  # fmt: skip
    if not known:
        raise DataError(explain("registered classes of the data set", ", ".join(bank.names) or "none", bank.where,
                                "register classes by the names that the data YAML lists under novel"))  # fmt: skip
    labels = tuple(study.data.names.index(bank.names[i]) for i in known)
    device = trained.model.head.bias.device
    words = replace(_own(trained, study), prototypes=bank.prototypes()[known].to(device), prototype_labels=labels,
                    shots=tuple(class_shots(bank, i, device) for i in known))  # fmt: skip
    proposed = {c: bank.thresholds[i] for c, i in zip(labels, known, strict=True) if bank.thresholds[i] is not None}
    least = min(len(bank.instances[i]) for i in known)
    return {(scoring, least, 0): Registered(replace(words, scoring=scoring), proposed or None) for scoring in scorings}


def same_classes(trained: Trained, data: DataSet) -> None:
    """Columns are classes by number. Raises DataError when the data set numbers other ones."""
    own, theirs, kind = trained.classes, data.names, "classes"
    if not trained.finetuned:
        theirs, kind = data.base, "base classes"
    if tuple(own) != tuple(theirs):
        only = {"checkpoint": [n for n in own if n not in theirs], "data": [n for n in theirs if n not in own]}
        shown = "; ".join(f"{len(n)} only in the {where}, such as {', '.join(n[:3])}" for where, n in only.items() if n)
        raise DataError(explain(f"the {len(own)} {kind} of {trained.path}", shown or "the same in another order",
                                data.name, "name a data set of these classes with --data"))  # fmt: skip


class Judge:
    """Scores detections against a study's split; what the truth is is prepared once."""

    def __init__(self, study: Study) -> None:
        self.study, self.records = study, study.data.split(study.split)
        names = study.data.names
        with_truth = {c for r in self.records for c in r.labels[~r.crowd].tolist()}
        self.counted = [c for c in study.novel if c in with_truth]
        if lost := [names[c] for c in study.novel if c not in with_truth]:
            told = f"{len(lost)} of {counted(len(study.novel), 'novel class', 'es')} {are(len(lost))}"
            log.warning("%s without an object in split %s and not counted in the mean: %s", told, study.split,
                        ", ".join(lost))  # fmt: skip
        self.scorer = Scorer(self.records, len(names), study.metric)
        self.base_only = Scorer(without_classes(self.records, len(study.data.base)), len(names), study.metric)

    def results(self, trained: Trained, standard: Sequence[Detections],
                draws: Mapping[Key, tuple[Registered, Sequence[Detections]]], ms: float) -> dict:  # fmt: skip
        """The dict of results.json; draws: what was looked for and found, of one scoring."""
        study = self.study
        alone = self.base_only.score(standard)
        rows: dict[int, list] = {}
        scores: dict[int, list[Scores]] = {}
        base = study.base if study.setting == "gfsod" else ()
        for (_, k, _), (known, found) in draws.items():
            score = self.scorer.score(found)
            false = self.false_positives(found, self.sought(known.words), FP_THRESHOLD)
            row = summary.figures(score, base, study.novel, false)
            if known.thresholds is not None:
                kept = KEPT if known.words.scoring.rescore else 1.0
                limits = {c: kept * threshold for c, threshold in known.thresholds.items()}
                row["at_threshold"] = self.at_threshold(limits, found)
            rows.setdefault(k, []).append(row)
            scores.setdefault(k, []).append(score)
        [scoring] = {key[0] for key in draws}
        extra = {"scoring": scoring.changed()} if scoring != DEFAULT else {}
        return summary.results_json(
            setting=study.setting, metric=study.metric, checkpoint_sha256=trained.sha256,
            seeds=sorted({key[2] for key in draws}), shots=rows, ms_per_image=ms, stage=trained.spec["stage"],
            standard={"bAP50": alone.ap50(study.base), "bAP": alone.ap(study.base)},
            split=study.split, images=len(self.records), novel=list(study.data.novel), **extra,
            data=data_stamp(study.data, self.records, self.counted),
            per_class={str(k): summary.per_class(s, study.data.names) for k, s in scores.items()})  # fmt: skip

    def sought(self, words: Vocabulary) -> list[int]:
        """The novel classes that were looked for; a bank may hold fewer than the data set has."""
        labels = {*words.standard_labels, *words.prototype_labels, *words.proxy_labels}
        return [c for c in self.study.novel if c in labels]

    def false_positives(self, found: Sequence[Detections], classes: Sequence[int], threshold: float) -> float:
        """An image without any of `classes`; nan when there are none to look for."""
        return fp_per_image(self.records, found, classes, threshold) if classes else float("nan")

    def at_threshold(self, thresholds: Mapping[int, float], found: Sequence[Detections]) -> dict[str, float]:
        """False positives an image without any of the classes, recall at IoU .5, and the mean threshold.

        A novel class that was not registered is never found and counts as missed.
        """
        limit = torch.full((len(self.study.data.names),), torch.inf)
        limit[list(thresholds)] = torch.tensor(list(thresholds.values()))
        sure = [d.above(limit) for d in found]
        return {
            "fp_per_image": self.false_positives(sure, [c for c in self.study.novel if c in thresholds], 0.0),
            "recall": self.scorer.score(sure).recall(self.study.novel),
            "threshold": sum(thresholds.values()) / len(thresholds),
        }


def _usual_shots(data: DataSet) -> Sequence[int]:
    """USUAL_SHOTS, as far as the data have them; what is left out is told."""
    classes = range(data.num_base, len(data.names))
    kept, why = possible(data.split("support"), classes, USUAL_SHOTS, data.names)
    if why:
        log.warning("%s", why)
    return kept or USUAL_SHOTS[:1]  # where there is none, an error says so


def evaluate_checkpoint(checkpoint: str | Path, *, data: str | None = None, shots: Sequence[int] | None = None,
                        seeds: int | None = None, bank: Path | None = None, json_out: Path | None = None,
                        setting: str | None = None, metric: str | None = None, split: str = "test",
                        device: str = "cpu", scoring: Scoring = DEFAULT,
                        shot_file: Path | None = None) -> dict:  # fmt: skip
    """`fsdet eval`: evaluate a checkpoint on a data set (the one it was trained on by default); writes `json_out`.

    shot_file: register the shots of this file, the K in `shots` (default: all that it has) under its one seed.
    """
    trained = load_trained(checkpoint, device)
    file = ShotFile.load(shot_file) if shot_file else None
    if file is not None and trained.finetuned:
        raise ConfigError(explain("a checkpoint that registers classes", "one of stage 3", str(trained.path),
                                  "it has its own shots; leave --shot-file out"))  # fmt: skip
    loaded = sources.load(data or data_of(trained))
    same_classes(trained, loaded)
    if trained.finetuned and shots and list(shots) != [int(trained.spec["shots"])]:
        log.warning("%s was fine-tuned on %d shots: it is evaluated as it is, without others", trained.path,
                    trained.spec["shots"])  # fmt: skip
    if not (shots or file or bank or trained.finetuned):
        shots = _usual_shots(loaded)
    asked = (file.ks, (file.seed,)) if file else (USUAL_SHOTS, tuple(range(seeds or 10)))
    study = Study(loaded, split, tuple(shots or asked[0]), asked[1], setting or "gfsod", metric or "coco", file)
    bank_read = PrototypeBank.load(bank) if bank else None
    return evaluate(trained, study, bank_read, json_out and Path(json_out), scoring)


def evaluate_scorings(checkpoint: str | Path, scorings: Sequence[Scoring], *, data: str, shots: Sequence[int],
                      seeds: int, setting: str, metric: str, split: str, device: str) -> list[dict]:  # fmt: skip
    """`evaluate_checkpoint` under several scorings, by one look at the images."""
    trained = load_trained(checkpoint, device)
    loaded = sources.load(data)
    same_classes(trained, loaded)
    study = Study(loaded, split, tuple(shots), tuple(range(seeds)), setting, metric)
    if len(scorings) == 1 or trained.finetuned:
        return [evaluate(trained, study, scoring=scoring) for scoring in scorings]
    return [results for results, _, _ in evaluations(trained, study, None, scorings)]
