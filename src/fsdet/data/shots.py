# SPDX-License-Identifier: AGPL-3.0-or-later
"""K-shot draws: K counts instances per class, the K-shot set is the first K of one list, so that sets are nested.

Each class has its own stream, seeded by its name: neither the order of classes, nor the other classes, nor where the
data lie on the disk changes its draw. Images come in hashed order and give one instance each before any gives a second;
the unit `image` stops there, so that K images give one instance each.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fsdet.data.sources import DataSet
from fsdet.errors import DataError, are, counted, did_you_mean, explain, some
from fsdet.files import readable, write_durably
from fsdet.names import composed
from fsdet.types import ImageRecord

VERSION = 2  # 1 knew only nested draws of instances; it is still read
SAMPLER = "image-first-1"
UNITS = ("instance", "image")
MAX_BYTES = 64 << 20
MATCH = 0.05  # px between a stored box and the data set's

Picks = dict[int, list[tuple[int, int]]]


def draw_shots(
    records: Sequence[ImageRecord],
    classes: Sequence[int],
    ks: Sequence[int],
    seed: int,
    names: Sequence[str] | None = None,
    unit: str = "instance",
) -> Picks:
    """{class: [(record index, box index), ...]}, max(ks) of each; the first K are the K-shot set. Crowds are left out.

    names: the data set's classes; with them a class's stream is seeded by its name, else by its number.
    unit: "instance", or "image" for one instance of the class from each of K images.

    Raises:
        DataError: a class with fewer instances (images) than max(ks), every such class listed; another unit.
    """
    need = max(ks, default=0)
    if not ks or min(ks) < 1:
        raise DataError(explain("numbers of shots of at least 1", str(list(ks)), "shots", "write 1,3,5,10"))
    if unit not in UNITS:
        raise DataError(
            explain(" or ".join(UNITS), f"'{unit}'", "unit", f"use one of them.{did_you_mean(unit, UNITS)}")
        )
    found = _instances(records, classes)
    titles = {c: names[c] if names is not None else str(c) for c in classes}
    drawn = {c: image_first(records, found[c], f"{seed}\0{titles[c]}") for c in classes}
    if unit == "image":  # every image's first comes before any image's second
        drawn = {c: rows[: len({records[i].path for i, _ in rows})] for c, rows in drawn.items()}
    short = [f"class '{titles[c]}': have {len(rows)}, need {need}" for c, rows in drawn.items() if len(rows) < need]
    if short:
        what = "instances" if unit == "instance" else "images with an instance"
        advice = "label more images of these classes, or ask for fewer shots"
        raise DataError(explain(f"{need} {what} of each class", "; ".join(short), "shots", advice))
    return {c: rows[:need] for c, rows in drawn.items()}


def possible(records: Sequence[ImageRecord], classes: Sequence[int], ks: Sequence[int],
             names: Sequence[str]) -> tuple[list[int], str]:  # fmt: skip
    """Those K of `ks` that every class has instances for, and in words why not the rest, "" where there is none."""
    have = {c: len(image_first(records, rows, "")) for c, rows in _instances(records, classes).items()}
    kept = [k for k in ks if all(k <= n for n in have.values())]
    if len(kept) == len(ks):
        return kept, ""
    few = [f"class '{names[c]}' has {n}" for c, n in have.items() if n < max(ks)]
    gone = ", ".join(str(k) for k in ks if k not in kept)
    return kept, f"no figures at {gone} shots: of support instances, {some(few)}"


def _instances(records: Sequence[ImageRecord], classes: Iterable[int]) -> Picks:
    """{class: [(record, box)]} of what can be a shot: no crowd."""
    found: Picks = {c: [] for c in classes}
    for i, record in enumerate(records):
        for j, label in enumerate(record.labels.tolist()):
            if label in found and not record.crowd[j]:
                found[label].append((i, j))
    return found


def image_first(
    records: Sequence[ImageRecord], instances: Iterable[tuple[int, int]], stream: str
) -> list[tuple[int, int]]:
    """(record, box) `instances` of one class in the order that `stream` seeds: each image once before any comes again.

    Records may share an image, and sources may repeat each other: an instance comes once, and an image is one image.
    """
    ranked = []
    for image, rows in _by_image(records, instances, stream).items():
        ranked += [(turn, image, pick) for turn, (_, pick) in enumerate(sorted(rows))]
    return [pick for _, _, pick in sorted(ranked)]


def shuffled(
    records: Sequence[ImageRecord], instances: Iterable[tuple[int, int]], stream: str
) -> list[tuple[int, int]]:
    """`instances` once each in the order that `stream` seeds, every order being as likely."""
    return [pick for _, pick in sorted(row for rows in _by_image(records, instances, stream).values() for row in rows)]


def _by_image(
    records: Sequence[ImageRecord], instances: Iterable[tuple[int, int]], stream: str
) -> dict[bytes, list[tuple[bytes, tuple[int, int]]]]:
    """{hash of an image: [(hash of an instance in it, (record, box))]}, each instance once."""
    images: dict[Path, dict[tuple, tuple[int, int]]] = {}
    for i, j in instances:
        images.setdefault(records[i].path, {}).setdefault(tuple(records[i].boxes[j].round(2).tolist()), (i, j))
    keys = _image_keys(images)
    return {
        _hash(stream, keys[path]): [
            (_hash(stream, keys[path], (records[i].boxes[j].round(1) + 0.0).tolist()), (i, j))
            for i, j in boxes.values()
        ]
        for path, boxes in images.items()
    }


def _image_keys(paths: Iterable[Path]) -> dict[Path, str]:
    """{path: its last folder and name}, with as many folders more as tell it from the others of that key."""
    keys: dict[Path, str] = {}
    rest, depth = list(paths), 2
    while rest:
        groups: dict[str, list[Path]] = {}
        for path in rest:
            groups.setdefault("/".join(path.parts[-depth:]), []).append(path)
        keys.update({group[0]: key for key, group in groups.items() if len(group) == 1})
        rest, depth = [path for group in groups.values() if len(group) > 1 for path in group], depth + 1
    return keys


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(readable, parts)).encode()).digest()


@dataclass(frozen=True)
class Shot:
    """image: path from the data root, with slashes. box: xyxy px."""

    image: str
    box: tuple[float, float, float, float]


Lists = Mapping[str, tuple[Shot, ...]]


@dataclass(frozen=True)
class ShotFile:
    """Shots on disk: JSON with the version, unit, nesting, sampler, seed and a sha256 of the lists.

    lists: {K: {class name: shots}}. A nested file holds its largest K alone, any other one list for each of `ks`.
    unit: what K counts, "instance", or "image" for one instance from each of K images.
    """

    names: tuple[str, ...]
    ks: tuple[int, ...]
    seed: int
    split: str
    lists: Mapping[int, Lists]
    unit: str = "instance"
    nested: bool = True
    sampler: str = SAMPLER

    @classmethod
    def draw(
        cls,
        data: DataSet,
        ks: Sequence[int],
        seed: int,
        split: str = "support",
        classes: Sequence[str] | None = None,
        unit: str = "instance",
    ) -> "ShotFile":
        """Draw from a split: the novel classes (all classes when there is none), or `classes` by name.

        Raises:
            DataError: no such split or class, or too few instances.
        """
        chosen = tuple(classes or data.novel or data.names)
        for name in chosen:
            if name not in data.names:
                advice = f"correct it.{did_you_mean(name, data.names)}"
                raise DataError(explain("a class of the data set", f"'{name}'", data.name, advice))
        records = data.split(split)
        picks = draw_shots(records, [data.names.index(name) for name in chosen], ks, seed, data.names, unit)
        shots = {data.names[c]: as_shots(data, records, rows) for c, rows in picks.items()}
        return cls(data.names, tuple(sorted(set(ks))), seed, split, {max(ks): shots}, unit)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that have shots, in the order of the largest K's list."""
        return tuple(self.lists[max(self.lists)])

    def shots(self, k: int | None = None) -> Lists:
        """{class name: its K-shot set}: the first k where sets are nested (all when there are fewer), else k's own
        list; without k, of the largest K.

        Raises:
            DataError: sets that are not nested, and none of them has k.
        """
        if self.nested:
            return {name: rows[:k] for name, rows in self.lists[max(self.lists)].items()}
        if k is not None and k not in self.lists:
            have = f"lists of {', '.join(map(str, sorted(self.lists)))}, which are not nested"
            advice = f"use one of these numbers of shots, or import {k} too"
            raise DataError(explain(f"a list of {counted(k, 'shot')}", have, "shots", advice))
        return self.lists[max(self.lists) if k is None else k]

    @property
    def sha256(self) -> str:
        """Of the lists alone: equal for equal shots."""
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _plain(self) -> dict:
        plain = {
            str(k): {name: [asdict(shot) for shot in rows] for name, rows in shots.items()}
            for k, shots in self.lists.items()
        }
        return plain[str(max(self.lists))] if self.nested else plain

    def save(self, path: str | Path) -> None:
        """Write the JSON, its folder made if missing."""
        keys = ("unit", "nested", "sampler", "sha256", "names", "ks", "seed", "split")
        document = {"version": VERSION, **{key: getattr(self, key) for key in keys}, "shots": self._plain()}
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_durably(Path(path), text.encode("utf-8", "backslashreplace"))  # JSON's own escape, read back as the name

    @classmethod
    def load(cls, path: str | Path) -> "ShotFile":
        """Read and verify.

        Raises:
            DataError: no file, no shot file, another version or unit, or lists that are not what was drawn.
        """
        document = _document(Path(path))
        try:
            ks, nested, shots = tuple(document["ks"]), document["nested"], document["shots"]
            lists = {int(k): _rows(row) for k, row in ({max(ks): shots} if nested else shots).items()}
            head = (tuple(document["names"]), ks, document["seed"], document["split"], lists)
            loaded = cls(*head, document["unit"], nested, str(document.get("sampler", SAMPLER)))
            fits = loaded.sha256 == document.get("sha256") and set(lists) <= set(ks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(explain("a shot file", f"a fault at {error}", str(path), _AGAIN)) from error
        if not fits or not lists:
            got = "another sha256: it was edited or damaged"
            raise DataError(explain("the list that was drawn", got, str(path), _AGAIN))
        lists = {k: {composed(name): rows for name, rows in shots.items()} for k, shots in loaded.lists.items()}
        return replace(loaded, names=tuple(map(composed, loaded.names)), lists=lists)

    def picks(self, data: DataSet, k: int | None = None) -> Picks:
        """{class: [(record index, box index), ...]} in split `split` of `data`, the k-shot set of each class.

        Raises:
            DataError: a class or shot that `data` does not have, a novel class of `data` without shots, another number
                than k of them, or no list of k.
        """
        records = data.split(self.split)
        places: dict[str, list[int]] = {}
        for i, record in enumerate(records):
            if record.path.is_relative_to(data.root):
                places.setdefault(record.path.relative_to(data.root).as_posix(), []).append(i)
        picks: Picks = {}
        lists = self.shots(k)
        problems = [f"class '{name}' is novel and has no shots" for name in data.novel if name not in lists]
        for name, rows in lists.items():
            if name not in data.names:
                problems.append(f"class '{name}' is not in the data set.{did_you_mean(name, data.names)}")
                continue
            if k is not None and len(rows) != k:
                problems.append(f"class '{name}': have {counted(len(rows), 'shot')}, need {k}")
            label = data.names.index(name)
            found = [match(records, places.get(shot.image, ()), label, shot.box, MATCH) for shot in rows]
            picks[label] = [pick for pick in found if pick is not None]
            lost = len(rows) - len(picks[label])
            if lost:
                problems.append(f"class '{name}': {counted(lost, 'shot')} {are(lost)} not in split '{self.split}'")
        if problems:
            raise DataError(explain("shots of this data set", "; ".join(problems), data.name, _AGAIN))
        return picks


def load_picks(path: str | Path, data: DataSet, k: int | None = None) -> Picks:
    """ShotFile.load(path).picks(data, k)."""
    return ShotFile.load(path).picks(data, k)


_AGAIN = "draw it again with fsdet data shots"


def _document(path: Path) -> dict:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(explain("a shot file", f"no readable JSON ({error})", str(path), _AGAIN)) from error
    got = document if isinstance(document, dict) else {}
    version = got.get("version")
    allowed = {"version": (1, 2), "unit": UNITS if version == 2 else UNITS[:1], "nested": (True, version != 2)}
    for key, values in allowed.items():
        if got.get(key) not in values:
            wanted = " or ".join(dict.fromkeys(map(str, values)))
            raise DataError(explain(f"a shot file with {key} = {wanted}", repr(got.get(key)), str(path), _AGAIN))
    for key, kind in {"names": list, "ks": list, "seed": int, "split": str}.items():
        if not isinstance(got.get(key), kind):
            raise DataError(explain(f"a shot file whose {key} is of type {kind.__name__}", repr(got.get(key)),
                                    str(path), _AGAIN))  # fmt: skip
    return got


def _rows(shots: Mapping[str, Sequence[Mapping]]) -> Lists:
    """Shots of a file's text; ValueError, KeyError or TypeError for another form."""
    lists = {}
    for name, rows in shots.items():
        lists[str(name)] = tuple(Shot(str(row["image"]), tuple(map(float, row["box"]))) for row in rows)
        if any(len(shot.box) != 4 for shot in lists[str(name)]):
            raise ValueError(f"class '{name}': a box without four numbers")
    return lists


def as_shots(data: DataSet, records: Sequence[ImageRecord], picks: Sequence[tuple[int, int]]) -> tuple[Shot, ...]:
    """(record index, box index) of one split of `data` as they are written into a file."""
    return tuple(_shot(records[i], j, data.root) for i, j in picks)


def _shot(record: ImageRecord, box: int, root: Path) -> Shot:
    inside = record.path.is_relative_to(root)
    image = record.path.relative_to(root).as_posix() if inside else record.path.as_posix()
    return Shot(image, tuple(round(value, 2) for value in record.boxes[box].tolist()))


def picks_sha256(data: DataSet, split: str, picks: Mapping[int, Sequence[tuple[int, int]]]) -> str:
    """Of {class: (record, box)} as names, images and boxes: equal for equal shots wherever the data set lies.

    It is the sha256 of the nested ShotFile that holds these lists and no others.
    """
    records = data.split(split)
    lists = {data.names[c]: as_shots(data, records, rows) for c, rows in picks.items()}
    k = max(map(len, lists.values()), default=0)
    return ShotFile(data.names, (k,), 0, split, {k: lists}).sha256


def match(
    records: Sequence[ImageRecord], places: Sequence[int], label: int, box: Sequence[float], within: float
) -> tuple[int, int] | None:
    """(record, box) among records `places` whose box of class `label` is nearest to `box`, and nowhere more than
    `within` px from it."""
    best, pick = within, None
    for i in places:
        apart = np.abs(records[i].boxes - np.array(box, np.float32)).max(1, initial=0)
        for j in np.flatnonzero(records[i].labels == label).tolist():
            if apart[j] < best or (pick is None and apart[j] == best):
                best, pick = float(apart[j]), (i, j)
    return pick
