# SPDX-License-Identifier: AGPL-3.0-or-later
"""RefDet: photographs of an object and a drone's video in which it comes and goes, sample by sample.

    samples/<id>/drone_video.mp4  samples/<id>/object_images/*.jpg  annotations/annotations.json
    [{"video_id": id, "annotations": [{"bboxes": [{"frame", "x1", "y1", "x2", "y2"}]}]}], px, frames from 0

The class of a sample is its id.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fsdet.data.frames import frame_of, frame_path, video_size
from fsdet.data.images import is_image
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.table import Table
from fsdet.data.video import is_video
from fsdet.errors import DataError, counted, explain
from fsdet.names import class_folders, composed
from fsdet.types import ImageRecord

SAMPLES, ANNOTATIONS = "samples", Path("annotations") / "annotations.json"
VIDEO, PHOTOGRAPHS = "drone_video", "object_images"
CORNERS = ("x1", "y1", "x2", "y2")
_LAYOUT = f"give DIR/{SAMPLES}/<id>/ with {VIDEO}.mp4 and {PHOTOGRAPHS}/*.jpg"


@dataclass(frozen=True, eq=False)
class RefSample:
    """An object to be found. photographs: of it, each whole. truth: {frame: xyxy px}; None: nobody annotated it."""

    name: str
    video: Path
    photographs: list[ImageRecord]
    truth: dict[int, list[float]] | None


def is_refdet(folder: Path) -> bool:
    """Whether a folder is laid out like this."""
    places = (folder / SAMPLES).iterdir() if (folder / SAMPLES).is_dir() else ()
    return any((place / PHOTOGRAPHS).is_dir() or _videos(place) for place in places if place.is_dir())


def read(folder: Path, root: Root, report: Report, split: str = "") -> Table:
    """Every annotated frame as an image with its boxes; for split `support` the photographs, each a whole object.

    Raises:
        DataError: no sample, or an annotation file that is none.
    """
    places = _places(folder, root)
    table = Table(sorted(places), origin="", alone=True)
    if split == "support":
        _photographs(places, table, root, report)
    else:
        _frames(folder, places, table, root, report)
    return table


def read_samples(folder: str | Path) -> list[RefSample]:
    """All samples, by id, as an evaluation needs them.

    Raises:
        DataError: every fault of the annotations and files at once; no sample.
    """
    report = Report()
    root = Root(Path(folder), report)
    if not root.folder.is_dir():
        raise DataError(explain("a RefDet folder", "nothing there", str(folder), _LAYOUT))
    places = _places(root.folder, root)
    classes = {name: label for label, name in enumerate(sorted(places))}
    photographs, frames = read(root.folder, root, report, "support"), read(root.folder, root, report)
    shown = photographs.records(classes, report)
    truth: dict[int, dict[int, list[float]]] = {}
    for record in frames.records(classes, report):
        number = (frame_of(record.path) or (record.path, 0))[1]
        for label, box in zip(record.labels.tolist(), record.boxes.tolist(), strict=True):
            if number in truth.setdefault(label, {}):
                report.add("second box in a frame", f"{root.show(record.path)}")
            truth[label][number] = box
    listed = _listed(root.folder)
    for name in sorted(set(places) - set(listed)):
        _measured(places[name], root, report)
    report.raise_faults(str(folder))
    return [RefSample(name, video, [r for r in shown if label in r.labels],
                      truth.get(label, {}) if name in listed else None)
            for name, label in classes.items() if (video := _video(places[name]))]  # fmt: skip


def _places(folder: Path, root: Root) -> dict[str, Path]:
    """{id: folder} of the samples."""
    inside = folder / SAMPLES
    entries = sorted(inside.iterdir()) if inside.is_dir() and root.contains(inside) else []
    places = (e for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")) and root.contains(e))
    found = class_folders(places)
    if not found:
        raise DataError(explain("at least one sample", "none", str(inside), _LAYOUT))
    return found


def _videos(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if is_video(p) and p.is_file() and not p.name.startswith("."))


def _video(place: Path) -> Path | None:
    """drone_video.*, or the only video there is."""
    found = _videos(place)
    named = [path for path in found if path.stem.lower() == VIDEO]
    return named[0] if named else found[0] if len(found) == 1 else None


def _photographs(places: dict[str, Path], table: Table, root: Root, report: Report) -> None:
    for label, name in enumerate(table.names):
        pictures = [path for file, path in root.files(places[name] / PHOTOGRAPHS).items() if is_image(file)]
        if not pictures:
            report.add("missing image", root.show(places[name] / PHOTOGRAPHS), "no photograph of the object")
        for path in pictures:
            table.paths.append(path)
            table.sizes.append(None)
            table.label.append(label)
    table.measure(root, report)
    labels, table.label = table.label, []
    for index, (label, size) in enumerate(zip(labels, table.sizes, strict=True)):
        if size is not None:
            table.add((0, 0, size[1], size[0]), index, label, False, root.show(table.paths[index]))


def _frames(folder: Path, places: dict[str, Path], table: Table, root: Root, report: Report) -> None:
    where, index = root.show(folder / ANNOTATIONS), {}
    listed = _listed(folder)
    videos: dict[str, tuple[Path, tuple[int, int, int]] | None] = {}
    for name, rows in listed.items():
        if name not in places:
            report.add("annotation of an unknown video", f"{where}: {name}")
            continue
        videos[name] = _measured(places[name], root, report)
        if videos[name] is None:
            continue
        video, (count, *size) = videos[name]
        for place, number, box in _boxes(rows, f"{where}: {name}", report):
            if number < 0 or 0 < count <= number:
                have = counted(count, "frame") if count else "some frames"
                report.add("frame outside the video", place, f"{root.show(video)} has {have}")
                continue
            if (video, number) not in index:
                index[video, number] = len(table.paths)
                table.paths.append(str(frame_path(video, number)))
                table.sizes.append((size[0], size[1]))
            table.add(box, index[video, number], table.names.index(name), False, place)
    for name in sorted(set(places) - set(listed)):
        report.add("sample without annotations", root.show(places[name]))


def _measured(place: Path, root: Root, report: Report) -> tuple[Path, tuple[int, int, int]] | None:
    video = _video(place)
    if video is None:
        report.add("missing video", root.show(place / f"{VIDEO}.mp4"))
        return None
    try:
        return video, video_size(video)
    except DataError:
        report.add("unreadable video", root.show(video))
        return None


def _listed(folder: Path) -> dict[str, list]:
    """{video id: its annotations}, as they are written; empty without a file, for samples to be predicted alone.

    Raises:
        DataError: the file is no such list.
    """
    path = folder / ANNOTATIONS
    if not path.is_file():
        return {}
    wanted, cure = 'a list of {"video_id", "annotations"}', "export it again, or remove it to predict only"
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(explain(wanted, f"unreadable text ({error})", str(path), cure)) from error
    rows = document if isinstance(document, list) else []
    wrong = [i for i, row in enumerate(rows)
             if not (isinstance(row, dict) and isinstance(row.get("annotations"), list)
                     and isinstance(row.get("video_id"), str | int))]  # fmt: skip
    if not isinstance(document, list) or wrong:
        got = "no list"
        if isinstance(document, list):
            got = f"entries of another form: {len(wrong)}, the first is number {wrong[0]}"
        raise DataError(explain(wanted, got, str(path), cure))
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(composed(row["video_id"]), []).extend(row["annotations"])
    return found


def _boxes(rows: list, where: str, report: Report) -> Iterator[tuple[str, int, tuple[float, float, float, float]]]:
    """(place, frame, xyxy px) of what is written for one video; what is no number is reported."""
    for number, row in enumerate(rows):
        boxes = row.get("bboxes") if isinstance(row, dict) else None
        if not isinstance(boxes, list):
            report.add("malformed annotation", f"{where}: annotation {number}", "no list 'bboxes'")
            continue
        for k, box in enumerate(boxes):
            values = [box.get(key) for key in ("frame", *CORNERS)] if isinstance(box, dict) else [None]
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                report.add("not a number", f"{where}: annotation {number}, box {k}")
            elif values[0] != values[0] or values[0] % 1:  # nan, or between two frames
                report.add("not a number", f"{where}: annotation {number}, box {k}", "frame")
            else:
                frame = int(values[0])
                yield f"{where}: frame {frame}", frame, tuple(map(float, values[1:]))
