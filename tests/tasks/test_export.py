# SPDX-License-Identifier: AGPL-3.0-or-later
"""An exported detector says what PyTorch says, in every form, and `fsdet predict --onnx` finds what `predict` finds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsdet.bank import PrototypeBank
from fsdet.cli.main import main
from fsdet.data.collate import to_tensor
from fsdet.data.images import read_rgb
from fsdet.data.sources import load
from fsdet.data.transforms import letterbox
from fsdet.detect.portable import FORMAT
from fsdet.errors import DataError, UserError
from fsdet.models.build import model_sha256
from fsdet.tasks import export as exporting
from fsdet.tasks.loading import load_trained
from fsdet.tasks.use import predictor_of


@pytest.fixture(scope="module")
def best(best, small_demo, tmp_path_factory):
    """The checkpoint with BatchNorm and classifiers that tell places apart: after two steps all score alike, and which
    of two equal boxes stays is chance."""
    model = load_trained(best).model.train()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
    images = [letterbox(read_rgb(r.path), 96)[0] for r in load(small_demo).split("train")[:16]]
    with torch.no_grad():
        model.dense(to_tensor(images, 96))
        for layer in (*model.head.embed, *model.head.standard, *model.head.objectness, model.head.refine[-1]):
            torch.nn.init.normal_(layer.weight, std=0.2)
    state = torch.load(best, weights_only=True)
    path = tmp_path_factory.mktemp("sharp") / "best.pt"
    torch.save({**state, "model": model.state_dict(), "ema": None}, path)
    return path


@pytest.fixture(scope="module")
def place(best, small_demo, tmp_path_factory):
    """A folder with a bank of two classes and two photographs of another size than the network's."""
    folder = tmp_path_factory.mktemp("export")
    data, predictor = load(small_demo), predictor_of(best)
    for name in data.novel[:2]:
        label = data.names.index(name)
        predictor.register(name, [r.kept(r.labels == label) for r in data.split("support") if label in r.labels][:2])
    predictor.bank.proposed({data.novel[0]: (0.002, "by hand")}).save(folder / "my.bank")
    (folder / "photos").mkdir()
    for record in data.split("test")[:2]:
        (folder / "photos" / record.path.name).write_bytes(record.path.read_bytes())
    return folder


def predicted(place: Path, out: str, *words: object) -> dict:
    source = ["--source", str(place / "photos"), "--out", str(place / out), "--conf", "0.002", "--device", "cpu"]
    assert main(["predict", *map(str, words), *source]) == 0
    return json.loads((place / out / "predictions.json").read_text(encoding="utf-8"))


def same(ours: dict, theirs: dict) -> None:
    """To what rounding of the file leaves, whatever the order of equal scores."""

    def rows(value):
        return sorted((r["image"], r["category_id"], r["branch"], round(r["score"], 3)) for r in value["predictions"])

    assert ours["names"] == theirs["names"] and ours["made_by"] == theirs["made_by"] and len(ours["predictions"]) > 3
    assert rows(ours) == rows(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("prototypes", ["frozen", "input"])
def test_onnx_is_written_compared_described_and_run(best, place, prototypes, capsys):
    pytest.importorskip("onnxscript")
    onnx, bank = place / f"{prototypes}.onnx", place / "my.bank"
    argv = ["export", str(best), "--bank", str(bank), "--out", str(onnx), "--prototypes", prototypes]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "parity with PyTorch on 8 images" in shown and "fsdet predict --onnx" in shown
    report = json.loads((place / f"{prototypes}.onnx.parity.json").read_text(encoding="utf-8"))
    assert report["ok"] and report["images"] == 8 and report["boxes"] <= 1e-4 and report["scores"] <= 1e-4
    assert report["different"] == [] and 0 < report["scores"], "two programs, not one twice"
    import onnx as library

    told = {p.key: p.value for p in library.load(onnx).metadata_props}
    assert told["format"] == FORMAT and told["licence"] == "AGPL-3.0-or-later" and "grey 114" in told["preprocessing"]
    assert told["model_sha256"] == model_sha256(load_trained(best).model)
    names = PrototypeBank.load(bank).names
    assert json.loads(told["names"])[80:] == (list(names) if prototypes == "frozen" else [])
    if prototypes == "frozen":
        assert json.loads(told["thresholds"])[80] == 0.002
    own = [] if prototypes == "frozen" else ["--bank", bank]
    same(predicted(place, f"torch_{prototypes}", best, "--bank", bank),
         predicted(place, f"onnx_{prototypes}", best, "--onnx", onnx, *own))  # fmt: skip
    assert exporting.is_exported(onnx), "its own file may be replaced"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torchscript", "exported"])
def test_other_forms_are_compared_at_another_batch_and_size_too(best, place, form, monkeypatch):
    sizes = []
    open_torch = exporting.open_torch

    def watched(path, form):
        network = open_torch(path, form)
        return replace(network, run=lambda images, rows: sizes.append(tuple(images.shape)) or network.run(images, rows))

    monkeypatch.setattr(exporting, "open_torch", watched)
    parity = exporting.export(best, out=place / f"a.{form}", bank=place / "my.bank", form=form, prototypes="input")
    assert parity.ok and {(1, 3, 96, 96), (3, 3, 128, 128)} <= set(sizes)


def test_a_file_that_says_something_else_is_exit_1_and_named(best, place, monkeypatch, capsys):
    """The network that is run has another bias than the one that was exported."""

    def wrong(path, form):
        predictor = predictor_of(best)
        predictor.model.head.bias.data += 3
        net, card = exporting._portable(predictor, "input")
        return exporting.Network(card, torch.no_grad()(lambda images, rows: net(images, rows)))

    monkeypatch.setattr(exporting, "write", lambda net, card, path, form: path.write_bytes(b"PK"))
    monkeypatch.setattr(exporting, "open_torch", wrong)
    out = place / "wrong.ts"
    assert main(["export", str(best), "--out", str(out), "--format", "torchscript", "--prototypes", "input"]) == 1
    shown = capsys.readouterr().out
    assert "no parity with PyTorch" in shown and "do not ship it" in shown and "next:" not in shown
    report = json.loads((place / "wrong.ts.parity.json").read_text(encoding="utf-8"))
    assert report["ok"] is False and report["scores"] > 1e-4 and report["boxes"] < 1e-4


def test_nothing_is_overwritten_and_images_are_asked_for(best, place, tmp_path):
    (tmp_path / "notes.onnx").write_text(f"mine, about {FORMAT}", encoding="utf-8")
    with pytest.raises(UserError, match="no file yet, or an exported file"):
        exporting.export(best, out=tmp_path / "notes.onnx")
    (tmp_path / "a.onnx.parity.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no file yet, or a parity report"):
        exporting.export(best, out=tmp_path / "a.onnx")
    state = torch.load(best, weights_only=True)
    state["spec"]["data"] = "datasets/gone/data.yaml"
    torch.save(state, tmp_path / "moved.pt")
    with pytest.raises(DataError, match=r"expected images to compare on.*--images DIR"):
        exporting.export(tmp_path / "moved.pt", out=tmp_path / "b.onnx")
    assert (tmp_path / "notes.onnx").read_text(encoding="utf-8").startswith("mine") and not (
        tmp_path / "b.onnx"
    ).exists()


def test_predict_says_what_stands_beside_onnx(capsys):
    for words, told in (
        (["a.pt", "--out", "o"], "expected CHECKPOINT and --source, or --onnx FILE and a source"),
        (["--onnx", "m.onnx", "--out", "o"], "expected CHECKPOINT and --source, or --onnx FILE and a source"),
        (["--source", "x", "--out", "o"], "expected CHECKPOINT and --source, or --onnx FILE and a source"),
        (["--onnx", "m.onnx", "x", "--support", "s", "--out", "o"], "expected --bank, or classes frozen into the file"),
        (["--onnx", "m.onnx", "x", "--rescore", "--out", "o"], "expected CHECKPOINT beside --rescore"),
    ):
        assert main(["predict", *words]) == 2
        assert told in capsys.readouterr().err
