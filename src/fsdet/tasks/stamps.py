# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a results.json says of where its figures are from: the data looked at, the shots used; names, no places."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdet.data.shots import picks_sha256
from fsdet.data.sources import DataSet
from fsdet.tasks.registration import Draws
from fsdet.types import ImageRecord


def data_stamp(data: DataSet, records: Sequence[ImageRecord], counted: Sequence[int]) -> dict:
    """{"name", "sha256" of images and boxes, "classes_sha256", "base", "novel", "novel_counted"}; the rest are numbers.

    The hash names images from the data root, so that a data set is itself wherever it lies.
    counted: the novel classes with ground truth.
    """
    lines = sorted(json.dumps(_plain(record, data.root)) for record in records)
    classes = json.dumps([data.base, data.novel])
    return {
        "name": "/".join(Path(data.name).resolve().parts[-2:]),
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "classes_sha256": hashlib.sha256(classes.encode()).hexdigest(),
        "base": len(data.base),
        "novel": len(data.novel),
        "novel_counted": len(counted),
    }


def _plain(record: ImageRecord, root: Path) -> list:
    inside = record.path.is_relative_to(root)
    image = record.path.relative_to(root).as_posix() if inside else record.path.name
    known = None if record.exhaustive is None else sorted(record.exhaustive)
    rows = sorted(zip(record.labels.tolist(), record.boxes.round(2).tolist(), record.crowd.tolist(), strict=True))
    return [image, list(record.size), rows, known]


def draws_stamp(data: DataSet, draws: Draws) -> dict[str, dict]:
    """{K: {"unit", "sha256": {seed: of the shot list}}}."""
    out: dict[str, dict] = {}
    for (k, seed), picks in sorted(draws.picks.items()):
        row = out.setdefault(str(k), {"unit": draws.unit, "sha256": {}})
        row["sha256"][str(seed)] = picks_sha256(data, draws.split, picks)
    return out


def tuned_stamp(spec: Mapping[str, Any]) -> dict[str, dict]:
    """The same of the one draw that a stage-3 checkpoint was trained on; {} of one that does not say it."""
    draw = spec.get("draw")
    if not draw:
        return {}
    return {str(spec["shots"]): {"unit": draw["unit"], "sha256": {str(draw["seed"]): draw["sha256"]}}}
