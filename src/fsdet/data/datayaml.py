# SPDX-License-Identifier: AGPL-3.0-or-later
"""The data YAML: where the splits are and which classes are base and novel. The one place of data/ that knows YAML."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fsdet.data.report import Report
from fsdet.data.splits import named_split
from fsdet.errors import DataError, did_you_mean, explain
from fsdet.names import composed, repeated

SPLITS = ("train", "val", "test", "support")
KEYS = ("path", *SPLITS, "base", "novel", "split", "names", "nc", "exhaustive", "download")
MAX_BYTES = 4 << 20
MAX_NODES = 200_000  # after aliases are written out


@dataclass(frozen=True)
class Source:
    """One source of a split. names: class names of a YOLO source; images: where a COCO json's file names start."""

    path: str
    where: str
    names: tuple[str, ...] | None = None
    images: str | None = None


@dataclass(frozen=True)
class DataYaml:
    """base is None when the file lists no base classes: then every class found and not novel is base.

    exhaustive: an image shows no unlabelled object of any class; False: only the classes of its own source are
    labelled (`exhaustive: source`).
    published: the name under which `split` gave the lists, if it did.
    """

    file: Path
    root: Path
    splits: Mapping[str, tuple[Source, ...]]
    base: tuple[str, ...] | None = None
    novel: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None
    exhaustive: bool = True
    ignored: tuple[str, ...] = field(default=())
    published: str | None = None


def parse(file: Path, report: Report) -> DataYaml:
    """Read a data YAML. Nothing is downloaded or executed.

    Raises:
        DataError: no YAML mapping, too large, aliases that explode, or keys that do not fit (all problems at once).
    """
    document = read_mapping(file)
    problems: list[str] = []
    _unknown_keys(document, file.name, problems, report)
    names = class_names(document.get("names"), f"{file.name}: names", problems)
    if names is not None and document.get("nc", len(names)) != len(names):
        problems.append(
            explain(f"nc = {len(names)}, the length of names", f"nc = {document['nc']}", file.name, "drop nc")
        )
    base, novel = _classes(document, file.name, problems)
    splits = {
        split: _sources(document[split], f"{file.name}: {split}", problems) for split in SPLITS if document.get(split)
    }
    if not splits:
        problems.append(explain("at least one of train, val, test", "none", file.name, "add `train: <source>`"))
    exhaustive = document.get("exhaustive", "all")
    if exhaustive not in ("all", "source"):
        problems.append(explain("all or source", repr(exhaustive), f"{file.name}: exhaustive", "use one of them"))
    root = _root(document.get("path"), file, problems, report)
    if problems:
        raise DataError("\n".join(problems))
    return DataYaml(file, root, splits, base, novel, names, exhaustive == "all", published=document.get("split"))


def read_mapping(file: Path) -> dict[str, Any]:
    """A YAML file's top-level mapping: safe tags only, size and alias expansion capped, no key twice."""
    if file.stat().st_size > MAX_BYTES:
        raise DataError(
            explain(
                f"a YAML of at most {MAX_BYTES:,} bytes",
                f"{file.stat().st_size:,}",
                str(file),
                "list files in a folder or a json instead",
            )
        )
    try:
        loader = yaml.SafeLoader(file.read_bytes())
        try:
            node = loader.get_single_node()
            if node is not None:
                _weigh(node, {}, ())
            document = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except _Twice as error:
        raise DataError(explain("every key once", error.got, f"{file}:{error.line}", "remove one of them")) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            explain("a plain YAML file", " ".join(str(error).split()), str(file), "mend the file")
        ) from error
    if not isinstance(document, dict):
        raise DataError(explain("a mapping of keys", type(document).__name__, str(file), "see README, Data YAML"))
    return {str(key): value for key, value in document.items()}


def _weigh(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Nodes below with every alias written out; refuses explosions, circles and repeated keys."""
    if id(node) in above:
        raise ValueError(f"line {node.start_mark.line + 1}: an alias that contains itself")
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
            _refuse_repeated(node)
        known[id(node)] = 1 + sum(_weigh(child, known, (*above, id(node))) for child in children)
    if known[id(node)] > MAX_NODES:
        raise ValueError(f"line {node.start_mark.line + 1}: aliases that expand to more than {MAX_NODES:,} values")
    return known[id(node)]


class _Twice(ValueError):
    """A key that its mapping has already. got: in words; line: of the second, from 1."""

    def __init__(self, key: str, first: int, line: int) -> None:
        super().__init__(key)
        self.got, self.line = f"'{key}' twice, first in line {first}", line


def _refuse_repeated(mapping: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
        line = key.start_mark.line + 1
        if key.value in lines:
            raise _Twice(key.value, lines[key.value], line)
        lines[key.value] = line


def _unknown_keys(document: dict[str, Any], where: str, problems: list[str], report: Report) -> None:
    for key in document:
        if key == "download":
            report.add("key", where, "'download' (this program fetches nothing)")
        elif key not in KEYS:
            hint = did_you_mean(key, KEYS)
            if hint:
                problems.append(explain(f"keys {', '.join(KEYS)}", f"'{key}'", where, f"correct or remove it.{hint}"))
            else:
                report.add("key", where, f"'{key}'")


def _root(path: Any, file: Path, problems: list[str], report: Report) -> Path:
    home = file.parent.resolve()
    if path is None:
        return home
    if not isinstance(path, str) or not path:
        problems.append(explain("a folder", repr(path), f"{file.name}: path", "write a path or leave the key out"))
        return home
    root = (home / Path(path).expanduser()).resolve()
    if root.is_dir():
        return root
    if root.name == home.name:  # Ultralytics looks below a folder of its own
        report.add("path", file.name, f"path '{path}' read as the YAML's own folder")
        return home
    problems.append(
        explain("an existing folder", f"'{path}' ({root})", f"{file.name}: path", "correct it or leave it out")
    )
    return home


def class_names(value: Any, where: str, problems: list[str]) -> tuple[str, ...] | None:
    """A list of names, or YOLO's {0: name, 1: name}."""
    if value is None:
        return None
    if isinstance(value, dict):
        if sorted(map(str, value)) != sorted(map(str, range(len(value)))):
            problems.append(explain("keys 0, 1, 2 ...", f"{list(value)[:8]}", where, "number the classes without gaps"))
            return None
        value = [value[key] for key in sorted(value, key=int)]
    if not isinstance(value, list):
        problems.append(explain("a list of class names", repr(value)[:80], where, "write [a, b, c]"))
        return None
    for name in value:
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            problems.append(explain("class names", repr(name), where, "put the name in quotes"))
    for name, times in repeated(value).items():
        problems.append(explain("every name once", f"'{name}' {times}", where, "remove the copies"))
    return tuple(map(composed, value))


def _classes(document: dict, where: str, problems: list[str]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    base = class_names(document.get("base"), f"{where}: base", problems)
    novel = class_names(document.get("novel"), f"{where}: novel", problems) or ()
    if "split" in document:
        if base is not None or novel:
            problems.append(explain("either split or base and novel", "both", where, "remove one"))
        try:
            return named_split(document["split"])
        except DataError as error:
            problems.append(f"{where}: {error}")
    for name in sorted(set(base or ()) & set(novel)):
        problems.append(explain("a class in base or in novel", f"'{name}' in both", where, "remove one"))
    return base, novel


def _sources(value: Any, where: str, problems: list[str]) -> tuple[Source, ...]:
    sources = []
    for item in value if isinstance(value, list) else [value]:
        row = {"path": item} if isinstance(item, str) else item
        if (
            not isinstance(row, dict)
            or not set(row) <= {"path", "names", "images"}
            or not all(isinstance(row.get(key, ""), str) for key in ("path", "images"))
            or not row.get("path")
        ):
            problems.append(
                explain("a path, or {path, names, images}", repr(item)[:80], where, "write the source's path")
            )
            continue
        sources.append(Source(row["path"], where, class_names(row.get("names"), where, problems), row.get("images")))
    return tuple(sources)


def write(file: Path, document: Mapping[str, Any]) -> None:
    """Write a data YAML that parse() reads."""
    file.write_text(yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True), "utf-8")
