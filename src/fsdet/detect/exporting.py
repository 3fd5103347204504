# SPDX-License-Identifier: AGPL-3.0-or-later
"""A portable network into a file: ONNX, TorchScript or a torch.export program, with its card inside. Door to onnx."""

import importlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fsdet.detect.portable import INPUTS, OUTPUTS, Card, Portable
from fsdet.errors import UserError, explain
from fsdet.files import write_durably

FORMATS = ("onnx", "torchscript", "exported")
CARD = "card.json"  # inside a TorchScript or torch.export archive
OPSET = 18
MOST_SIDE = 128  # multiples of the coarsest stride that a side may have: 4096 px
EXTRA = ("onnx", "onnxruntime", "onnxscript")


def needed(name: str) -> Any:
    """The module `name` of the extra `export`. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(explain(f"{name} (extra export)", "not installed", "fsdet",
                                f"{sys.executable} -m pip install {' '.join(EXTRA)}")) from error  # fmt: skip


def write(net: Portable, card: Card, path: Path, form: str) -> Path:
    """Write `net` with its card, all at once.

    Batch, height and width are open in every form (sides are multiples of the coarsest stride), and so is the number of
    prototypes where they are an input.
    Raises:
        UserError: a package is missing.
    """
    make = {"onnx": _onnx, "torchscript": _torchscript, "exported": _exported}[form]
    with torch.inference_mode(False), torch.no_grad(), quiet():
        return write_durably(path, make(net.eval(), card))


def open_sizes(net: Portable) -> tuple[Mapping[int, Any], ...]:
    """The dimensions of each input that are not fixed, as torch.export takes them."""
    dim, stride = torch.export.Dim, net.model.stride
    sides = {i: stride * dim(f"{name}_cells", min=1, max=MOST_SIDE) for i, name in ((2, "height"), (3, "width"))}
    images = {0: dim("batch", min=1), **sides}
    return (images, {0: dim("classes")}) if net.open else (images,)


def _onnx(net: Portable, card: Card) -> bytes:
    onnx, _ = needed("onnx"), needed("onnxscript")
    example, shapes = net.example(card.image_size), open_sizes(net)
    program = torch.onnx.export(net, example, None, input_names=list(INPUTS[: len(example)]),
                                output_names=list(OUTPUTS), dynamic_shapes=shapes, dynamo=True, opset_version=OPSET,
                                verbose=False)  # fmt: skip
    model = program.model_proto
    onnx.helper.set_model_props(model, card.properties())
    model.producer_name, model.producer_version = "fsdet", card.version
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _torchscript(net: Portable, card: Card) -> bytes:
    traced = torch.jit.trace(net, net.example(card.image_size), check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={CARD: _text(card)})
    return buffer.getvalue()


def _exported(net: Portable, card: Card) -> bytes:
    program = torch.export.export(net, net.example(card.image_size), dynamic_shapes=open_sizes(net))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={CARD: _text(card)})
    return buffer.getvalue()


def _text(card: Card) -> str:
    return json.dumps(card.properties(), ensure_ascii=False)


@contextmanager
def quiet() -> Iterator[None]:
    """What torch's exporters say of themselves is of no use to whoever exports; errors stay errors."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
