# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet export`: a checkpoint, with a bank frozen in or prototypes as an input, in a file that other programs run."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fsdet import __version__
from fsdet.bank import PrototypeBank
from fsdet.data import sources
from fsdet.data.images import read_rgb
from fsdet.detect.exporting import FORMATS, write
from fsdet.detect.parity import Comparison, Parity
from fsdet.detect.portable import KIND, Card, Portable, columns_of
from fsdet.detect.predictor import Predictor
from fsdet.detect.runtime import Network, PortablePredictor, open_onnx, open_torch
from fsdet.errors import DataError, UserError, explain
from fsdet.evaluation.summary import write_json
from fsdet.files import is_json_with, refuse_foreign
from fsdet.models.build import model_sha256
from fsdet.progress import track
from fsdet.tasks.loading import data_of, load_trained
from fsdet.tasks.use import image_paths, predictor_of

MOST_IMAGES = 16  # that parity is measured on
SUFFIXES = dict(zip(FORMATS, (".onnx", ".ts", ".pt2"), strict=True))
ONNX_START = b"\x08"  # the tag of its first field, the version of its format
MADE_UP = 5  # prototypes where the file takes some and no bank is given: embeddings of the first image


def report_path(out: Path) -> Path:
    """Where the parity report of an exported file goes."""
    return out.with_name(f"{out.name}.parity.json")


def export(checkpoint: Path, *, out: Path, bank: Path | None = None, form: str = "onnx", prototypes: str = "frozen",
           images: Path | None = None) -> Parity:  # fmt: skip
    """Write `out` and, beside it, how it compares with PyTorch on real images.

    Args:
        form: one of FORMATS. prototypes: `frozen` (those of `bank`, in the graph) or `input`. images: an image or a
            folder for the comparison; None takes the split test, or val, of the data it was trained on.
    Raises:
        UserError: a package is missing, or `out` is another file. DataError: there is no image to compare on.
        CheckpointError: the checkpoint, or a bank of other weights.
    """
    refuse_foreign(out, "an exported file", is_exported)
    refuse_foreign(report_path(out), "a parity report", is_json_with("ok", "images", "tolerance"))
    pictures = _images(checkpoint, images)
    predictor = predictor_of(checkpoint, PrototypeBank.load(bank) if bank else None)
    net, card = _portable(predictor, prototypes)
    write(net, card, out, form)
    network = open_onnx(out) if form == "onnx" else open_torch(out, form)
    parity, seconds = _compared(predictor, net, network, pictures)
    write_json(report_path(out), {"file": out.name, "format": form, "prototypes": prototypes, **parity.values(),
                                  "model_sha256": card.model_sha256, "image_size": card.image_size,
                                  "ms_per_image": {k: 1000 * v / len(pictures) for k, v in seconds.items()},
                                  "threads": torch.get_num_threads()})  # fmt: skip
    return parity


def is_exported(path: Path) -> bool:
    """Whether a file was written by fsdet export: an ONNX model or an archive of torch with its card inside."""
    content = path.read_bytes()
    return content.startswith((ONNX_START, b"PK")) and KIND.encode() in content


def _portable(predictor: Predictor, prototypes: str) -> tuple[Portable, Card]:
    words, limits = predictor.frozen()
    names, registered = predictor.names, predictor.registered
    if prototypes == "input":
        if own := [name for name in registered if name in predictor.classes]:
            raise UserError(explain("a bank of classes that are not the detector's", ", ".join(own), "--bank",
                                    "freeze it in, without --prototypes input"))  # fmt: skip
        names, registered, limits = predictor.classes, (), limits[: len(predictor.classes)]
    net = Portable(predictor.model, words, open_=prototypes == "input").eval()
    labels, branches = columns_of(net.words)
    card = Card(tuple(names), tuple(labels), tuple(branches), tuple(round(v, 6) for v in limits.tolist()),
                tuple(registered), prototypes, predictor.prepare.image_size, predictor.model.stride,
                predictor.model.head.proxies.shape[-1], model_sha256(predictor.model), __version__)  # fmt: skip
    return net, card


def _images(checkpoint: Path, images: Path | None) -> list[tuple[str, np.ndarray]]:
    """(name, pixels) of at most MOST_IMAGES, evenly taken."""
    if images is not None:
        paths = image_paths(images)
    else:
        try:
            data = sources.load(data_of(load_trained(checkpoint)))
        except DataError as error:
            raise DataError(explain("images to compare on", "no data set of the training", str(checkpoint),
                                    f"name some with --images DIR ({error})")) from error  # fmt: skip
        split = next(name for name in ("test", "val", "train") if data.has(name))
        paths = [record.path for record in data.split(split)]
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(MOST_IMAGES, len(paths))).round().astype(int)]
    return [(path.name, read_rgb(path)) for path in chosen]


def _compared(predictor: Predictor, net: Portable, network: Network,
              pictures: Sequence[tuple[str, np.ndarray]]) -> tuple[Parity, dict[str, float]]:  # fmt: skip
    """Both on every image, and the seconds that each took for the network alone."""
    bank = predictor.bank if net.open and predictor.registered else None
    other = PortablePredictor(network, bank)
    made_up = None
    found, seconds = Comparison(), {"pytorch": 0.0, "exported": 0.0}
    size = predictor.prepare.image_size + predictor.model.stride  # another batch and size than the graph was made with
    larger = replace(predictor.prepare, image_size=size)
    odd = larger.tensor([larger.fitted(pixels)[0] for _, pixels in pictures[:3]]).contiguous()
    for name, pixels in track(list(pictures), "compare"):
        image = predictor.prepare.tensor([predictor.prepare.fitted(pixels)[0]]).contiguous()
        if net.open and made_up is None:
            made_up = bank.prototypes() if bank else _some_embeddings(predictor, image)
        began = time.perf_counter()
        with torch.no_grad():
            ours = net(image, made_up) if net.open else net(image)
        middle = time.perf_counter()
        theirs = network.run(image, made_up)
        seconds["pytorch"] += middle - began
        seconds["exported"] += time.perf_counter() - middle
        found.raw(ours, theirs)
        found.found(name, predictor.predict(pixels), other.predict(pixels))
    with torch.no_grad():
        found.raw(net(odd, made_up) if net.open else net(odd), network.run(odd, made_up))
    return found.result(), seconds


@torch.inference_mode()
def _some_embeddings(predictor: Predictor, image: torch.Tensor) -> torch.Tensor:
    """[MADE_UP, D]: places of an image, evenly taken, as if they had been registered."""
    rows = predictor.model.dense(image).embeddings[0]
    return rows[torch.linspace(0, len(rows) - 1, MADE_UP).long()].clone()
