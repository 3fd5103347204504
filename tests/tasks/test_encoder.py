# SPDX-License-Identifier: AGPL-3.0-or-later
"""A frozen ViT as support encoder from training to use: episodes, resume, stage 3, registering, banks, info, export."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fsdet import config as configs
from fsdet import tasks
from fsdet.bank import PrototypeBank
from fsdet.cli.main import main
from fsdet.data.sources import load
from fsdet.detect.support import embed_instances
from fsdet.engine import checkpoint as checkpoints
from fsdet.errors import CheckpointError, ConfigError
from fsdet.tasks import build_task, read_data
from fsdet.tasks.adapt import adapt, prepared
from fsdet.tasks.loading import load_trained
from fsdet.tasks.use import predictor_of
from tasks.conftest import small

EPISODES = ("stage.name=episodic", "episode.ways=2", "episode.shots=[1,2]")


def random_vit(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(the ViT's file, one of the same shapes and other values)."""
    folder = tmp_path_factory.mktemp("vits")
    return random_vit(folder / "vit.safetensors", 0), random_vit(folder / "other.safetensors", 1)


def with_vit(file: Path, side: int = 32) -> tuple[str, ...]:
    return ("model.support_encoder=vit", "model.vit.name=test_vit", f"model.vit.weights={file}",
            f"model.vit.image_size={side}")  # fmt: skip


@pytest.fixture(scope="module")
def settings(small_demo, files):
    """Call with a run folder and overrides: episodes with the ViT."""
    return lambda folder, *more: small(small_demo, folder, *EPISODES, *with_vit(files[0]), *more)


@pytest.fixture(scope="module")
def run(settings, best, tmp_path_factory):
    """Four steps of episodes on a stage 1 that knew no ViT; saved every two."""
    folder = tmp_path_factory.mktemp("runs") / "vit"
    more = (f"stage.init_from={best}", "optim.steps=4", "save.every_steps=2", "save.keep=5", "optim.ema=0.9")
    tasks.build(settings(folder, *more)).fit()
    return folder


def support_folder(place: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("mug/1.png", "mug/2.png", "pen/1.png"):
        (place / "support" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 120, 3), np.uint8)).save(place / "support" / name)
    return place / "support"


@pytest.mark.slow
def test_episodes_train_the_projection_and_checkpoints_hold_no_vit(run, best, caplog):
    state = torch.load(run / "last.pt", weights_only=True)
    first = torch.load(run / "step_00000002.pt", weights_only=True)
    for kind in ("model", "ema"):
        assert set(state[kind]) - set(checkpoints.load(best)["model"]) == {"projection.weight", "projection.bias"}
        assert (state[kind]["projection.weight"] != first[kind]["projection.weight"]).any()
    spec = state["spec"]["model"]["encoder"]
    assert (spec["name"], spec["image_size"], spec["features"]) == ("test_vit", 32, 64)
    assert (run / "last.pt").stat().st_size < best.stat().st_size + 100_000


def test_a_step_moves_no_bit_of_the_vit_and_gives_the_projection_its_gradient(settings, tmp_path):
    config = settings(tmp_path / "run")
    task = build_task(config, read_data(config), resume=True)[0]
    before = {n: p.clone() for n, p in task.model.encoder.named_parameters()}
    losses = task.losses(task.batch(0))
    losses.total.backward()
    assert task.model.projection.weight.grad.abs().max() > 0
    grouped = {name for members in task.param_groups().values() for name, _ in members}
    assert {n for n in grouped if "vit" in n or "encoder" in n} == set() and "projection.weight" in grouped
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in task.model.encoder.named_parameters())


@pytest.mark.slow
def test_a_resume_is_bit_exact_wherever_the_file_lies_now(run, settings, best, files, tmp_path, caplog):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(run / "step_00000002.pt", again / "last.pt")
    moved = shutil.copy(files[0], tmp_path / "moved.safetensors")
    more = (f"stage.init_from={best}", "optim.steps=4", "save.every_steps=2", "save.keep=5", "optim.ema=0.9")
    tasks.build(settings(again, *more, f"model.vit.weights={moved}"), resume=True).fit()
    assert "not exact" not in caplog.text
    whole, resumed = (torch.load(folder / "last.pt", weights_only=True) for folder in (run, again))
    for kind in ("model", "ema"):
        assert all(torch.equal(v, resumed[kind][k]) for k, v in whole[kind].items())
    assert whole["step"] == resumed["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (lambda files: with_vit(files[1]), r"model.encoder.sha256 \w+ -> \w+"),
        (lambda files: with_vit(files[0], 48), "model.encoder.image_size 32 -> 48"),
        (lambda files: ("model.support_encoder=detector",), "model.encoder"),
    ],
)
def test_a_resume_with_another_encoder_is_refused(run, small_demo, files, more, told):
    config = small(small_demo, run, *EPISODES, "optim.steps=4", *more(files))
    with pytest.raises(CheckpointError, match=told):
        tasks.build(config, resume=True)


@pytest.mark.slow
def test_a_run_of_before_these_keys_resumes_and_none_goes_on_with_a_vit(settings, small_demo, tmp_path, files, caplog):
    plain = small(small_demo, tmp_path / "run", *EPISODES)
    tasks.build(plain).fit()
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert "encoder" not in state["spec"]["model"]
    for key in ("support_encoder", "vit"):
        del state["config"]["model"][key]
    for path in (tmp_path / "run").glob("*.pt"):
        torch.save(state, path)
    (tmp_path / "run/manifest.json").unlink()
    caplog.clear()
    tasks.build(small(small_demo, tmp_path / "run", *EPISODES), resume=True)
    assert "not exact" not in caplog.text
    with pytest.raises(CheckpointError, match=r"another: model.encoder"):
        tasks.build(settings(tmp_path / "run"), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("episodic", lambda files: with_vit(files[1])),
        ("episodic", lambda files: ("model.support_encoder=detector",)),
        ("finetune", lambda files: ("model.support_encoder=detector",)),
    ],
)
def test_a_later_stage_keeps_its_vit(run, small_demo, tmp_path, files, stage, more):
    shots = ("episode.shots=1",) if stage == "finetune" else EPISODES[1:]
    config = small(small_demo, tmp_path / "run", f"stage.name={stage}", f"stage.init_from={run / 'best.pt'}", *shots,
                   *more(files))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"model.support_encoder test_vit at 32 px \(\w{12}\) there"):
        tasks.build(config)


@pytest.mark.slow
def test_stage_3_neither_takes_a_vit_in_nor_loses_it(run, best, small_demo, files, tmp_path):
    tune = ("stage.name=finetune", "episode.shots=1", *with_vit(files[0]))
    with pytest.raises(CheckpointError, match=r"model.support_encoder the detector itself there, test_vit"):
        tasks.build(small(small_demo, tmp_path / "run", *tune, f"stage.init_from={best}"))
    config = small(small_demo, tmp_path / "run", *tune, f"stage.init_from={run / 'best.pt'}")
    task, told = build_task(config, read_data(config), resume=False)
    assert "novel classes start from the prototypes" in told
    trained, data = load_trained(run / "best.pt"), load(small_demo)
    label, i, j = task.batches.shots[0]
    row = embed_instances(trained.model, [task.batches.shot_store.instance(i, j)], 64)[0]
    assert (task.model.head.proxies[label] - row).abs().max() < 1e-3, "the prototype that the ViT's embeddings give"
    assert task.model.projection.weight.equal(trained.model.projection.weight)
    assert task.model.head.proxies.shape[0] == len(data.names)


@pytest.mark.slow
def test_registering_goes_through_the_vit_and_a_bank_of_another_is_refused(run, files, tmp_path, capsys):
    place = support_folder(tmp_path)
    words = ["--support", str(place), "--out", str(tmp_path / "my.bank"), "--device", "cpu"]
    assert main(["register", str(run / "best.pt"), *words]) == 0
    bank = PrototypeBank.load(tmp_path / "my.bank")
    assert [rows.shape for rows in bank.instances] == [(2, 16), (1, 16)]
    before = ["predict", str(run / "best.pt"), "--source", str(place / "pen"), "--device", "cpu", "--conf", "0"]
    assert main([*before, "--bank", str(tmp_path / "my.bank"), "--out", str(tmp_path / "out")]) == 0
    state = torch.load(run / "best.pt", weights_only=True)
    state["spec"]["model"]["encoder"] |= {"weights": str(files[1]), "sha256": "0" * 64}
    torch.save(state, tmp_path / "other.pt")
    capsys.readouterr()
    before[1] = str(tmp_path / "other.pt")
    assert main([*before, "--bank", str(tmp_path / "my.bank"), "--out", str(tmp_path / "two")]) == 2
    assert "expected a bank made by these weights" in capsys.readouterr().err
    assert main(["register", str(tmp_path / "other.pt"), *words[:3], str(tmp_path / "b"), *words[4:]]) == 2
    assert "expected the ViT that the detector was trained with (000000000000)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bank_is_used_without_the_vit_and_registering_finds_it_beside_the_checkpoint(run, files, tmp_path, capsys):
    state = torch.load(run / "best.pt", weights_only=True)
    state["spec"]["model"]["encoder"]["weights"] = "/nowhere/vit.safetensors"
    torch.save(state, tmp_path / "best.pt")
    place, words = support_folder(tmp_path), ["--out", str(tmp_path / "my.bank"), "--device", "cpu"]
    assert main(["register", str(tmp_path / "best.pt"), "--support", str(place), *words]) == 2
    assert "/nowhere/vit.safetensors: expected a file of the ViT's weights" in capsys.readouterr().err
    shutil.copy(files[0], tmp_path / "vit.safetensors")
    assert main(["register", str(tmp_path / "best.pt"), "--support", str(place), *words]) == 0
    (tmp_path / "vit.safetensors").unlink()
    predictor = predictor_of(tmp_path / "best.pt", PrototypeBank.load(tmp_path / "my.bank"))
    assert predictor.registered == ("mug", "pen")
    predictor.predict(np.zeros((60, 60, 3), np.uint8))
    assert predictor.model.encoder._network is None


@pytest.mark.slow
def test_info_lists_the_vit_as_frozen(run, small_demo, files, tmp_path, capsys):
    assert main(["info", str(run / "best.pt"), "--size", "64"]) == 0
    told = capsys.readouterr().out
    assert "  vit           0.30 M, frozen" in told and "  projection    0.00 M\n" in told
    (tmp_path / "c.yaml").write_text("run: {precision: fp32}\n", encoding="utf-8")
    words = [f"data.path={small_demo}", *EPISODES, *with_vit(files[0])]
    assert main(["info", str(tmp_path / "c.yaml"), *words]) == 0
    told = capsys.readouterr().out
    assert "of it trains, the rest is frozen" in told and "supports at" not in told


def test_keys_that_do_not_go_together_are_told(files):
    with pytest.raises(ConfigError, match=r"expected model.vit.weights, a local file of the ViT's weights, got none"):
        configs.load(None, ["model.support_encoder=vit"])
    with pytest.raises(ConfigError, match=r"'model.vit': expected support_encoder: vit in section model"):
        configs.load(None, [f"model.vit.weights={files[0]}"])


@pytest.mark.slow
def test_adapting_and_exporting_take_the_vit_along(run, small_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = support_folder(tmp_path)
    quick = ("run.threads=1", "data.workers=0", "episode.queries=2", "optim.warmup_epochs=0")
    done = adapt(prepared(run / "best.pt", place), tmp_path / "out", steps=2, device="cpu", overrides=quick)
    adapted = load_trained(done.checkpoint)
    assert adapted.model.encoder.identity == load_trained(run / "best.pt").model.encoder.identity
    predictor = predictor_of(run / "best.pt")
    label = load(small_demo).num_base
    records = [r.kept(r.labels == label) for r in load(small_demo).split("support") if label in r.labels]
    predictor.register("thing", records[:2])
    predictor.bank.save(tmp_path / "b.bank")
    words = ["--bank", str(tmp_path / "b.bank"), "--images", str(place / "mug"), "--out", str(tmp_path / "m.onnx")]
    assert main(["export", str(run / "best.pt"), *words]) == 0
