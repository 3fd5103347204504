# SPDX-License-Identifier: AGPL-3.0-or-later
"""PrototypeBank: registered classes as all their instance embeddings, in one safetensors file with the model's hash."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fsdet.errors import CheckpointError, ShapeError, UserError, did_you_mean, explain
from fsdet.files import write_durably

FORMAT = "fsdet-bank-1"


@dataclass(frozen=True, eq=False)
class PrototypeBank:
    """names [N]; instances: N tensors [K_i, D] of unit rows (K may differ); model_sha256: whose they are."""

    names: tuple[str, ...]
    instances: tuple[Tensor, ...]
    model_sha256: str

    def __post_init__(self) -> None:
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

    def merge(self, other: "PrototypeBank") -> "PrototypeBank":
        """Classes of both, all instances kept. Raises CheckpointError when `other` is of other weights."""
        other.check_model(self.model_sha256, "the other bank")
        merged = dict(zip(self.names, self.instances, strict=True))
        for name, rows in zip(other.names, other.instances, strict=True):
            merged[name] = torch.cat((merged[name], rows)) if name in merged else rows
        return replace(self, names=tuple(merged), instances=tuple(merged.values()))

    def remove(self, name: str) -> "PrototypeBank":
        """The bank without class `name`. Raises UserError when there is none."""
        if name not in self.names:
            raise UserError(explain(f"one of {', '.join(self.names) or 'no class at all'}", repr(name), "bank",
                                    f"name a registered class.{did_you_mean(name, self.names)}"))  # fmt: skip
        kept = [(n, t) for n, t in zip(self.names, self.instances, strict=True) if n != name]
        return replace(self, names=tuple(n for n, _ in kept), instances=tuple(t for _, t in kept))

    def check_model(self, sha256: str, where: str) -> None:
        """Raises CheckpointError unless the bank was made by the weights with this hash."""
        if sha256 != self.model_sha256:
            raise CheckpointError(explain(f"a bank made by these weights ({sha256[:12]})",
                                          f"one of other weights ({self.model_sha256[:12]})", where,
                                          "register the classes again with fsdet register"))  # fmt: skip

    def save(self, path: Path) -> Path:
        """Write all at once; makes the folder."""
        tensors = {f"instances.{i}": t.detach().float().cpu().clone() for i, t in enumerate(self.instances)}
        header = {
            "format": FORMAT,
            "names": json.dumps(self.names, ensure_ascii=False),
            "model_sha256": self.model_sha256,
        }
        return write_durably(path, save(tensors, header))

    @staticmethod
    def is_bank(path: Path) -> bool:
        """Whether a file is a bank, of whatever weights."""
        try:
            with safe_open(str(path), framework="pt") as file:
                return (file.metadata() or {}).get("format") == FORMAT
        except (SafetensorError, OSError):
            return False

    @staticmethod
    def load(path: Path) -> "PrototypeBank":
        """Raises CheckpointError when the file is missing, damaged or no bank."""
        if not path.is_file():
            got = "a folder" if path.is_dir() else "nothing there"
            raise CheckpointError(explain("a bank file", got, str(path), "check the path; fsdet register writes one"))
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise CheckpointError(explain(f"a bank ({FORMAT})", f"format {header.get('format')!r}", str(path),
                                                  "use a file written by fsdet register"))  # fmt: skip
                names = tuple(json.loads(header["names"]))
                instances = tuple(file.get_tensor(f"instances.{i}") for i in range(len(names)))
                return PrototypeBank(names, instances, header["model_sha256"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(explain("a bank, as fsdet register writes it", "another or a damaged file", str(path),
                                          "check the path, or register the classes again")) from error  # fmt: skip
