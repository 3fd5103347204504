# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pictures of an evaluation: supports beside queries, confusion, precision-recall, nAP against K."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fsdet.data.store import ImageStore
from fsdet.data.transforms import support_window
from fsdet.detect.scoring import Vocabulary
from fsdet.errors import counted
from fsdet.evaluation.confusion import confusion_matrix
from fsdet.evaluation.scorer import Scorer
from fsdet.pictures import Picture, episode_sheet, plot_confusion, plot_pr, plot_shots
from fsdet.tasks.loading import Trained
from fsdet.tasks.registration import drawn
from fsdet.tasks.validation import query_picture
from fsdet.types import Detections

CLASSES_A_SHEET, QUERIES_A_SHEET, SHOTS_SHOWN = 4, 4, 5
CONFIDENCE = 0.25


def draw_gallery(trained: Trained, study, words: Mapping[tuple[int, int], Vocabulary],
                 found: Mapping[object, Sequence[Detections]], results: Mapping, folder: Path, *,
                 drawn_shots: bool) -> list[Path]:  # fmt: skip
    """Everything a person looks at after an evaluation; the draw shown is seed 0 of the middle K.

    drawn_shots: the classes were registered from shots of the study's data, which the sheets then show; a bank's shots
    are pictures of their own, which it does not keep.
    """
    keys = sorted(k for k in words if k[1] == min(s for _, s in words))
    shown = keys[len(keys) // 2]
    detections = found[shown]
    records, names = study.data.split(study.split), study.data.names
    scores = Scorer(records, len(names), study.metric).score(detections)
    novel_names = [names[c] for c in study.novel]
    counts = confusion_matrix(records, detections, len(names), CONFIDENCE)
    of, novel = f"{counted(shown[0], 'shot')}, draw {shown[1]}", scores.class_precision[study.novel]
    paths = [
        plot_confusion(counts, names, folder / "confusion.png", of=f"{of}, scores above {CONFIDENCE:g}"),
        plot_pr(novel, novel_names, folder / "pr_novel.png", mean="novel classes", of=of),
        plot_shots([results], folder / "shots.png", [trained.path.parent.name]),
    ]
    return paths + _sheets(trained, study, shown, detections, folder / "episodes", drawn_shots)


def _sheets(trained: Trained, study, shown: tuple[int, int], detections: Sequence[Detections],
            folder: Path, drawn_shots: bool) -> list[Path]:  # fmt: skip
    """One sheet per few novel classes: their shots on the left, test images that hold them on the right."""
    k, seed = shown
    names, records = study.data.names, study.data.split(study.split)
    known = study.shot_file is not None or (study.data.has("support") and not trained.finetuned)
    draws = drawn(study.data, [k], [seed], study.shot_file) if known and drawn_shots else None
    store = ImageStore(study.data.split(draws.split) if draws else [], trained.spec["image_size"])
    shots = draws.picks[k, seed] if draws else {c: [] for c in study.novel}
    paths = []
    for start in range(0, len(study.novel), CLASSES_A_SHEET):
        classes = study.novel[start : start + CLASSES_A_SHEET]
        supports = []
        for c in classes:
            for pick in shots[c][:SHOTS_SHOWN]:
                window, box = support_window(*store.instance(*pick), trained.spec["support_size"])
                supports.append(Picture(window, box[None], colours=[c], title=names[c]))
        holding = [i for i, r in enumerate(records) if set(classes) & set(r.labels.tolist())][:QUERIES_A_SHEET]
        if not holding:
            continue
        queries = [query_picture(records[i], _sure(detections[i]), names) for i in holding]
        title = f"{counted(k, 'shot')} a class, {'fine-tuned on them' if trained.finetuned else 'never trained on'}"
        paths.append(
            episode_sheet(supports, queries, folder / f"eval_{k}shot_{start // CLASSES_A_SHEET}.jpg", title=title)
        )
    return paths


def _sure(found: Detections) -> Detections:
    keep = found.scores >= CONFIDENCE
    return Detections(found.boxes[keep], found.scores[keep], found.labels[keep], found.branch[keep])
