# SPDX-License-Identifier: AGPL-3.0-or-later
"""Published shot lists, read as they are and never drawn again: those of TFA for VOC and COCO, and those of CD-FSOD.

K shots, class C, seed s; seed 0 lies in the folder itself or in seed0/, every other one in seed{s}/.

    tfa-voc   box_{K}shot_{C}_train.txt            an image path a line; K boxes of C in these images, see `_drawn`
    tfa-coco  full_box_{K}shot_{C}_trainval.json   a COCO json with K boxes of C
    cd-fsod   {K}_shot.json                        a COCO json with one box of a class in each of its K images

No path in a list is opened: its images are looked up by name among the records of the data set.
"""

import json
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.shots import Lists, Shot, ShotFile, as_shots, match, shuffled
from fsdet.data.sources import DataSet
from fsdet.errors import DataError, are, counted, did_you_mean, explain
from fsdet.names import composed

LAYOUTS = {
    "tfa-voc": re.compile(r"box_(?P<k>[1-9][0-9]{0,5})shot_(?P<name>.+)_train\.txt"),
    "tfa-coco": re.compile(r"full_box_(?P<k>[1-9][0-9]{0,5})shot_(?P<name>.+)_trainval\.json"),
    "cd-fsod": re.compile(r"(?P<k>[1-9][0-9]{0,5})_shot\.json"),
}
PATTERNS = "box_{K}shot_{class}_train.txt, full_box_{K}shot_{class}_trainval.json or {K}_shot.json"
MAX_BYTES = 64 << 20  # of one list
NEAR = 1.0  # px between a listed box and the data set's: rounding, and VOC's counting from 1
LISTED = 100  # lines in the error
_YEAR = re.compile(r"COCO_[a-z]+[0-9]{4}_")  # COCO 2014 writes it in front of the number that 2017 uses alone

log = logging.getLogger("fsdet")


@dataclass(frozen=True)
class Entry:
    """One line of a list. box: xyxy px, None where only the image is named."""

    image: str
    box: tuple[float, ...] | None = None


def read_published(
    data: DataSet, folder: str | Path, seeds: Sequence[int], ks: Sequence[int] | None = None, split: str | None = None
) -> list[ShotFile]:
    """One ShotFile a seed from a folder of published lists: a list for each K, which need not be nested.

    The lists of the novel classes are read (of all classes when there is none); the others have to be classes of the
    data set. ks: None for every K that is there. split: where the images are; None for `support`, else `train`.

    Raises:
        DataError: no such lists; or every class, list, image and box that does not fit, at once.
    """
    split = split or ("support" if data.has("support") else "train")
    found = _files(Path(folder), seeds)
    layout = _layout(found, folder)
    files = {seed: lists[layout] for seed, lists in found.items()}
    ks = sorted(set(ks or (k for lists in files.values() for k, _ in lists)))
    listed = {name for lists in files.values() for _, name in lists}
    source = _Source(data, split, layout, listed)
    problems = source.class_faults(listed) if layout != "cd-fsod" else []
    drawn = [source.read(seed, ks, files[seed], problems) for seed in seeds]
    if problems:
        raise DataError(_listed(problems, str(folder), split, data))
    if source.difficult:
        told = f"{counted(source.difficult, 'shot')} {are(source.difficult)} marked difficult"
        log.warning("%s: %s, where lists have too few others", folder, told)
    if source.repeated:
        told = f"{counted(source.repeated, 'shot')} come{'s' * (source.repeated == 1)} twice"
        log.warning("%s: %s, where lists name an image twice and show too few others", folder, told)
    return drawn


# files ------------------------------------------------------------------------------------------------------------

Found = dict[str, dict[tuple[int, str], Path]]  # {layout: {(K, class, or "" for all): file}}


def _files(folder: Path, seeds: Sequence[int]) -> dict[int, Found]:
    """Lists by seed; links that leave the folder are passed over."""
    if not folder.is_dir():
        names = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(explain("a folder of published lists", "no folder", str(folder),
                                f"correct the path.{did_you_mean(folder.name, names)}"))  # fmt: skip
    root = Root(folder, Report())
    found: dict[int, Found] = {}
    for seed in seeds:
        place = root.folder / f"seed{seed}"
        place = root.folder if seed == 0 and not place.is_dir() else place
        found[seed] = {layout: {} for layout in LAYOUTS}
        for name, path in root.files(place).items():
            for layout, pattern in LAYOUTS.items():
                if fits := pattern.fullmatch(name):
                    found[seed][layout][int(fits["k"]), composed(fits.groupdict().get("name", ""))] = Path(path)
    return found


def _layout(files: dict[int, Found], folder: str | Path) -> str:
    held = [layout for layout in LAYOUTS if any(found[layout] for found in files.values())]
    if len(held) == 1:
        return held[0]
    seeds = f"seed {min(files)}" if len(files) == 1 else f"seeds {min(files)} to {max(files)}"
    names = sorted(entry.name for entry in Path(folder).iterdir())
    got = " and ".join(held) or f"none; it holds {', '.join(names[:8]) or 'nothing'}{', ...' if names[8:] else ''}"
    advice = "name the folder that holds these files, or seed folders seed1, seed2, ... with them"
    raise DataError(explain(f"lists of one kind for {seeds} ({PATTERNS})", got, str(folder), advice))


def _entries(layout: str, path: Path, name: str) -> dict[str, list[Entry]]:
    """{class: its entries} of one file. ValueError with what is wrong with it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        text = path.read_bytes().decode("utf-8-sig")
        if layout == "tfa-voc":
            return {name: [Entry(line.strip()) for line in text.splitlines() if line.strip()]}
        return _coco_entries(json.loads(text), name)
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _coco_entries(document: object, name: str) -> dict[str, list[Entry]]:
    """{class: entries} of a COCO json; of `name` alone where it is given, another class is a ValueError then."""
    try:
        images = {row["id"]: str(row["file_name"]) for row in document["images"]}  # type: ignore[index]
        names = {row["id"]: composed(row["name"]) for row in document["categories"]}  # type: ignore[index]
        entries: dict[str, list[Entry]] = {name: []} if name else {}
        for row in document["annotations"]:  # type: ignore[index]
            x, y, width, height = map(float, row["bbox"])
            entry = Entry(images[row["image_id"]], (x, y, x + width, y + height))
            entries.setdefault(names[row["category_id"]], []).append(entry)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"no COCO json (a fault at {error})") from error
    others = sorted(set(entries) - {name}) if name else []
    if others:
        raise ValueError(f"boxes of {', '.join(others)} in the list of '{name}'")
    return entries


# lists against records --------------------------------------------------------------------------------------------


class _Source:
    """One split of a data set, its images found by the names that lists give them."""

    def __init__(self, data: DataSet, split: str, layout: str, listed: Collection[str]) -> None:
        self.data, self.split, self.layout, self.listed = data, split, layout, listed
        self.records = data.split(split)
        self.unit = "image" if layout == "cd-fsod" else "instance"
        self.wanted = data.novel or data.names
        self.difficult = 0  # shots taken although they are marked so
        self.repeated = 0  # shots taken a second time
        self.images: dict[str, list[int]] = {}
        for i, record in enumerate(self.records):
            self.images.setdefault(_key(record.path.name), []).append(i)

    def class_faults(self, listed: Collection[str]) -> list[str]:
        """Listed classes that the data set does not know, and novel classes without a list."""
        unknown = sorted(name for name in listed if name not in self.data.names)
        absent = [name for name in self.wanted if name not in listed]
        return [
            *(f"class '{name}' is neither base nor novel.{did_you_mean(name, self.data.names)}" for name in unknown),
            *(f"class '{name}' has no list" for name in absent),
        ]

    def read(self, seed: int, ks: Sequence[int], files: dict[tuple[int, str], Path], problems: list[str]) -> ShotFile:
        """The file of one seed; what does not fit is added to `problems`."""
        lists = {}
        for k in ks:
            shots = self._shots(seed, k, files, problems)
            lists[k] = {name: shots[name] for name in self.wanted if name in shots}
        return ShotFile(self.data.names, tuple(ks), seed, self.split, lists, self.unit, False, self.layout)

    def _shots(self, seed: int, k: int, files: dict[tuple[int, str], Path], problems: list[str]) -> Lists:
        shots: dict[str, tuple[Shot, ...]] = {}
        names = ("",) if self.layout == "cd-fsod" else self.wanted
        absent = [name for name in names if (k, name) not in files and (name in self.listed or not name)]
        if absent:
            of = f" of {', '.join(absent)}" if any(absent) else ""
            problems.append(f"seed {seed}: no list of {counted(k, 'shot')}{of}")
        for name in (name for name in names if (k, name) in files):
            path = files[k, name]
            where = f"{path.parent.name}/{path.name}"
            try:
                entries = _entries(self.layout, path, name)
            except ValueError as error:
                problems.append(f"{where}: {error}")
                continue
            if not name:
                problems += [f"{where}: {fault}" for fault in self.class_faults(entries)]
            for title in (title for title in entries if title in self.wanted):
                faults, picks = self._picks(title, k, entries[title], seed)
                problems += [f"{where}: '{title}': {'; '.join(faults)}"] if faults else []
                shots[title] = as_shots(self.data, self.records, picks)
        return shots

    def _picks(self, name: str, k: int, entries: list[Entry], seed: int) -> tuple[list[str], list[tuple[int, int]]]:
        """(faults, picks) of one class: exactly k picks where there is no fault."""
        label = self.data.names.index(name)
        if self.layout == "tfa-voc":
            faults, picks = self._drawn(label, k, entries, f"{seed}\0{name}")
        else:
            faults, picks = self._boxed(label, entries)
        if not faults and len(picks) != k:
            faults.append(f"have {counted(len(picks), 'box', 'es')}, need {k}")
        if not faults and self.unit == "image" and len({self.records[i].path for i, _ in picks}) != k:
            faults.append(f"boxes of fewer than {k} images, need one box in each")
        return faults, picks

    def _drawn(self, label: int, k: int, entries: list[Entry], stream: str) -> tuple[list[str], list[tuple[int, int]]]:
        """k boxes of the listed images. A list may show more, of which its publishers' loader draws k, all boxes being
        as likely: here with the seed. Difficult ones, which they count, come last, and after those the boxes of an
        image that is listed twice once more: the script that drew the lists could repeat one and counted it again."""
        faults: list[str] = []
        pools = self._pools(label, entries, faults)
        picks: list[tuple[int, int]] = []
        for name, pool in pools.items():
            taken = shuffled(self.records, pool, stream)[: k - len(picks)]
            self.difficult += len(taken) if name == "difficult" else 0
            self.repeated += len(taken) if name == "repeated" else 0
            picks += taken
        return faults, picks

    def _pools(self, label: int, entries: list[Entry], faults: list[str]) -> dict[str, list[tuple[int, int]]]:
        """{"plain", "difficult", "repeated": boxes of the class in the listed images}, in the order of preference."""
        pools: dict[str, list[tuple[int, int]]] = {"plain": [], "difficult": [], "repeated": []}
        seen: set[int] = set()
        for entry in entries:
            found = self._find(entry.image, faults)
            boxes = [(i, j) for i in found for j in np.flatnonzero(self.records[i].labels == label).tolist()]
            for i, j in boxes:
                again, crowd = i in seen, self.records[i].crowd[j]
                pools["repeated" if again else "difficult" if crowd else "plain"].append((i, j))
            seen.update(found)
            if found and not boxes:
                faults.append(f"no box of it in '{entry.image}'")
        return pools

    def _boxed(self, label: int, entries: list[Entry]) -> tuple[list[str], list[tuple[int, int]]]:
        """The instances that the listed boxes are."""
        faults: list[str] = []
        picks: list[tuple[int, int]] = []
        for entry in entries:
            found = self._find(entry.image, faults)
            if not found or entry.box is None:
                continue
            height, width = self.records[found[0]].size
            pick = match(self.records, found, label, np.clip(entry.box, 0, (width, height, width, height)), NEAR)
            box = f"[{', '.join(f'{value:g}' for value in entry.box)}] in '{entry.image}'"
            if pick is None:
                faults.append(f"no such box {box}")
            elif self.records[pick[0]].crowd[pick[1]]:
                faults.append(f"a crowd {box}")
            elif pick in picks:
                faults.append(f"twice {box}")
            else:
                picks.append(pick)
        return faults, picks

    def _find(self, image: str, faults: list[str]) -> list[int]:
        """Records of the image, several where sources share it; of equal names those in the most similar folder."""
        parts = image.replace("\\", "/").split("/")
        found = self.images.get(_key(parts[-1]), [])
        depth = [_common(parts, self.records[i].path.parts) for i in found]
        best = [i for i, n in zip(found, depth, strict=True) if n == max(depth)]
        paths = {self.records[i].path for i in best}
        if len(paths) == 1:
            return best
        count = f"{len(paths)} images" if paths else "no image"
        faults.append(f"{count} called '{image}' in split '{self.split}'")
        return []


def _key(name: str) -> str:
    """A file name without its suffix and without COCO's split and year."""
    return _YEAR.sub("", name.rpartition(".")[0] or name, count=1)


def _common(written: Sequence[str], real: Sequence[str]) -> int:
    """How many folders agree, counted from the file name upwards."""
    count = 0
    for a, b in zip(reversed(written[:-1]), reversed(real[:-1]), strict=False):
        if a != b:
            break
        count += 1
    return count


def _listed(problems: list[str], folder: str, split: str, data: DataSet) -> str:
    head = explain(
        f"lists whose classes and shots are in split '{split}' of {data.name}",
        counted(len(problems), "fault"),
        folder,
        "name the split that has their images (--split) and the numbers of shots and seeds that are there (--k, "
        "--seeds), or correct the classes of the data YAML:",
    )
    rest = [f"  and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    return "\n".join([head, *(f"  {problem}" for problem in problems[:LISTED]), *rest])
