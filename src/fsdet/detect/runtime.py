# SPDX-License-Identifier: AGPL-3.0-or-later
"""An exported file in use: its own network, and the NMS that PyTorch's detections go through. Door to onnxruntime."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdet.bank import PrototypeBank
from fsdet.data.collate import to_tensor
from fsdet.data.images import Picture, rgb_of
from fsdet.data.transforms import letterbox
from fsdet.detect.calibration import USUAL
from fsdet.detect.exporting import CARD, needed, quiet
from fsdet.detect.portable import INPUTS, Card
from fsdet.detect.postprocess import NMS_IOU, PROTOTYPE, select, to_original
from fsdet.errors import CheckpointError, UserError, explain
from fsdet.types import Detections

Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Network:
    """A file that has been opened: what it says of itself, and (images, prototypes) -> (boxes, scores)."""

    card: Card
    run: Run


def open_onnx(path: Path) -> Network:
    """An ONNX file of fsdet export, on the CPU.

    Raises:
        CheckpointError: it is missing, damaged, or another file. UserError: onnxruntime is missing.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise CheckpointError(explain("an ONNX file", got, str(path), "check the path; fsdet export writes one"))
    runtime = needed("onnxruntime")
    state = needed("onnxruntime.capi.onnxruntime_pybind11_state")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (
        state.Fail,
        state.InvalidProtobuf,
        state.InvalidGraph,
        state.InvalidArgument,
        state.NotImplemented,
    ) as error:
        told = str(error).splitlines()[0][:120]
        raise CheckpointError(explain("an ONNX file that onnxruntime reads", told, str(path),
                                      "export the checkpoint again")) from error  # fmt: skip
    card = Card.of(session.get_modelmeta().custom_metadata_map, str(path))

    def run(images: Tensor, prototypes: Tensor | None) -> tuple[Tensor, Tensor]:
        given = zip(INPUTS, (images, prototypes), strict=True)
        boxes, scores = session.run(None, {name: value.numpy() for name, value in given if value is not None})
        return torch.from_numpy(boxes), torch.from_numpy(scores)

    return Network(card, run)


def open_torch(path: Path, form: str) -> Network:
    """A TorchScript or torch.export file. Such files can hold code: only for those that were just written."""
    extra: dict[str, Any] = {CARD: ""}
    content = io.BytesIO(path.read_bytes())  # torch.export goes by the suffix of a path
    with quiet():
        if form == "torchscript":
            module = torch.jit.load(content, "cpu", _extra_files=extra)
        else:
            module = torch.export.load(content, extra_files=extra).module()
    card = Card.of(_properties(extra[CARD]), str(path))

    def run(images: Tensor, prototypes: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return module(images) if prototypes is None else module(images, prototypes)

    return Network(card, run)


class PortablePredictor:
    """Detections of an exported file; `names`, `registered` and `predict` are those of Predictor.

    limits: [labels] the least score of each class.

    Args:
        bank: the classes to look for, where prototypes are an input of the file; it must come from its weights.
    Raises:
        UserError: a bank for a file that has one frozen in, or that holds a class of the detector itself.
        CheckpointError: a bank of other weights.
    """

    def __init__(self, network: Network, bank: PrototypeBank | None = None, where: str = "--onnx") -> None:
        card = self.card = network.card
        self._run, self._prototypes = network.run, None
        names, registered, limits = list(card.names), card.registered, list(card.thresholds)
        labels, branches = list(card.labels), list(card.branches)
        if bank is not None and card.prototypes != "input":
            raise UserError(explain("a file with prototypes as an input", "a bank frozen into it", where,
                                    "leave --bank out, or export with --prototypes input"))  # fmt: skip
        if bank is not None:
            bank.check_model(card.model_sha256, "bank")
            if own := [name for name in bank.names if name in card.names]:
                raise UserError(explain("classes that the detector does not have itself", ", ".join(own), bank.where,
                                        "freeze that bank in: fsdet export --bank"))  # fmt: skip
            self._prototypes, registered = bank.prototypes().reshape(-1, card.dim), bank.names
            labels += range(len(names), len(names) + len(bank.names))
            branches += [PROTOTYPE] * len(bank.names)
            names += bank.names
            limits += [USUAL if proposed is None else proposed for proposed in bank.thresholds]
        elif card.prototypes == "input":
            self._prototypes = torch.zeros(0, card.dim)
        self.names, self.registered = tuple(names), tuple(registered)
        self.limits = torch.tensor(limits, dtype=torch.float32)
        self._columns = torch.tensor(branches, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64)

    @property
    def made_by(self) -> dict[str, Any]:
        """As Predictor.made_by: the hash is that of the weights it was exported from."""
        return {"model_sha256": self.card.model_sha256, "looks": 1}

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] RGB in [0, 1] -> boxes [B, A, 4] px of the input, scores [B, A, T]."""
        return self._run(images, self._prototypes)

    def predict(self, image: Picture, threshold: float | None = None, iou: float = NMS_IOU) -> Detections:
        """Detections in one image (a path, an RGB array or a PIL image), best first; as Predictor.predict.

        Raises:
            DataError: the image cannot be read. UserError: it is none.
        """
        pixels = rgb_of(image)
        boxed, factor, padding = letterbox(pixels, self.card.image_size)
        boxes, scores = self.raw(to_tensor([boxed], self.card.image_size).contiguous())
        limit = self.limits if threshold is None else torch.full_like(self.limits, threshold)
        least = float(limit.min()) if len(limit) else 0.0
        [found] = select(boxes, scores, *self._columns, threshold=least, iou=iou)
        return to_original(found.above(limit), factor, padding, pixels.shape[:2])


def _properties(text: str | bytes) -> dict[str, str]:
    return json.loads(text) if text else {}
