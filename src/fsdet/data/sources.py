# SPDX-License-Identifier: AGPL-3.0-or-later
"""load(): a data YAML, folder or json in any of four formats -> one DataSet of ImageRecords."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from fsdet.data import coco, refdet, voc, yolo
from fsdet.data.datayaml import SPLITS, DataYaml, Source, parse
from fsdet.data.guess import guess_format, guess_layout
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.splits import other_spelling
from fsdet.data.support import support_folder
from fsdet.data.table import Table
from fsdet.errors import DataError, did_you_mean, explain
from fsdet.types import ImageRecord

__all__ = ["DataSet", "load", "support_folder"]

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")


class DataSet:
    """Splits of ImageRecords over one list of classes: base first, then novel."""

    def __init__(
        self,
        root: Path,
        base: Sequence[str],
        novel: Sequence[str],
        splits: dict[str, list[ImageRecord]],
        report: Report,
        name: str = "data",
    ) -> None:
        self.root = root
        self.base = tuple(base)
        self.novel = tuple(novel)
        self.report = report
        self.name = name
        self._splits = splits

    @property
    def names(self) -> tuple[str, ...]:
        return self.base + self.novel

    @property
    def num_base(self) -> int:
        return len(self.base)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that were loaded, in the order train, val, test, support."""
        return tuple(self._splits)

    def has(self, split: str) -> bool:
        return split in self._splits

    def split(self, split: str) -> list[ImageRecord]:
        """The records of a split.

        Raises:
            DataError: the data set has no such split.
        """
        if split not in self._splits:
            raise DataError(
                explain(f"a split '{split}'", ", ".join(self._splits) or "no split", self.name, self._other(split))
            )
        return self._splits[split]

    def _other(self, split: str) -> str:
        """What to do about a split that is not here: one of another name than SPLITS can be nowhere."""
        there = f"name one that is there ({', '.join(self._splits)})" if self._splits else "name another data set"
        if split in SPLITS:
            return f"{there}, or add `{split}:` to the data YAML"
        return f"{there}; a data YAML has no splits but {', '.join(SPLITS)}.{did_you_mean(split, self._splits)}"

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(records)}" for split, records in self._splits.items())
        return f"DataSet({self.name}: {self.num_base} base, {len(self.novel)} novel classes; {sizes})"


def load(path: str | Path, policy: str = "drop", splits: Sequence[str] | None = None,
         shapes: bool = False) -> DataSet:  # fmt: skip
    """Read a data YAML, a COCO json, or a folder that holds either, or a YOLO, VOC or RefDet layout.

    Args:
        policy: "drop" mends and drops faulty labels and reports them; "fail" refuses a data set with any.
        splits: only these (those that exist); None reads all of them.
        shapes: read the outlines of a COCO json, too; the other formats have none.
    Raises:
        DataError: what is at fault and where; with "fail", every faulty label (capped list).
    """
    if policy not in ("drop", "fail"):
        raise DataError(explain("drop or fail", repr(policy), "policy", "use one of them"))
    report = Report()
    listed = plan(path, report)
    root = Root(listed.root, report)
    wanted = [split for split in listed.splits if splits is None or split in splits]
    cache: dict[Source | tuple, Table] = {}
    tables = {
        split: [_table(source, split, listed, root, report, cache, shapes) for source in listed.splits[split]]
        for split in wanted
    }
    everything = [table for group in tables.values() for table in group]
    base, novel = _classes(listed, everything, report, complete=splits is None)
    index = {name: number for number, name in enumerate((*base, *novel))}
    done: dict[int, list[ImageRecord]] = {}
    for table in everything:
        if id(table) not in done:
            done[id(table)] = table.records(index, report, listed.exhaustive)
    if policy == "fail":
        report.raise_faults(str(path))
    records = {split: [record for table in group for record in done[id(table)]] for split, group in tables.items()}
    for split, found in records.items():
        if not found:
            raise DataError(
                explain("at least one readable image", "none", f"{listed.file}: {split}", f"look at:\n{report}")
            )
    return DataSet(root.folder, base, novel, records, report, str(path))


def plan(path: str | Path, report: Report) -> DataYaml:
    """What `load` would read: splits and lists of classes as they are written, no annotation opened.

    Raises:
        DataError: nothing there, or a data YAML that cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            explain(
                "a data YAML, COCO json or folder",
                "nothing there",
                str(path),
                f"correct the path.{did_you_mean(path.name, siblings)}",
            )
        )
    if path.is_dir():
        yamls = [path / name for name in YAML_NAMES if (path / name).is_file()]
        return parse(yamls[0], report) if yamls else guess_layout(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return parse(path, report)
    home = path.parent.resolve()
    root = home.parent if home.name == "annotations" else home
    relative = str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) else path.name
    return DataYaml(path, root, {"train": (Source(relative, path.name),)})


def _table(source: Source, split: str, plan: DataYaml, root: Root, report: Report, cache: dict,
           shapes: bool) -> Table:  # fmt: skip
    """A source's table; a source that two splits share is read and reported once."""
    path = root.source(source.path, source.where)
    images = root.source(source.images, source.where) if source.images else None
    fmt = guess_format(path, root, report)
    readers: dict[str, Callable[[], Table]] = {
        "coco": lambda: coco.read(path, root, report, images, shapes),
        "yolo": lambda: yolo.read(path, root, report, source.names or plan.names),
        "voc": lambda: voc.read(path, root, report, split),
        "refdet": lambda: refdet.read(path, root, report, split),
    }
    if path.is_dir() and fmt == "coco":
        path = next(Path(file) for name, file in root.files(path).items() if name.lower().endswith(".json"))
    listed = (path / "ImageSets" / "Main" / f"{split}.txt").is_file()
    apart = listed or (fmt == "refdet" and split == "support")
    key = (path, images, source.names, split if apart else "")
    if key not in cache:
        cache[key] = readers[fmt]()
    return cache[key]


def _classes(
    plan: DataYaml, tables: Sequence[Table], report: Report, complete: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The data YAML's lists, checked against the names that the sources know."""
    found = list(dict.fromkeys(name for table in tables for name in table.names))
    base = plan.base if plan.base is not None else tuple(name for name in found if name not in plan.novel)
    if not base and not plan.novel:
        raise DataError(
            explain("at least one class", "no object and no class list", str(plan.file), "look at the labels")
        )
    listed = (*base, *plan.novel)
    absent = [name for name in listed if name not in found] if complete else []
    spare = [name for name in found if name not in listed]
    problems = []
    for name in absent:
        near = _near(name, spare if plan.base is not None else base)
        if near:
            where = f"{plan.file.name}: {'base' if name in base else 'novel'}"
            problems.append(
                explain(
                    f"a class of the sources ({_some(found)})",
                    f"'{name}'",
                    where,
                    f"correct it. Did you mean '{near}'?",
                )
            )
        elif plan.base is None:  # the class that is meant would silently be taken for a base class
            cure = "name one of these, or list base: as well, so that the others are none of both"
            problems.append(explain(f"a class of the sources ({_some(found)})", f"'{name}'",
                                    f"{plan.file.name}: novel", cure))  # fmt: skip
        else:
            report.add("class absent from every source", detail=f"'{name}'")
    if problems:
        raise DataError("\n".join(problems))
    if plan.published and absent:
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        advice = "name the set that this split is of, or write base: and novel: for a part of it"
        raise DataError(
            explain(
                f"the {len(listed)} classes of split {plan.published}",
                f"{len(listed) - len(absent)} of them, without {shown}",
                plan.file.name,
                advice,
            )
        )
    labelled = set().union(*(table.labelled() for table in tables))
    for name in (name for name in listed if complete and name in found and name not in labelled):
        report.add("class without boxes", detail=f"'{name}'")
    return base, plan.novel


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _near(name: str, choices: Sequence[str]) -> str | None:
    """A choice that differs in case, spaces or a letter or two, or is the other published word for it."""
    if (other := other_spelling(name)) in choices:
        return other

    def plain(text: str) -> str:
        return text.casefold().replace("_", "").replace("-", "").replace(" ", "")

    same = {plain(choice): choice for choice in choices}
    close = get_close_matches(plain(name), list(same), n=1, cutoff=0.8)
    return same[close[0]] if close else None
