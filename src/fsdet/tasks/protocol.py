# SPDX-License-Identifier: AGPL-3.0-or-later
"""The few-shot protocol: K shots x draws on a test split, base and novel classes in one detection list."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fsdet.bank import PrototypeBank
from fsdet.data import sources
from fsdet.data.shots import draw_shots
from fsdet.data.sources import DataSet
from fsdet.data.store import ImageStore
from fsdet.detect.scoring import Vocabulary, own_classes
from fsdet.detect.support import embed_instances
from fsdet.errors import DataError, explain
from fsdet.evaluation import summary
from fsdet.evaluation.scorer import Scorer, fp_per_image
from fsdet.models.build import model_sha256
from fsdet.progress import track
from fsdet.tasks.gallery import draw_gallery
from fsdet.tasks.loading import Trained, data_of, load_trained
from fsdet.tasks.validation import dense_batches, detect_batch, shot_prototypes, without_classes
from fsdet.types import Detections

log = logging.getLogger("fsdet")
FP_THRESHOLD = 0.25  # the confidence that fsdet predict shows by default


@dataclass(frozen=True, eq=False)
class Study:
    """What is evaluated: data, classes, K and draws."""

    data: DataSet
    split: str
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    setting: str
    metric: str

    @property
    def base(self) -> list[int]:
        return list(range(len(self.data.base)))

    @property
    def novel(self) -> list[int]:
        return list(range(len(self.data.base), len(self.data.names)))


def draw_vocabularies(trained: Trained, study: Study) -> dict[tuple[int, int], Vocabulary]:
    """{(K, seed): vocabulary} from split support; each instance is embedded once however many draws use it."""
    records = study.data.split("support")
    draws = {seed: draw_shots(records, study.novel, list(study.shots), seed, study.data.names) for seed in study.seeds}
    wanted = sorted({pick for shots in draws.values() for picks in shots.values() for pick in picks})
    row = {pick: i for i, pick in enumerate(wanted)}
    store = ImageStore(records, trained.spec["image_size"])
    embeddings = embed_instances(trained.model, (store.instance(*p) for p in wanted), trained.spec["support_size"])
    out = {}
    for seed, shots in draws.items():
        rows = [[row[p] for p in shots[c]] for c in study.novel]
        for k in study.shots:
            out[k, seed] = _vocabulary(trained, study, shot_prototypes(embeddings, rows, k))
    return out


def _vocabulary(trained: Trained, study: Study, prototypes: torch.Tensor,
                labels: Sequence[int] | None = None) -> Vocabulary:  # fmt: skip
    """Prototypes of novel classes, beside the model's base classes in G-FSOD."""
    own = own_classes(study.base if study.setting == "gfsod" else (), len(study.base), trained.spec["mode"])
    return replace(own, prototypes=prototypes, prototype_labels=tuple(study.novel if labels is None else labels))


@torch.inference_mode()
def detections_of(trained: Trained, study: Study, words: Mapping[object, Vocabulary]) -> tuple[dict, float]:
    """({key: [Detections per image]}, ms per image of one pass with one vocabulary)."""
    store = ImageStore(study.data.split(study.split), trained.spec["image_size"])
    found: dict[object, list[Detections]] = {key: [] for key in words}
    batches = dense_batches(trained.model, store, trained.spec["image_size"])
    began, selecting = time.perf_counter(), 0.0
    for indices, dense, placed in track(batches, "evaluate", -(-len(store.records) // 16)):
        start = time.perf_counter()
        for key, vocabulary in words.items():
            found[key] += detect_batch(trained.model, dense, vocabulary, placed, [store.records[i] for i in indices])
        selecting += time.perf_counter() - start
    network = time.perf_counter() - began - selecting
    return found, 1000 * (network + selecting / max(len(words), 1)) / max(len(store.records), 1)


def evaluate(trained: Trained, study: Study, bank: PrototypeBank | None = None, json_out: Path | None = None) -> dict:
    """The dict of results.json for one checkpoint.

    A stage-3 checkpoint knows its novel classes itself: it is evaluated once, under the K it was fine-tuned with.
    It is written to `json_out`, and pictures of the evaluation beside it.
    Raises:
        DataError: no novel classes, no such split, or too few instances for the largest K.
    """
    if not study.novel:
        raise DataError(explain("novel classes to evaluate", "none in the data YAML", "key novel",
                                "list them under novel:"))  # fmt: skip
    keyed = vocabularies(trained, study, bank)
    found, ms = detections_of(
        trained, study, {"standard": own_classes(study.base, len(study.base), trained.spec["mode"]), **keyed}
    )
    results = _results(trained, study, found, ms, list(keyed))
    if json_out is not None:
        summary.write_json(json_out, results)
        draw_gallery(trained, study, keyed, found, results, json_out.parent)
    return results


def vocabularies(trained: Trained, study: Study, bank: PrototypeBank | None) -> dict[tuple[int, int], Vocabulary]:
    """{(K, seed): what to look for}: the model's own classes in stage 3, a bank's, or draws from split support."""
    if bank is None and trained.finetuned:
        classes = [*study.base, *study.novel] if study.setting == "gfsod" else study.novel
        own = own_classes(classes, len(study.base), trained.spec["mode"])
        return {(int(trained.spec["shots"]), 0): own}
    if bank is None:
        return draw_vocabularies(trained, study)
    bank.check_model(model_sha256(trained.model), "bank")
    known = [i for i, n in enumerate(bank.names) if n in study.data.names]
    if known and (absent := [n for n in study.data.novel if n not in bank.names]):
        log.warning("%d of %d novel classes are not in the bank and count 0: %s", len(absent), len(study.novel),
                    ", ".join(absent[:6]) + (", ..." if len(absent) > 6 else ""))  # fmt: skip
    if not known:
        raise DataError(explain("registered classes of the data set", ", ".join(bank.names) or "none", "bank",
                                "register classes by the names that the data YAML lists under novel"))  # fmt: skip
    labels = [study.data.names.index(bank.names[i]) for i in known]
    prototypes = bank.prototypes()[known].to(trained.model.head.bias.device)
    return {(min(len(t) for t in bank.instances), 0): _vocabulary(trained, study, prototypes, labels)}


def _same_classes(trained: Trained, data: DataSet) -> None:
    """Columns are classes by number. Raises DataError when the data set numbers other ones."""
    own, theirs, kind = trained.classes, data.names, "classes"
    if not trained.finetuned:
        theirs, kind = data.base, "base classes"
    if tuple(own) != tuple(theirs):
        only = {"checkpoint": [n for n in own if n not in theirs], "data": [n for n in theirs if n not in own]}
        shown = "; ".join(f"{len(n)} only in the {where}, such as {', '.join(n[:3])}" for where, n in only.items() if n)
        raise DataError(explain(f"the {len(own)} {kind} of {trained.path}", shown or "the same in another order",
                                data.name, "name a data set of these classes with --data"))  # fmt: skip


def _results(trained: Trained, study: Study, found: Mapping, ms: float, keys: Iterable[tuple[int, int]]) -> dict:
    records = study.data.split(study.split)
    scorer = Scorer(records, len(study.data.names), study.metric)
    base_only = Scorer(without_classes(records, len(study.data.base)), len(study.data.names), study.metric)
    standard = base_only.score(found["standard"])
    rows: dict[int, list] = {}
    scores: dict[int, list] = {}
    for k, seed in keys:
        score = scorer.score(found[k, seed])
        false = fp_per_image(records, found[k, seed], study.novel, FP_THRESHOLD)
        rows.setdefault(k, []).append(
            summary.figures(score, study.base if study.setting == "gfsod" else (), study.novel, false)
        )
        scores.setdefault(k, []).append(score)
    alone = {"bAP50": standard.ap50(study.base), "bAP": standard.ap(study.base)}
    return summary.results_json(
        setting=study.setting, metric=study.metric, checkpoint_sha256=trained.sha256,
        seeds=sorted({s for _, s in keys}), standard=alone,
        shots=rows, ms_per_image=ms, stage=trained.spec["stage"], split=study.split, images=len(records),
        per_class={str(k): summary.per_class(s, study.data.names) for k, s in scores.items()})  # fmt: skip


def evaluate_checkpoint(checkpoint: str | Path, *, data: str | None = None, shots: Sequence[int] | None = None,
                        seeds: int | None = None, bank: Path | None = None, json_out: Path | None = None,
                        setting: str | None = None, metric: str | None = None, split: str = "test",
                        device: str = "cpu") -> dict:  # fmt: skip
    """`fsdet eval`: evaluate a checkpoint on a data set (the one it was trained on by default); writes `json_out`."""
    trained = load_trained(checkpoint, device)
    loaded = sources.load(data or data_of(trained))
    _same_classes(trained, loaded)
    if trained.finetuned and shots and list(shots) != [int(trained.spec["shots"])]:
        log.warning("%s was fine-tuned on %d shots: it is evaluated as it is, without others", trained.path,
                    trained.spec["shots"])  # fmt: skip
    study = Study(loaded, split, tuple(shots or (1, 3, 5, 10)), tuple(range(seeds or 10)), setting or "gfsod",
                  metric or "coco")  # fmt: skip
    return evaluate(trained, study, PrototypeBank.load(bank) if bank else None, json_out and Path(json_out))
