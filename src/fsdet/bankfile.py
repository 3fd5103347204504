# SPDX-License-Identifier: AGPL-3.0-or-later
"""The file of a bank: one safetensors file of its rows, the rest as text in its header, with the sha256 of the rows."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fsdet.errors import CheckpointError, explain
from fsdet.files import write_durably

FORMAT = "fsdet-bank-3"
BARE, SINGLE = (
    "fsdet-bank-1",
    "fsdet-bank-2",
)  # without thresholds and negatives; with thresholds of single boxes' scores
READ = (BARE, SINGLE, FORMAT)
log = logging.getLogger("fsdet")
UNIT = 1e-3  # by which the length of a unit row may differ from 1
Bank = TypeVar("Bank")


class Columns(Protocol):
    """What of a bank its file keeps; `PrototypeBank` says what each is."""

    names: tuple[str, ...]
    instances: tuple[Tensor, ...]
    model_sha256: str
    negatives: tuple[Tensor, ...]
    negative_shots: tuple[Tensor, ...]
    thresholds: tuple[float | None, ...]
    calibrated: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    marks: tuple[tuple[str, ...], ...]
    made_by: Mapping[str, str]
    views: int


def write(path: Path, bank: Columns) -> Path:
    """Write all at once; makes the folder."""
    tensors = {}
    for i, rows in enumerate(zip(bank.instances, bank.negatives, bank.negative_shots, strict=True)):
        tensors[f"instances.{i}"] = rows[0].detach().float().cpu().clone()
        tensors[f"negatives.{i}"] = rows[1].detach().float().cpu().clone()
        tensors[f"negative_shots.{i}"] = rows[2].detach().long().cpu().clone()
    header = {
        "format": FORMAT,
        "names": json.dumps(bank.names, ensure_ascii=False),
        "model_sha256": bank.model_sha256,
        "thresholds": json.dumps(bank.thresholds),
        "calibrated": json.dumps(bank.calibrated, ensure_ascii=False),
        "sources": json.dumps(bank.sources, ensure_ascii=False),
        "marks": json.dumps(bank.marks),
        "views": str(bank.views),
        "made_by": json.dumps(dict(bank.made_by), ensure_ascii=False),
        "sha256": _digest(tensors),
    }
    return write_durably(path, save(tensors, header))


def is_bank(path: Path) -> bool:
    """Whether a file is a bank, of whatever weights."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") in READ
    except (SafetensorError, OSError):
        return False


def read(path: Path, made: Callable[..., Bank]) -> Bank:
    """`made` of the Columns of a file and of its path; what `made` finds wrong is told as what is wrong with the file.

    Raises:
        CheckpointError: the file is missing, damaged or no bank, or a row of it is no unit row.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise CheckpointError(explain("a bank file", got, str(path), "check the path; fsdet register writes one"))
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return made(**_columns(file.metadata() or {}, tensors, path), path=path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(explain("a bank, as fsdet register writes it", "another or a damaged file", str(path),
                                      "check the path, or register the classes again")) from error  # fmt: skip


def _columns(header: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> dict[str, object]:
    """The Columns of a file's header and tensors, those that it has. Raises as `read`, and what a header that was not
    written here brings."""
    if header.get("format") not in READ:
        raise CheckpointError(explain(f"a bank ({' or '.join(READ)})", f"format {header.get('format')!r}", str(path),
                                      "use a file written by fsdet register"))  # fmt: skip
    names = tuple(_text(name) for name in json.loads(header["names"]))
    kinds = ("instances",) if header["format"] == BARE else ("instances", "negatives", "negative_shots")
    found: dict[str, object] = {kind: tuple(tensors[f"{kind}.{i}"] for i in range(len(names))) for kind in kinds}
    for kind in kinds[:2]:
        _refuse_other_rows(names, found[kind], path)
    if header.get("sha256", told := _digest(tensors)) != told:
        raise CheckpointError(explain("the rows that were written", "others: the file is damaged", str(path),
                                      "take a copy of it, or register the classes again"))  # fmt: skip
    if header["format"] == FORMAT:
        found |= {key: tuple(json.loads(header[key])) for key in ("thresholds", "calibrated")}
    elif header["format"] == SINGLE:  # a threshold of a single box is too high for one judged by its company
        log.warning("%s: of an earlier version, whose thresholds do not fit the scores of this one and are not used: "
                    "register its classes again to have some", path)  # fmt: skip
    found |= {key: tuple(tuple(map(_text, of)) for of in json.loads(header.get(key, "[]")))
              for key in ("sources", "marks")}  # fmt: skip
    made_by = dict(json.loads(header.get("made_by", "{}")))
    return {"names": names, "model_sha256": header["model_sha256"], "made_by": made_by,
            "views": int(header.get("views", 0)), **found}  # fmt: skip


def _text(value: object) -> str:
    """Raises TypeError unless it is text."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the tensors' bytes, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)} ".encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _refuse_other_rows(names: Sequence[str], rows: Sequence[Tensor], path: Path) -> None:
    """Raises CheckpointError with the first class and row that is not finite or not of length 1, TypeError for whole
    numbers."""
    for name, own in zip(names, rows, strict=True):
        if not own.is_floating_point():
            raise TypeError(f"expected rows of fractions, got {own.dtype}")
        for wanted, what, bad in (
            ("finite rows", "NaN or Inf", ~own.isfinite().flatten(1).all(1)),
            ("rows of length 1", "another", (own.flatten(1).norm(dim=1) - 1).abs() > UNIT),
        ):
            if bad.any():
                got = f"{what} in row {int(bad.nonzero()[0, 0]) + 1} of '{name}'"
                raise CheckpointError(explain(wanted, got, str(path),
                                              "register the class again, into another bank"))  # fmt: skip
