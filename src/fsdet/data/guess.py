# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which of the formats a source is, and which splits a folder without a data YAML holds."""

from pathlib import Path

from fsdet.data.datayaml import DataYaml, Source
from fsdet.data.images import is_image
from fsdet.data.refdet import is_refdet
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.errors import DataError, explain

SPLIT_WORDS = {
    "train": ("train", "training", "base"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
    "support": ("support",),
}
_NEXT = ("give a COCO json, a YOLO image folder with labels/ beside it, a VOC folder with xml files, or a RefDet "
         "folder with samples/")  # fmt: skip


def guess_format(path: Path, root: Root, report: Report) -> str:
    """ "coco", "yolo", "voc" or "refdet". Where a folder holds several, xml files win over a json, either over txt.

    Raises:
        DataError: none of them.
    """
    if path.is_file():
        if path.suffix.lower() == ".json":
            return "coco"
        if path.suffix.lower() == ".txt":
            return "voc" if "ImageSets" in path.parts else "yolo"
        raise DataError(explain("a json, a txt list or a folder", f"'{path.name}'", root.show(path), _NEXT))
    if is_refdet(path):
        return "refdet"
    found = [name for name, test in (("voc", _is_voc), ("coco", _is_coco), ("yolo", _is_yolo)) if test(path, root)]
    if not found:
        raise DataError(explain("a COCO, YOLO or VOC source", "neither json, xml nor images", str(path), _NEXT))
    several = [name for name in found if name != "yolo" or name == found[0] or _has_labels(path, root)]
    if len(several) > 1:
        report.add("several formats", root.show(path), f"{' and '.join(several)}: {found[0]} used")
    return found[0]


def guess_layout(folder: Path) -> DataYaml:
    """The splits of a folder without a data YAML: subfolders or jsons named after splits, else one split `train`.

    A RefDet folder has its frames as `train` and its photographs as `support`.

    Raises:
        DataError: the folder is empty.
    """
    root = folder.resolve()
    splits: dict[str, tuple[Source, ...]] = {}
    if is_refdet(root):
        return DataYaml(folder, root, {split: (Source(".", folder.name),) for split in ("train", "support")})
    for place in (root / "annotations", root, root / "images"):
        if splits or not place.is_dir():
            continue
        entries = sorted(entry for entry in place.iterdir() if entry.is_dir() or entry.suffix == ".json")
        for split, words in SPLIT_WORDS.items():
            chosen = [entry for entry in entries if _word(entry) in words]
            if chosen:
                splits[split] = tuple(Source(str(entry.relative_to(root)), folder.name) for entry in chosen)
    if not splits:
        splits["train"] = (Source(".", folder.name),)
    return DataYaml(folder, root, splits)


def _word(entry: Path) -> str:
    """`train` of train/, train.json, train2017/, instances_train2017.json."""
    stem = entry.name.removesuffix(".json").removesuffix(".coco").lower()
    if entry.is_file() and not stem.startswith(("captions", "person_keypoints")):
        stem = stem.rpartition("_")[2]
    return stem.rstrip("0123456789")


def _is_coco(path: Path, root: Root) -> bool:
    jsons = [name for name in root.files(path) if name.lower().endswith(".json")]
    return len(jsons) == 1


def _is_voc(path: Path, root: Root) -> bool:
    if path.name == "JPEGImages" and (path.parent / "Annotations").is_dir():
        return True
    return (path / "Annotations").is_dir() or any(name.lower().endswith(".xml") for name in root.files(path))


def _is_yolo(path: Path, root: Root) -> bool:
    return any(is_image(name) for _, files in root.walk(path) for name in files)


def _has_labels(path: Path, root: Root) -> bool:
    texts = {Path(name).stem for name in root.files(path) if name.lower().endswith(".txt")}
    return any(is_image(name) and Path(name).stem in texts for name in root.files(path))
