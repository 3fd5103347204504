# SPDX-License-Identifier: AGPL-3.0-or-later
"""YAML as plain values with line numbers; nothing in a file can run, repeat a key unseen, or blow up.

PyYAML's safe loader takes duplicate keys silently, expands alias bombs and forgets where a value stood, so this
reader walks the node graph itself. Text such as `1e-4` stays text (YAML 1.1): the schema decides what it means.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fsdet.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_NODES = 20_000  # after aliases are expanded
MAX_DEPTH = 40
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("str", "int", "float", "bool", "null")}
_AS_TEXT = {_TAG + name for name in ("timestamp", "value")}  # a date is text here, and so is a lone `=`

Path_ = tuple[Hashable, ...]


@dataclass
class Document:
    """One YAML text: its value, the line of every key or item by path, and what was wrong with it."""

    source: str
    value: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def where(self, path: Path_ = ()) -> str:
        """`file:line` of the deepest known part of `path`."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.source}:{self.lines.get(path, 1)}"


def read(path: str | Path) -> Document:
    """Parse a file. Raises ConfigError when it is missing, no text, or larger than MAX_BYTES."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: expected a YAML file of at most {MAX_BYTES} bytes, this one is larger")
    try:
        return parse(data.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected a YAML text in UTF-8, got binary or another encoding") from None


def parse(text: str, source: str) -> Document:
    """Parse a text; `source` names it in problems. A syntax error becomes a problem, with value None."""
    document = Document(source)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            document.value = _Walk(document).value(node, (), 0)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        document.problems.append(f"{source}:{line}: not valid YAML: {error.problem}")
    except yaml.YAMLError as error:
        document.problems.append(f"{source}:1: not valid YAML: {str(error).splitlines()[0]}")
    except (RecursionError, _TooLarge):
        document.value = None
        document.problems.append(
            f"{source}:1: expected at most {MAX_NODES} values nested at most {MAX_DEPTH} deep, got more"
        )
    return document


def dump(value: Any) -> str:
    """Plain values as block YAML in the given key order; `parse` reads it back."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)


class _TooLarge(Exception):
    """An alias bomb, a cycle, or nesting without end."""


class _Walk:
    """Turns nodes into values and notes lines and problems in the document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0
        self.constructor = yaml.constructor.SafeConstructor()

    def problem(self, node: yaml.Node, text: str) -> None:
        self.document.problems.append(f"{self.document.source}:{node.start_mark.line + 1}: {text}")

    def value(self, node: yaml.Node, path: Path_, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise _TooLarge
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.item(child, (*path, i), depth) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.problem(node, f"tag '{node.tag.replace(_TAG, '!!')}' is not allowed; write plain values")
        return None

    def item(self, node: yaml.Node, path: Path_, depth: int) -> Any:
        self.document.lines[path] = node.start_mark.line + 1
        return self.value(node, path, depth + 1)

    def scalar(self, node: yaml.ScalarNode) -> Any:
        sexagesimal = node.tag in (_TAG + "int", _TAG + "float") and ":" in node.value
        if node.tag in _AS_TEXT or sexagesimal:  # 12:30 is no 750
            return node.value
        if node.tag not in _PLAIN:
            self.problem(node, f"tag '{node.tag.replace(_TAG, '!!')}' is not allowed; write plain values")
            return None
        try:
            return self.constructor.construct_object(node)
        except (ValueError, yaml.YAMLError):
            self.problem(node, f"'{node.value[:40]}' is no {node.tag.removeprefix(_TAG)}")
            return None

    def mapping(self, node: yaml.MappingNode, path: Path_, depth: int) -> dict[Hashable, Any]:
        out: dict[Hashable, Any] = {}
        for key_node, child in node.value:
            if key_node.tag == _TAG + "merge":
                self.problem(key_node, "'<<' is not supported; use 'extends: other.yaml'")
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key_node, "a key is a single word or number")
                continue
            key = self.scalar(key_node)
            at = (*path, key)
            if key in out:
                self.problem(key_node, f"key '{key}' is given twice, first in line {self.document.lines[at]}")
                continue
            self.document.lines[at] = key_node.start_mark.line + 1
            out[key] = self.value(child, at, depth + 1)
        return out
