# SPDX-License-Identifier: AGPL-3.0-or-later
"""PrototypeBank: registered classes as all their instance embeddings, with a threshold each and what stands beside them
in their images, and the model's hash."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fsdet import bankfile
from fsdet.errors import CheckpointError, ShapeError, UserError, counted, did_you_mean, explain, some
from fsdet.files import refuse_foreign
from fsdet.registered import RegisteredClass, class_name, noted


@dataclass(frozen=True, eq=False)
class PrototypeBank:
    """names [N]; instances: N tensors [K_i, D] of unit rows (K may differ); model_sha256: whose they are.

    negatives: N tensors [m_i, D] of unit rows, of places in the support images that are not the object; negative_shots:
    N int64 tensors [m_i], the shot each is from. thresholds: N scores in [0, 1], None where none was proposed.
    calibrated: N texts, what the threshold was read from. sources: N tuples of K_i texts, the file each shot is from.
    marks: N tuples of K_i texts, equal for two shots of one image and box; "" where it is not known.
    views: views of each shot that were averaged, one or six; 0 where it is not known.
    made_by: plain facts of the model, told where a bank of another one is refused. path: the file it was read from,
    which its errors name, also after a change. What is not given is empty.
    Every change makes a new bank. Names are text that can be printed in a line, in Unicode's composed form.
    """

    names: tuple[str, ...]
    instances: tuple[Tensor, ...]
    model_sha256: str
    negatives: tuple[Tensor, ...] = ()
    negative_shots: tuple[Tensor, ...] = ()
    thresholds: tuple[float | None, ...] = ()
    calibrated: tuple[str, ...] = ()
    sources: tuple[tuple[str, ...], ...] = ()
    marks: tuple[tuple[str, ...], ...] = ()
    made_by: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    views: int = 0

    @property
    def where(self) -> str:
        """What errors call the bank: its file, if it has one."""
        return str(self.path or "bank")

    def __post_init__(self) -> None:
        self._check_classes()
        n = len(self.names)
        fill = {
            "negatives": tuple(t[:0] for t in self.instances),
            "negative_shots": (torch.zeros(0, dtype=torch.int64),) * n,
            "thresholds": (None,) * n,
            "calibrated": ("",) * n,
            "sources": tuple(("",) * len(t) for t in self.instances),
            "marks": tuple(("",) * len(t) for t in self.instances),
        }
        for name, empty in fill.items():
            if not getattr(self, name):
                object.__setattr__(self, name, empty)
        fits = all(len(getattr(self, name)) == n for name in fill) and all(
            rows.dim() == 2 and rows.shape[1] == own.shape[1] and shots.shape == rows.shape[:1]
            and (not len(shots) or (0 <= int(shots.min()) and int(shots.max()) < len(own)))
            and len(sources) == len(marks) == len(own)
            for own, rows, shots, sources, marks in zip(self.instances, self.negatives, self.negative_shots,
                                                        self.sources, self.marks, strict=False)
        )  # fmt: skip
        if not fits or any(t is not None and not 0 <= t <= 1 for t in self.thresholds):
            raise ShapeError(
                f"PrototypeBank expects [m, D] negatives, [m] shots, a threshold in [0, 1] or None, a text per name, "
                f"a source and a mark a shot, "
                f"got shapes {[list(t.shape) for t in self.negatives]}, thresholds {list(self.thresholds)}"
            )

    def _check_classes(self) -> None:
        dims = {t.shape[1] for t in self.instances if t.dim() == 2}
        if (
            len(self.names) != len(self.instances)
            or len(dims) > 1
            or any(t.dim() != 2 or not len(t) for t in self.instances)
        ):
            raise ShapeError(
                f"PrototypeBank expects one [K >= 1, D] tensor per name, got {len(self.names)} names and "
                f"shapes {[list(t.shape) for t in self.instances]}"
            )
        if len(set(self.names)) != len(self.names):
            raise ShapeError(f"PrototypeBank expects distinct names, got {list(self.names)}")

    def prototypes(self) -> Tensor:
        """[N, D] unit rows: the renormalised mean of each class's instances."""
        if not self.instances:
            return torch.zeros(0, 0)
        return torch.nn.functional.normalize(torch.stack([t.float().mean(0) for t in self.instances]), dim=-1)

    def add(self, name: str, instances: Tensor, sources: Iterable[str] = (),
            marks: Iterable[str] = ()) -> "PrototypeBank":  # fmt: skip
        """The bank with more shots of class `name`, which may be new; those that it has already are left out.

        Args:
            instances: [K, D] unit rows. sources: K texts, where the shots are from; empty for unknown. marks: K texts.
        Raises:
            UserError: a name that is none.
        """
        columns = {"sources": tuple(sources), "marks": tuple(marks)}
        given = {key: (texts,) for key, texts in columns.items() if texts}
        return self.merge(
            PrototypeBank((class_name(name),), (instances,), self.model_sha256, views=self.views, **given)
        )

    def known(self, name: str, instances: Tensor, sources: Sequence[str], marks: Sequence[str]) -> dict[int, int]:
        """{which of these shots: which shot of class `name` it is}, both from 0; see `RegisteredClass.known`."""
        return self.classes[name].known(instances, sources, marks) if name in self.names else {}

    def beside(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> "PrototypeBank":
        """The bank with {name: (more negatives [m, D], the shot [m] each is from)} after what it had."""
        classes = self.classes
        return self._of(classes | {name: classes[name].beside(*more) for name, more in found.items()})

    def merge(self, other: "PrototypeBank") -> "PrototypeBank":
        """Classes of both; a class of both has all shots, those that both hold once, and keeps the larger threshold, as
        its shots have not been calibrated together. Raises CheckpointError when `other` is of other weights."""
        other.check_model(self.model_sha256, "the other bank", self.made_by)
        if self.names and other.names and self.views:
            other.check_views(self.views)
        mine, theirs = self.classes, other.classes
        both = {name: mine[name].joined(theirs[name]) for name in mine.keys() & theirs.keys()}
        views = self.views if self.views == other.views or not theirs else 0 if mine else other.views
        return replace(self._of(mine | theirs | both), views=views)

    def shared(self, other: "PrototypeBank") -> dict[str, dict[int, int]]:
        """`known` of each class of the other bank that has a shot which is here."""
        columns = zip(other.names, other.instances, other.sources, other.marks, strict=True)
        found = {name: self.known(name, *given) for name, *given in columns}
        return {name: shots for name, shots in found.items() if shots}

    def of_another(self, name: str, shots: RegisteredClass) -> list[str]:
        """Those shots of class `name`, each in words, that another class has too: one object is not of two classes."""
        return [f"{shots.sources[k] or 'a shot'} is {own.sources[j] or 'a shot'} of '{other}'"
                for other, own in self.classes.items() if other != name
                for k, j in own.known(shots.instances, shots.sources, shots.marks).items()]  # fmt: skip

    def remove(self, name: str) -> "PrototypeBank":
        """The bank without class `name`. Raises UserError when there is none."""
        name = self.known_as(name)
        return self._of({n: own for n, own in self.classes.items() if n != name})

    def rename(self, name: str, new: str) -> "PrototypeBank":
        """Class `name` as `new`, in its place. Raises UserError when there is none, or `new` is taken or no name."""
        name, new = self.known_as(name), class_name(new)
        if new in self.names:
            raise UserError(
                explain("a name that no class has", repr(new), self.where, "merge two banks to join classes")
            )
        return replace(self, names=tuple(new if n == name else n for n in self.names))

    def drop(self, name: str, shots: Sequence[int]) -> "PrototypeBank":
        """The bank without some shots (from 0) of class `name`, and without what is beside them in their images.

        The threshold stays as it was and says so: it was read from all shots.
        Raises:
            UserError: no such class or shot, or none would be left.
        """
        name = self.known_as(name)
        own, gone = self.classes[name], sorted(set(shots))
        count = len(own)
        if wrong := [k + 1 for k in gone if not 0 <= k < count]:
            known = f"shots 1 to {count}" if count > 1 else "shot 1, the only one,"
            raise UserError(explain(f"{known} of '{name}'", ", ".join(map(str, wrong)), self.where,
                                    "name shots of that class"))  # fmt: skip
        if len(gone) == count:
            got = f"all {count}" if count > 1 else "its only one"
            raise UserError(explain(f"a shot of '{name}' that stays", got, self.where, "remove the class"))
        left = own.kept([k for k in range(count) if k not in gone])
        told = noted(own.calibrated, "before shots were dropped")
        return self._of(self.classes | {name: left.judged(own.threshold, told)})

    def known_as(self, name: str) -> str:
        """`name` as the bank writes it. Raises UserError when there is no such class."""
        known = name if name in self.names else class_name(name)
        if known not in self.names:
            raise UserError(explain(f"one of {', '.join(self.names) or 'no class at all'}", repr(name), self.where,
                                    f"name a registered class.{did_you_mean(known, self.names)}"))  # fmt: skip
        return known

    def proposed(self, thresholds: Mapping[str, tuple[float, str]]) -> "PrototypeBank":
        """The bank with {name: (threshold, what it was read from)} in place of what it had for those classes."""
        old = zip(self.names, self.thresholds, self.calibrated, strict=True)
        new = [thresholds.get(name, (threshold, how)) for name, threshold, how in old]
        return replace(self, thresholds=tuple(t for t, _ in new), calibrated=tuple(how for _, how in new))

    def describe(self) -> list[str]:
        """A line a class: instances, threshold and what that was read from."""
        lines = []
        for name, own in self.classes.items():
            kept = f"{counted(len(own), 'instance')}, {len(own.negatives)} of what is beside them"
            lines.append(f"{name}: {kept}; threshold {'none' if own.threshold is None else f'{own.threshold:.3f}'}"
                         + (f" ({own.calibrated})" if own.calibrated else ""))  # fmt: skip
        return lines

    @property
    def classes(self) -> dict[str, RegisteredClass]:
        """{name: the class}, in the bank's order."""
        columns = (self.instances, self.negatives, self.negative_shots, self.thresholds, self.calibrated, self.sources,
                   self.marks)  # fmt: skip
        return {name: RegisteredClass(*row) for name, *row in zip(self.names, *columns, strict=True)}

    def _of(self, classes: Mapping[str, RegisteredClass]) -> "PrototypeBank":
        def column(name: str) -> tuple:
            return tuple(getattr(own, name) for own in classes.values())

        return PrototypeBank(
            tuple(classes), column("instances"), self.model_sha256, column("negatives"), column("negative_shots"),
            column("threshold"), column("calibrated"), column("sources"), column("marks"), self.made_by, self.path,
            self.views,
        )  # fmt: skip

    def check_model(self, sha256: str, where: str, facts: Mapping[str, str] | None = None) -> None:
        """Raises CheckpointError, with the `facts` that differ, unless the weights of this hash made the bank.

        where: what a bank is called that was read from no file.
        """
        if sha256 == self.model_sha256:
            return
        both = {key: (value, self.made_by[key]) for key, value in (facts or {}).items() if key in self.made_by}
        differ = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
        mine, theirs = ("".join(f", {key} {pair[i]}" for key, pair in differ.items()) for i in (0, 1))
        raise CheckpointError(explain(f"a bank made by these weights ({sha256[:12]}{mine})",
                                      f"one of other weights ({self.model_sha256[:12]}{theirs})",
                                      str(self.path or where),
                                      "register the classes again with fsdet register"))  # fmt: skip

    def check_views(self, views: int) -> None:
        """Raises UserError unless so many views of each shot are in its rows; they and others are no one class."""
        if self.views not in (0, views):
            raise UserError(explain(f"shots of {counted(views, 'view')} each", f"a bank of {self.views}", self.where,
                                    "register all of them with --one-view, or none"))  # fmt: skip

    def save(self, path: Path) -> Path:
        """Write all at once; makes the folder."""
        return bankfile.write(path, self)

    @staticmethod
    def load(path: Path) -> "PrototypeBank":
        """Raises CheckpointError when the file is missing, damaged or no bank, or a row of it is no unit row."""
        return bankfile.read(path, PrototypeBank)


def refuse_bank(path: Path, replacing: bool, otherwise: str = "") -> str | None:
    """Let a bank be written to `path`: nothing is there, or a bank that may be replaced, which is returned in words.

    Args:
        otherwise: what else can be done about a bank that is there.
    Raises:
        UserError: another file, a folder, or a bank although not `replacing`.
    """
    refuse_foreign(path, "a bank", bankfile.is_bank)
    if not path.exists():
        return None
    held = _held(path)
    if not replacing:
        raise UserError(explain("no bank yet", held, str(path), f"name another --out, {otherwise}or give --replace, "
                                "which loses what is there"))  # fmt: skip
    return held


def _held(path: Path) -> str:
    """A bank file in words: classes, shots, and those of the first classes."""
    try:
        bank = PrototypeBank.load(path)
    except CheckpointError:
        return "a bank that cannot be read"
    shots = [len(rows) for rows in bank.instances]
    each = [f"{name} {count}" for name, count in zip(bank.names, shots, strict=True)]
    told = f" ({some(each)})" if each else ""
    return f"a bank of {counted(len(each), 'class', 'es')}, {counted(sum(shots), 'shot')}{told}"
