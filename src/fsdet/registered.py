# SPDX-License-Identifier: AGPL-3.0-or-later
"""One registered class: the embeddings of its shots, and all that is known of each."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fsdet.errors import UserError, explain
from fsdet.names import composed

EQUAL, ALIKE = 5e-7, 1e-3  # between unit rows of one shot: read in other company; of a file of that name, anywhere


@dataclass(frozen=True, eq=False)
class RegisteredClass:
    """A class of a bank: K shots, what is beside them in their images, and a threshold.

    instances: [K, D] unit rows. negatives: [m, D] unit rows, of places in the support images that are not the object;
    negative_shots: [m] int64, the shot each is from. threshold: score in [0, 1], None where none was proposed;
    calibrated: what it was read from. sources: K texts, the file each shot is from; marks: K texts, equal for two shots
    of one image and box. "" where a text is not known.
    """

    instances: Tensor
    negatives: Tensor
    negative_shots: Tensor
    threshold: float | None
    calibrated: str
    sources: tuple[str, ...]
    marks: tuple[str, ...]

    def __len__(self) -> int:
        """K."""
        return len(self.instances)

    def beside(self, negatives: Tensor, shots: Tensor) -> "RegisteredClass":
        """With [m, D] more negatives, and the shot [m] each is from."""
        return replace(self, negatives=torch.cat((self.negatives, negatives)),
                       negative_shots=torch.cat((self.negative_shots, shots)))  # fmt: skip

    def kept(self, shots: Sequence[int]) -> "RegisteredClass":
        """With only these shots, in this order, and what is beside them in their images."""
        place = torch.full((len(self),), -1)
        place[list(shots)] = torch.arange(len(shots))
        stays = place[self.negative_shots] >= 0
        return replace(self, instances=self.instances[list(shots)], negatives=self.negatives[stays],
                       negative_shots=place[self.negative_shots[stays]], sources=tuple(self.sources[k] for k in shots),
                       marks=tuple(self.marks[k] for k in shots))  # fmt: skip

    def joined(self, other: "RegisteredClass") -> "RegisteredClass":
        """The shots of both, those of `other` that are here already (`known`) once.

        The larger threshold is kept, as the shots of the two have not been calibrated together.
        """
        held = self.known(other.instances, other.sources, other.marks)
        new = other.kept([k for k in range(len(other)) if k not in held])
        if not len(new):
            return self if self.threshold is not None else self.judged(other.threshold, other.calibrated)
        both = replace(self, instances=torch.cat((self.instances, new.instances)), sources=self.sources + new.sources,
                       marks=self.marks + new.marks)  # fmt: skip
        return both.beside(new.negatives, new.negative_shots + len(self)).judged(*_larger(self, other))

    def judged(self, threshold: float | None, calibrated: str) -> "RegisteredClass":
        """With this threshold, and what it was read from."""
        return replace(self, threshold=threshold, calibrated=calibrated)

    def known(self, instances: Tensor, sources: Sequence[str], marks: Sequence[str]) -> dict[int, int]:
        """{which of these shots: which shot of this class it is}, both from 0.

        Marks tell where both shots have one. Else their rows are equal, or nearly so and of files of one name.
        """
        rows, unmarked = self.instances.double(), [k for k, mark in enumerate(self.marks) if not mark]
        found = {}
        for k, (row, mark) in enumerate(zip(instances.double().to(rows.device), marks, strict=True)):
            file = sources[k]
            if mark and mark in self.marks:
                found[k] = self.marks.index(mark)
            elif others := unmarked if mark else range(len(self)):
                far = (rows[list(others)] - row).norm(dim=1).tolist()
                near = [(d, j) for d, j in zip(far, others, strict=True)
                        if d <= (ALIKE if file and file == self.sources[j] else EQUAL)]  # fmt: skip
                if near:
                    found[k] = min(near)[1]
        return found


def _larger(one: RegisteredClass, two: RegisteredClass) -> tuple[float | None, str]:
    """The larger threshold of two registrations of a class, and where it is from."""
    given = [r for r in (one, two) if r.threshold is not None]
    if len(given) == 2:
        return max(r.threshold for r in given), "larger of two registrations"
    return (given[0].threshold, noted(given[0].calibrated, "without shots that came later")) if given else (None, "")


def noted(calibrated: str, note: str) -> str:
    """What a threshold was read from, with a note on what has changed since, once."""
    return f"{calibrated}; {note}" if calibrated and note not in calibrated else calibrated


def class_name(text: str) -> str:
    """`text` as a class name: spaces around it off, Unicode composed, so that two spellings of an umlaut are one name.

    Raises:
        UserError: it is no text, nothing is left, or it holds a character that is none (a line break).
    """
    if not isinstance(text, str):
        got = f"{text!r}, of type {type(text).__name__}"
        raise UserError(explain("a text", got, "class name", "give the name as a text, such as 'mug'"))
    name = composed(text).strip()
    if not name or any(unicodedata.category(c).startswith("C") for c in name):
        raise UserError(explain("a class name of characters that can be printed", repr(text), "class name",
                                "name it otherwise"))  # fmt: skip
    return name
