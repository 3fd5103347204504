# SPDX-License-Identifier: AGPL-3.0-or-later
"""How a file becomes a configuration: strict YAML, `extends:`, `key=value` overrides, every problem at once.

The keys themselves are in `fsdet.schema`; they are offered from here too, so that users import one module.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from fsdet import yaml_strict
from fsdet.errors import ConfigError, did_you_mean
from fsdet.schema import (
    LOSSES,
    Augment,
    Classifier,
    Config,
    Data,
    EpisodeCfg,
    Eval,
    Guard,
    Log,
    Loss,
    LossWeights,
    MaskRcnn,
    Model,
    Optim,
    Run,
    Save,
    Section,
    Stage,
    Wandb,
)

# fmt: off
__all__ = [
    "LOSSES", "Augment", "Classifier", "Config", "Data", "EpisodeCfg", "Eval", "Guard", "Log", "Loss", "LossWeights",
    "MaskRcnn", "Model", "Optim", "Run", "Save", "Section", "Stage", "Wandb", "dump", "keys", "load",
]
# fmt: on

Key = tuple[str, ...]
Where = Callable[[Key], str]  # names the place in a file, or the override, that a key came from


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a file (None: the defaults) after `overrides` such as `optim.lr=1e-3`.

    Later layers win: `extends:` first, then the file, then the overrides. Sections merge key by key, a mapping that is
    a value (`clip_norm: {1: 10}`) is replaced whole. A layer that sets only one of optim.epochs and optim.steps unsets
    the other.

    Raises:
        ConfigError: with every problem, each as `file:line: key 'a.b': ...`.
    """
    draft = _Draft()
    if path is not None:
        draft.add_file(Path(path))
    draft.add_overrides(overrides)
    config = draft.validated()
    if draft.problems:
        raise ConfigError(_listed(draft.problems))
    return config


def dump(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back to an equal one."""
    return yaml_strict.dump(_plain(config.model_dump()))


def keys() -> list[str]:
    """Every settable key, dotted, in schema order."""
    return [".".join(key) for key in _leaves(Config, ())]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _listed(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems:", *problems])


def _leaves(section: type[Section], at: Key) -> Iterator[Key]:
    for name in section.model_fields:
        inner = _section(section, name)
        yield from _leaves(inner, (*at, name)) if inner else [(*at, name)]


def _section(section: type[Section], name: str) -> type[Section] | None:
    kind = section.model_fields[name].annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types among an annotation's alternatives: `str | None` gives str and NoneType."""
    inner = [arg for part in get_args(annotation) for arg in _kinds(part)]
    origin = get_origin(annotation)
    if origin in (dict, list, tuple):
        yield origin
    elif inner:
        yield from inner
    else:
        yield annotation


class _Draft:
    """Values gathered layer by layer, where each was said, and what is wrong with them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origin: dict[Key, str] = {}
        self.problems: list[str] = []

    def add_file(self, path: Path, chain: tuple[Path, ...] = (), asked_at: str = "") -> None:
        """Merge a file after the one that it extends."""
        real = path.resolve()
        if real in chain:
            self.problems.append(f"{asked_at}: key 'extends': a circle, '{path}' extends itself through this file")
            return
        if not path.is_file():
            near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
            cure = near or " The shipped ones are in configs/."
            self.problems.append(f"{asked_at or path}: expected a config file, got no file at '{path}'.{cure}")
            return
        document = yaml_strict.read(path)
        self.problems += document.problems
        if document.value is None:
            return
        if not isinstance(document.value, dict):
            self.problems.append(f"{document.where()}: expected keys such as 'optim:', got {_shown(document.value)}")
            return
        values = dict(document.value)
        if any(key in values for key in DATA_KEYS) and not any(key in values for key in Config.model_fields):
            found, cure = ", ".join(values), f"data.path={path} beside a config, such as configs/demo/stage_1.yaml"
            self.problems.append(f"{document.where()}: expected a config file, got a data YAML ({found}). Next: {cure}")
            return
        if "extends" in values:
            parent, where = values.pop("extends"), document.where(("extends",))
            if isinstance(parent, str):
                self.add_file(path.parent / parent, (*chain, real), where)
            else:
                self.problems.append(f"{where}: key 'extends': expected one file name, got {_shown(parent)}")
        self.add_layer(values, lambda at: document.where(at))

    def add_overrides(self, overrides: Sequence[str]) -> None:
        given: dict[str, Any] = {}
        for text in overrides:
            name, equals, value = text.partition("=")
            where, key = f"override '{text}'", tuple(name.strip().split("."))
            if not equals or not all(key):
                self.problems.append(f"{where}: expected key=value such as optim.lr=1e-3")
            elif (layer := self._nested(key, value, where)) is not None:
                self._merge(self.values, layer, (), Config, lambda _, where=where: where)
                given |= _optim(layer)
        self._settle_length(given)

    def _nested(self, key: Key, text: str, where: str) -> dict[str, Any] | None:
        """One override as a layer; a key below a mapping value (optim.lr_scale.head) edits the mapping. None: wrong."""
        section, depth = Config, 0
        while depth < len(key) - 1 and key[depth] in section.model_fields and _section(section, key[depth]):
            section, depth = _section(section, key[depth]), depth + 1
        if key[depth] not in section.model_fields:
            self._unknown(key[: depth + 1] if depth + 1 < len(key) else key, section, where)
            return None
        kinds = set(_kinds(section.model_fields[key[depth]].annotation))
        before = len(self.problems)
        value = self._parsed(text, kinds, where)
        if len(self.problems) > before:
            return None
        rest = key[depth + 1 :]
        if len(rest) == 1 and dict in kinds:
            old = self._current(key[: depth + 1], section)
            entry = int(rest[0]) if rest[0].isdigit() else rest[0]
            value = {**(old if isinstance(old, dict) else {}), entry: value}
        elif rest:
            self.problems.append(f"{where}: key '{'.'.join(key)}': '{'.'.join(key[: depth + 1])}' has no keys below it")
            return None
        for name in reversed(key[: depth + 1]):
            value = {name: value}
        return value

    def _current(self, key: Key, section: type[Section]) -> Any:
        values: Any = self.values
        for name in key:
            if name not in values:
                return section.model_fields[key[-1]].default
            values = values[name]
        return values

    def _parsed(self, text: str, kinds: set[Any], where: str) -> Any:
        if not text.strip() and type(None) not in kinds and str in kinds:
            return ""
        document = yaml_strict.parse(text, where)
        if str in kinds and not kinds & {dict, list, tuple} and not isinstance(document.value, str | None):
            return text.strip()  # a name such as 123 or `a: b` is meant as written
        if document.problems and str in kinds:
            return text.strip()
        self.problems += [problem.replace(":1:", ":", 1) for problem in document.problems]
        return document.value

    def add_layer(self, values: dict[str, Any], where: Where) -> None:
        """Merge one file's values over what is there."""
        self._merge(self.values, values, (), Config, where)
        self._settle_length(_optim(values))

    def _settle_length(self, given: Mapping[str, Any]) -> None:
        """A layer that says optim.steps or optim.epochs takes the other one back."""
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if given.get(one) is not None and other not in given:
                self.values["optim"][other] = None

    def _merge(self, into: dict[str, Any], new: dict[Any, Any], at: Key, section: type[Section], where: Where) -> None:
        for name, value in new.items():
            key = (*at, str(name))
            if name not in section.model_fields:
                self._unknown(key, section, where(key))
                continue
            inner = _section(section, name)
            self.origin[key] = where(key)
            if inner is None:
                into[name] = value
                if _has_switch(value) and bool not in _kinds(section.model_fields[name].annotation):
                    # YAML reads yes, no, on, off as booleans, which pydantic would take for 1 and 0
                    self._problem(key, f"expected no true or false, got {_shown(value)}")
            elif isinstance(value, dict):
                self._merge(into.setdefault(name, {}), value, key, inner, where)
            elif value is not None:  # `optim:` with every key commented out is fine
                self._problem(key, f"expected keys such as '{next(iter(inner.model_fields))}:', got {_shown(value)}")

    def _unknown(self, key: Key, section: type[Section], where: str) -> None:
        near = did_you_mean(key[-1], section.model_fields)
        if not near:
            elsewhere = [name for name in keys() if name.rpartition(".")[2] == key[-1]]
            near = did_you_mean(elsewhere[0], elsewhere) if elsewhere else did_you_mean(".".join(key), keys())
        self.problems.append(f"{where}: key '{'.'.join(key)}': unknown key.{near}")

    def _problem(self, key: Key, text: str) -> None:
        at = key
        while at and at not in self.origin:
            at = at[:-1]
        self.problems.append(f"{self.origin.get(at, 'config')}: key '{'.'.join(at or key)}': {text}")

    def validated(self) -> Config:
        """The Config, or the defaults with `problems` filled."""
        try:
            config = Config.model_validate(self.values)
        except ValidationError as error:
            self._contradict_elsewhere(self._explain(error))
            return Config()
        for key, text in _contradictions(config):
            self._problem(key, text)
        return config

    def _contradict_elsewhere(self, faulty: Collection[Key]) -> None:
        """Contradictions that do not hang on what is faulty: of other sections, and the sizes of images."""
        if () in faulty:  # the whole of it
            return
        values = copy.deepcopy(self.values)
        for *way, last in faulty:
            inner: Any = values
            for part in way:
                inner = inner.get(part, {}) if isinstance(inner, dict) else {}
            if isinstance(inner, dict):
                inner.pop(last, None)
        try:
            config = Config.model_validate(values)
        except ValidationError:
            return
        sections = {key[0] for key in faulty}
        decisive = sections & {"task", "stage", "model"}  # what other sections are judged by
        for key, text in _contradictions(config):
            if key not in faulty and (key in CURES or not (decisive or key[0] in sections)):
                self._problem(key, text)

    def _explain(self, error: ValidationError) -> Collection[Key]:
        """Tell what is wrong; returns the keys."""
        said: dict[Key, list[str]] = {}
        got: dict[Key, Any] = {}
        for item in error.errors(include_url=False, include_context=False):
            key = tuple(str(part) for part in item["loc"])
            while key and key not in self.origin:
                key = key[:-1]
            wanted = item["msg"].removeprefix("Input should be ").replace("String should match pattern", "text like")
            said.setdefault(key, []).append(WANTED.get(item["type"], wanted))
            got.setdefault(key, item["input"])
        for key, texts in said.items():
            value = got[key]
            near = ""
            if isinstance(value, str):
                near = did_you_mean(value, [word for text in texts for word in text.split("'")[1::2]])
            near = near or CURES.get(key, "")
            self._problem(key, f"expected {' or '.join(dict.fromkeys(texts))}, got {_shown(value)}.{near}")
        return said


DATA_KEYS = ("train", "val", "test", "base", "novel", "names", "nc")  # of a data YAML, none of them one of ours
# what pydantic calls valid booleans and inputs it is unable to parse
WANTED = {
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "keys and values"),
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "missing": "more values",
    "too_long": "fewer values",
}

_SCALED = " Next: choose a multiple of 32 px; images of any size are scaled to it, {} is the default"
CURES = {("data", name): _SCALED.format(getattr(Data(), name)) for name in ("image_size", "support_size")}


def _optim(layer: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer says under optim."""
    given = layer.get("optim")
    return given if isinstance(given, dict) else {}


def _has_switch(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(_has_switch, value)) if isinstance(value, list) else isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


FEWSHOT_ONLY = ("model", "loss", "episode.ways", "episode.shots", "episode.negatives", "episode.disguise", "stage.name",
                "stage.mode", "stage.recipe", "stage.forget", "data.shots",
                "data.base_images")  # fmt: skip


def _foreign(config: Config) -> Iterator[tuple[Key, str]]:
    """Keys that another task than the chosen one reads."""
    own = {"classifier": ("classifier",), "maskrcnn": ("maskrcnn",), "fewshot": FEWSHOT_ONLY}
    for task, names in own.items():
        for name in names if task != config.task else ():
            key = tuple(name.split("."))
            value, default = config, Config()
            for part in key:
                value, default = getattr(value, part), getattr(default, part)
            if value != default:
                yield key, f"expected nothing, as task '{config.task}' does not read it; it belongs to task '{task}'"


def _contradictions(config: Config) -> Iterator[tuple[Key, str]]:
    """Keys that are fine alone and not together."""
    optim, shots = config.optim, config.episode.shots
    yield from _foreign(config)
    if optim.epochs is None and optim.steps is None:
        yield ("optim", "epochs"), "expected a number here or in optim.steps, got neither"
    if optim.min_lr > optim.lr:
        yield ("optim", "min_lr"), f"expected at most optim.lr = {optim.lr:g}, got {optim.min_lr:g}"
    if isinstance(shots, tuple) and shots[0] > shots[1]:
        yield ("episode", "shots"), f"expected [least, most], got {list(shots)}"
    for name in ("image_size", "support_size"):
        size = getattr(config.data, name)
        if size % 32:
            yield (
                ("data", name),
                f"expected a multiple of 32 px, got {size}. Next: {round(size / 32) * 32} is the nearest",
            )
    if config.model.support_encoder == "vit" and not config.model.vit.weights:
        yield ("model", "vit", "weights"), "expected model.vit.weights, a local file of the ViT's weights, got none"
    if config.model.support_encoder != "vit" and config.model.vit != type(config.model.vit)():
        yield ("model", "vit"), "expected support_encoder: vit in section model, which alone reads it, got detector"
    if config.stage.name == "episodic" and config.episode.ways == 0:
        yield ("episode", "ways"), "expected at least 1 in stage 'episodic', got 0"
