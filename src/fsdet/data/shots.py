# SPDX-License-Identifier: AGPL-3.0-or-later
"""K-shot draws: K counts instances per class, the K-shot set is the first K of one list, so that sets are nested.

Each class has its own stream, seeded by its name: neither the order of classes, nor the other classes, nor where the
data lie on the disk changes its draw. Images come in hashed order and give one instance each before any gives a second.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fsdet.data.sources import DataSet
from fsdet.errors import DataError, did_you_mean, explain
from fsdet.types import ImageRecord

VERSION = 1
SAMPLER = "image-first-1"
UNIT = "instance"
MAX_BYTES = 64 << 20
MATCH = 0.05  # px between a stored box and the data set's

Picks = dict[int, list[tuple[int, int]]]


def draw_shots(
    records: Sequence[ImageRecord],
    classes: Sequence[int],
    ks: Sequence[int],
    seed: int,
    names: Sequence[str] | None = None,
) -> Picks:
    """{class: [(record index, box index), ...]}, max(ks) of each; the first K are the K-shot set. Crowds are left out.

    names: the data set's classes; with them a class's stream is seeded by its name, else by its number.

    Raises:
        DataError: a class with fewer instances than max(ks), every such class listed.
    """
    need = max(ks, default=0)
    if not ks or min(ks) < 1:
        raise DataError(explain("numbers of shots of at least 1", str(list(ks)), "shots", "write 1,3,5,10"))
    found: dict[int, dict[int, list[int]]] = {c: {} for c in classes}
    for i, record in enumerate(records):
        for j, label in enumerate(record.labels.tolist()):
            if label in found and not record.crowd[j]:
                found[label].setdefault(i, []).append(j)
    titles = {c: names[c] if names is not None else str(c) for c in classes}
    have = {c: sum(map(len, images.values())) for c, images in found.items()}
    short = [f"class '{titles[c]}': have {have[c]}, need {need}" for c in classes if have[c] < need]
    if short:
        raise DataError(
            explain(
                f"{need} instances of each class",
                "; ".join(short),
                "shots",
                "label more images of these classes, or ask for fewer shots",
            )
        )
    return {c: _ordered(records, found[c], f"{seed}\0{titles[c]}")[:need] for c in classes}


def _ordered(records: Sequence[ImageRecord], images: Mapping[int, list[int]], stream: str) -> list[tuple[int, int]]:
    ranked = []
    for i, boxes in images.items():
        key = "/".join(records[i].path.parts[-2:])
        image = _hash(stream, key)
        inside = sorted(boxes, key=lambda j: (_hash(stream, key, records[i].boxes[j].round(1).tolist()), j))
        ranked += [(turn, image, i, j) for turn, j in enumerate(inside)]
    return [(i, j) for _, _, i, j in sorted(ranked)]


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


@dataclass(frozen=True)
class Shot:
    """image: path from the data root, with slashes. box: xyxy px."""

    image: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ShotFile:
    """A draw on disk: JSON with the version, unit, nesting, sampler, seed and a sha256 of the list."""

    names: tuple[str, ...]
    ks: tuple[int, ...]
    seed: int
    split: str
    shots: Mapping[str, tuple[Shot, ...]]

    @classmethod
    def draw(
        cls, data: DataSet, ks: Sequence[int], seed: int, split: str = "support", classes: Sequence[str] | None = None
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
        picks = draw_shots(records, [data.names.index(name) for name in chosen], ks, seed, data.names)
        shots = {data.names[c]: tuple(_shot(records[i], j, data.root) for i, j in rows) for c, rows in picks.items()}
        return cls(data.names, tuple(sorted(set(ks))), seed, split, shots)

    @property
    def sha256(self) -> str:
        """Of the list alone: equal for equal shots."""
        plain = {name: [asdict(shot) for shot in rows] for name, rows in self.shots.items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the JSON, its folder made if missing."""
        head = {"version": VERSION, "unit": UNIT, "nested": True, "sampler": SAMPLER, "sha256": self.sha256}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**head, **asdict(self)}, indent=1, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "ShotFile":
        """Read and verify.

        Raises:
            DataError: no file, no shot file, another version or unit, or a list that is not what was drawn.
        """
        document = _document(Path(path))
        try:
            shots = {
                str(name): tuple(Shot(str(row["image"]), tuple(map(float, row["box"]))) for row in rows)
                for name, rows in document["shots"].items()
            }
            loaded = cls(tuple(document["names"]), tuple(document["ks"]), document["seed"], document["split"], shots)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(explain("a shot file", f"a fault at {error}", str(path), _AGAIN)) from error
        if any(len(shot.box) != 4 for rows in shots.values() for shot in rows) or loaded.sha256 != document.get(
            "sha256"
        ):
            raise DataError(
                explain("the list that was drawn", "another sha256: it was edited or damaged", str(path), _AGAIN)
            )
        return loaded

    def picks(self, data: DataSet, k: int | None = None) -> Picks:
        """{class: [(record index, box index), ...]} in split `split` of `data`, the first k of each class.

        Raises:
            DataError: a class or shot that `data` does not have, or fewer than k shots.
        """
        records = data.split(self.split)
        places = {
            record.path.relative_to(data.root).as_posix(): i
            for i, record in enumerate(records)
            if record.path.is_relative_to(data.root)
        }
        picks: Picks = {}
        problems = []
        for name, rows in self.shots.items():
            if name not in data.names:
                problems.append(f"class '{name}' is not in the data set.{did_you_mean(name, data.names)}")
                continue
            if k is not None and len(rows) < k:
                problems.append(f"class '{name}': have {len(rows)} shots, need {k}")
            label = data.names.index(name)
            picks[label] = [
                (i, j)
                for shot in rows[:k]
                if (i := places.get(shot.image)) is not None and (j := _match(records[i], label, shot)) is not None
            ]
            lost = len(rows[:k]) - len(picks[label])
            problems += [f"class '{name}': {lost} shots are not in split '{self.split}'"] if lost else []
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
    head = {"version": VERSION, "unit": UNIT, "nested": True}
    for key, value in head.items():
        got = document.get(key) if isinstance(document, dict) else None
        if got != value:
            raise DataError(explain(f"a shot file with {key} = {value}", repr(got), str(path), _AGAIN))
    return document


def _shot(record: ImageRecord, box: int, root: Path) -> Shot:
    inside = record.path.is_relative_to(root)
    image = record.path.relative_to(root).as_posix() if inside else record.path.as_posix()
    return Shot(image, tuple(round(value, 2) for value in record.boxes[box].tolist()))


def _match(record: ImageRecord, label: int, shot: Shot) -> int | None:
    apart = np.abs(record.boxes - np.array(shot.box, np.float32)).max(1, initial=0)
    near = np.flatnonzero((record.labels == label) & (apart <= MATCH))
    return int(near[apart[near].argmin()]) if len(near) else None
