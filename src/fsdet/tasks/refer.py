# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet predict --refdet`: photographs of an object, a drone's video in which it is to be found, ST-IoU."""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fsdet.data.refdet import CORNERS, RefSample, read_samples
from fsdet.data.video import Video, VideoFile
from fsdet.detect.predictor import Predictor
from fsdet.detect.tracks import Tracked
from fsdet.errors import UserError, counted, explain
from fsdet.evaluation.st_iou import best_track, st_iou
from fsdet.evaluation.summary import write_json
from fsdet.files import sha256_of
from fsdet.progress import track
from fsdet.registered import class_name
from fsdet.tasks.loading import Trained, load_trained
from fsdet.tasks.watch import follow, frame_drawing
from fsdet.written import Journal, earlier, refuse_others

log = logging.getLogger("fsdet")
RESULTS, FOUND = "results.json", "annotations.json"


@dataclass(frozen=True)
class Scored:
    """One sample. found: {frame: xyxy px}. frames: of its video. st_iou: nan where nobody annotated it."""

    name: str
    found: dict[int, list[float]]
    frames: int
    st_iou: float


def predict(checkpoint: Path, *, folder: Path, out: Path, conf: float | None = None, device: str = "cpu",
            film: bool = True, rescore: bool = False) -> str:  # fmt: skip
    """OUT/annotations.json as the layout has it, OUT/results.json, and OUT/<id>.mp4 with `film`; returns a summary.

    Each sample is looked for by itself: its photographs are registered as one class beside the detector's own classes,
    and in every frame the surest of the objects that are followed is the answer. conf: least score; None takes what
    registration proposes. rescore: look at what was found a second time.

    Raises:
        DataError: faults of the folder, all at once. UserError: `out` is a file, or holds files of others.
        CheckpointError: the checkpoint.
    """
    samples = read_samples(folder)
    _refuse(out, samples, folder)
    trained = load_trained(checkpoint, device)
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / RESULTS)
    films = journal if film else None
    scored = [_look(trained, sample, out, conf, films, rescore) for sample in track(samples, "predict")]
    known = [s.st_iou for s in scored if not math.isnan(s.st_iou)]
    mean = float(np.mean(known)) if known else None
    rows = [{"video_id": s.name, "st_iou": None if math.isnan(s.st_iou) else s.st_iou, "frames": s.frames,
             "found_in": len(s.found)} for s in scored]  # fmt: skip
    journal.write(out, {FOUND: json.dumps([_annotation(s) for s in scored]).encode()})
    written = [FOUND, *(f"{s.name}.mp4" for s in samples if film)]
    written = sorted({*written, *earlier(out / RESULTS, written)})
    write_json(out / RESULTS, {"task": "refdet", "st_iou": mean, "samples": rows, "checkpoint": trained.sha256,
                               "conf": conf, "rescore": rescore, "written": written})  # fmt: skip
    journal.close()
    told = [f"{s.name}: ST-IoU {'-' if math.isnan(s.st_iou) else f'{s.st_iou:.3f}'}, found in {len(s.found)} of "
            f"{counted(s.frames, 'frame')}" for s in scored]  # fmt: skip
    head = "no sample is annotated" if mean is None else f"mean ST-IoU {mean:.3f} of {counted(len(known), 'sample')}"
    return "\n".join([*told, f"{head} -> {out}"])


def _look(trained: Trained, sample: RefSample, out: Path, conf: float | None, films: Journal | None,
          rescore: bool) -> Scored:  # fmt: skip
    """A sample looked for; its video is drawn where there is a journal for `films`."""
    predictor = Predictor(trained.model, trained.classes, trained.preprocessing, base=len(trained.spec["base"]),
                          mode=trained.spec["mode"], rescore=rescore)  # fmt: skip
    predictor.register(sample.name, sample.photographs)
    label = predictor.names.index(class_name(sample.name))
    frames: dict[int, Tracked] = {}
    film = f"{sample.name}.mp4"

    def note(draft: Path) -> None:
        films.note({film: sha256_of(draft)})

    with Video(sample.video) as video, ExitStack() as stack:
        copy = stack.enter_context(VideoFile(out / film, video.rate, note)) if films else None
        for number, frame, seen in follow(predictor, video, conf):
            frames[number] = seen
            if copy:
                copy.write(frame_drawing(frame, _only(seen, label), predictor.names))
        if told := video.told():
            log.warning("%s", told)
        count = max(video.read, video.announced)
    found = best_track(frames, label)
    score = math.nan if sample.truth is None else st_iou(found, sample.truth)
    return Scored(sample.name, found, count, score)


def _only(seen: Tracked, label: int) -> Tracked:
    kept = seen.labels == label
    return Tracked(seen.boxes[kept], seen.scores[kept], seen.labels[kept], seen.branch[kept], seen.track[kept])


def _annotation(scored: Scored) -> dict:
    """As the layout has it, so that it can be read again."""
    boxes = [{"frame": frame, **{key: round(v, 2) for key, v in zip(CORNERS, box, strict=True)}}
             for frame, box in sorted(scored.found.items())]  # fmt: skip
    return {"video_id": scored.name, "annotations": [{"bboxes": boxes}] if boxes else []}


def _refuse(out: Path, samples: Sequence[RefSample], folder: Path) -> None:
    """Before anything is computed: `out` is a file or the data's own folder, or holds files of others."""
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(explain("a folder beside the samples", "one among them", str(out), "name another --out"))
    wanted = [out / name for name in (FOUND, *(f"{s.name}.mp4" for s in samples))]
    refuse_others(out, RESULTS, "what fsdet predict --refdet wrote", ("task", "samples"), wanted)
