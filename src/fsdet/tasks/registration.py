# SPDX-License-Identifier: AGPL-3.0-or-later
"""K-shot draws of a data set as registered classes: prototypes, what stands beside them, and proposed thresholds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fsdet.data.shots import Picks, ShotFile, draw_shots
from fsdet.data.sources import DataSet
from fsdet.data.store import ImageStore
from fsdet.detect.calibration import COPIES, Calibrator, Place, copies
from fsdet.detect.scoring import DEFAULT, ClassShots, Scoring, Vocabulary
from fsdet.detect.support import embed_instances, negative_rows, whole_images
from fsdet.errors import DataError, explain
from fsdet.models.heads import Dense
from fsdet.progress import track
from fsdet.tasks.loading import Trained
from fsdet.tasks.validation import shot_prototypes

Pick = tuple[int, int]  # record, box
Key = tuple[Scoring, int, int]  # scoring, K, seed


@dataclass(frozen=True, eq=False)
class Draws:
    """Shots of the novel classes: {(K, seed): {class: [(record, box)]}} in `split`; unit: what K counts."""

    picks: Mapping[tuple[int, int], Picks]
    split: str = "support"
    unit: str = "instance"


def drawn(data: DataSet, shots: Sequence[int], seeds: Sequence[int], file: ShotFile | None = None) -> Draws:
    """Every K and seed, drawn from split support; with a file each of its K that `shots` names, as its one seed.

    Raises:
        DataError: too few instances for the largest K, a K that the file does not have, or a file of other data.
    """
    novel = range(data.num_base, len(data.names))
    if file is None:
        nested = {seed: draw_shots(data.split("support"), novel, list(shots), seed, data.names) for seed in seeds}
        return Draws({(k, seed): {c: rows[:k] for c, rows in found.items()}
                      for seed, found in nested.items() for k in shots})  # fmt: skip
    if absent := [k for k in shots if k not in file.ks]:
        have, got = (", ".join(map(str, ks)) for ks in (file.ks, absent))
        raise DataError(explain(f"numbers of shots of the file: {have}", got, "shots", "name some of these"))
    picks = {k: file.picks(data, k) for k in shots}
    return Draws({(k, file.seed): {c: found[c] for c in novel} for k, found in picks.items()}, file.split, file.unit)


@dataclass(frozen=True, eq=False)
class Registered:
    """What to look for, and the threshold {label: score} that registration proposes; None where nothing did."""

    words: Vocabulary
    thresholds: Mapping[int, float] | None = None


@torch.inference_mode()
def draw_registered(trained: Trained, data: DataSet, draws: Draws, own: Vocabulary,
                    scorings: Sequence[Scoring] = (DEFAULT,)) -> dict[Key, Registered]:  # fmt: skip
    """Every K and draw under every scoring; each image is looked at once however many draws use it.

    Args:
        own: the model's own classes, among which the novel ones are sought.
    """
    records, novel = data.split(draws.split), list(range(data.num_base, len(data.names)))
    wanted = sorted({pick for found in draws.picks.values() for of in found.values() for pick in of})
    store = ImageStore(records, trained.spec["image_size"])
    embeddings = embed_instances(trained.model, (store.instance(*p) for p in wanted), trained.spec["support_size"])
    row = {pick: i for i, pick in enumerate(wanted)}
    negatives = [embeddings[:0]] * len(wanted)
    if any(s.background != "off" for s in scorings):
        negatives = _negatives(trained, store, wanted, embeddings)
    words: dict[Key, Vocabulary] = {}
    picks: dict[Key, list[list[Pick]]] = {}
    for (k, seed), found in draws.picks.items():
        chosen = [found[c] for c in novel]
        rows = [[row[p] for p in of] for of in chosen]
        classes = tuple(_class_shots(embeddings, negatives, r) for r in rows)
        plain = replace(own, prototypes=shot_prototypes(embeddings, rows, k), prototype_labels=tuple(novel),
                        shots=classes)  # fmt: skip
        for scoring in scorings:
            words[scoring, k, seed] = replace(plain, scoring=scoring)
            picks[scoring, k, seed] = chosen
    thresholds = _thresholds(trained, store, words, picks)
    return {key: Registered(words[key], thresholds[key]) for key in words}


def _class_shots(embeddings: Tensor, negatives: Sequence[Tensor], rows: Sequence[int]) -> ClassShots:
    mine = [negatives[r] for r in rows]
    shot = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(m) for m in mine]))
    return ClassShots(embeddings[list(rows)], torch.cat(mine), shot.to(embeddings.device))


def _looked_at(trained: Trained, store: ImageStore, picks: Sequence[Pick]) -> Iterator[tuple[int, Dense, Tensor]]:
    """(record, Dense, boxes [m, 4] px) of each image that `picks` name, once."""
    records = sorted({i for i, _ in picks})
    samples = (store.sample(i) for i in records)
    looked = whole_images(trained.model, samples, trained.spec["image_size"])
    for record, (dense, boxes) in zip(track(records, "support"), looked, strict=True):
        yield record, dense, torch.from_numpy(boxes).to(dense.boxes.device)


def _negatives(trained: Trained, store: ImageStore, wanted: Sequence[Pick], embeddings: Tensor) -> list[Tensor]:
    """Of each pick, the rows of its image that are not the object. The draw names no other object of the image."""
    out: list[Tensor] = [embeddings[:0]] * len(wanted)
    for record, dense, boxes in _looked_at(trained, store, wanted):
        for row, (i, j) in enumerate(wanted):
            if i == record:
                box = boxes[_box_of(store, i, j)]
                out[row] = negative_rows(dense, box, boxes[:0], embeddings[row])
    return out


def _box_of(store: ImageStore, record: int, box: int) -> int:
    """The index of a record's box among those of its sample."""
    return int((~store.records[record].crowd[:box]).sum())


def _thresholds(trained: Trained, store: ImageStore, words: Mapping[Key, Vocabulary],
                picks: Mapping[Key, Sequence[Sequence[Pick]]]) -> dict[Key, dict[int, float]]:  # fmt: skip
    """{key: {label: threshold}} from the support images of each draw alone."""
    calibrators = {}
    for key, chosen in picks.items():
        places = [[Place(i, _box_of(store, i, j)) for i, j in of] for of in chosen]
        calibrators[key] = Calibrator(trained.model, words[key], places)
    every = sorted({p for chosen in picks.values() for of in chosen for p in of})
    for record, dense, boxes in _looked_at(trained, store, every):
        for calibrator in calibrators.values():
            if record in calibrator.held:
                calibrator.look(record, dense, boxes)
    _look_at_copies(trained, store, calibrators, picks)
    return {key: {words[key].prototype_labels[column]: p.threshold for column, p in c.proposals().items()}
            for key, c in calibrators.items()}  # fmt: skip


def _look_at_copies(trained: Trained, store: ImageStore, calibrators: Mapping[Key, Calibrator],
                    picks: Mapping[Key, Sequence[Sequence[Pick]]]) -> None:  # fmt: skip
    """Altered copies of the single shots of classes that have one."""
    single: dict[Pick, list[tuple[Calibrator, int]]] = {}
    for key, calibrator in calibrators.items():
        for column, of in enumerate(picks[key]):
            if calibrator.needs_copies(column):
                single.setdefault(of[0], []).append((calibrator, column))
    size = trained.spec["image_size"]
    altered = (copy for pick in single for copy in copies(*store.instance(*pick), size))
    wanted = [pick for pick in single for _ in range(COPIES)]
    for pick, (dense, boxes) in zip(wanted, whole_images(trained.model, altered, size), strict=True):
        for calibrator, column in single[pick]:
            calibrator.look_at_copy(column, dense, torch.from_numpy(boxes[0]).to(dense.boxes.device))
