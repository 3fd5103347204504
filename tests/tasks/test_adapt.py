# SPDX-License-Identifier: AGPL-3.0-or-later
"""`register --adapt`: new classes become columns of the detector, the old ones stay, and what cannot be is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fsdet import config
from fsdet.cli.main import main
from fsdet.data.convert import convert
from fsdet.data.sources import load
from fsdet.engine import checkpoint
from fsdet.errors import CheckpointError, DataError
from fsdet.tasks.adapt import SETTINGS, STEPS, Adapted, adapt, prepared, with_support
from fsdet.tasks.loading import load_trained

QUICK = ("run.threads=1", "data.workers=0", "episode.queries=2", "optim.warmup_epochs=0")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two shots of a mug, one of a pen with a box; the current folder is beside them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("support/mug/1.png", "support/mug/2.png", "support/pen/1.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 120, 3), np.uint8)).save(name)
    Path("support/pen/1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    return tmp_path / "support"


@pytest.mark.slow
def test_new_classes_become_columns_and_running_statistics_stay(best, folder, caplog):
    caplog.set_level("INFO", logger="fsdet")
    done = adapt(prepared(best, folder), folder.parent / "out", steps=2, device="cpu", overrides=QUICK)
    before, after = load_trained(best), load_trained(done.checkpoint)
    assert done.classes == ("mug", "pen") and after.classes == (*before.classes, "mug", "pen")
    assert after.finetuned and np.isfinite([done.before, done.after]).all()
    for part in ("backbone", "neck"):
        old, new = (dict(getattr(t.model, part).named_buffers()) for t in (before, after))
        assert old and all(torch.equal(old[name], new[name]) for name in old), part
    assert "recipe far: registration alone finds" in caplog.text, "two steps know nothing"
    saved = config.load(done.checkpoint.with_name("config.yaml"))
    assert (saved.stage.recipe, saved.optim.steps) == ("far", 2)
    assert checkpoint.load(done.checkpoint.with_name("last.pt"))["step"] == 3, "half as long again"
    assert after.model.head.standard[0].weight[80:].abs().max() > 0, "new columns start at zero"
    with pytest.raises(CheckpointError, match="one of stage 3"):
        prepared(done.checkpoint, folder)


def test_own_novel_classes_of_the_base_data_do_not_take_the_new_numbers(small_demo, folder):
    known = load(small_demo)
    assert any((r.labels >= known.num_base).any() for r in known.split("test"))
    joined = with_support(known, known.base, folder)
    assert joined.names == (*known.base, "mug", "pen")
    assert all((r.labels < joined.num_base).all() for split in ("train", "val", "test") for r in joined.split(split))
    assert sorted({c for r in joined.split("support") for c in r.labels.tolist()}) == [80, 81]
    assert all(r.exhaustive == set(r.labels.tolist()) for r in joined.split("support")), "a folder labels its own class"


def test_a_base_class_and_other_base_data_are_refused_by_name(small_demo, folder):
    known = load(small_demo)
    (folder / "pen").rename(folder / known.base[3])
    with pytest.raises(DataError, match=known.base[3]):
        with_support(known, known.base, folder)
    with pytest.raises(DataError, match="base classes of the checkpoint"):
        with_support(known, known.base[1:], folder)


def test_a_base_class_that_one_split_alone_shows_is_one_of_the_datas(small_demo, folder, tmp_path, monkeypatch):
    """VOC files and no `base:`: the classes are those of all splits, as they were when the detector was trained."""
    convert(load(small_demo), tmp_path / "voc", "voc")
    written = yaml.safe_load((tmp_path / "voc/data.yaml").read_text())
    written.pop("base")
    written["train"] = written["val"]
    (tmp_path / "voc/data.yaml").write_text(yaml.safe_dump(written))
    path = str(tmp_path / "voc/data.yaml")
    whole = load(path)
    assert len(load(path, splits=("train", "val")).base) < len(whole.base)
    detector = SimpleNamespace(finetuned=False, classes=whole.base, spec={"data": path})
    monkeypatch.setattr("fsdet.tasks.adapt.load_trained", lambda _: detector)
    assert prepared(Path("any.pt"), folder, path).joined.base == whole.base


def test_without_base_images_it_refuses_to_forget(small_demo, folder):
    known = load(small_demo, splits=("val",))
    with pytest.raises(DataError, match="base classes are forgotten"):
        with_support(known, known.base, folder)


@pytest.mark.slow
def test_the_command_keeps_bank_and_checkpoint_and_overwrites_neither(best, folder, capsys):
    argv = ["register", str(best), "--support", "support", "--out", "my.bank", "--adapt", "--steps", "1"]
    assert main([*argv, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "finds 2 new classes by itself; base AP50" in out and Path("my.bank").is_file()
    stamp = Path("my.bank.adapted/best.pt").stat().st_mtime_ns
    seen = ["predict", "my.bank.adapted/best.pt", "--source", "support/mug", "--out", "seen", "--device", "cpu"]
    assert main(seen) == 0
    assert main(argv) == 2
    assert "my.bank.adapted: expected a folder to make" in capsys.readouterr().err
    assert Path("my.bank.adapted/best.pt").stat().st_mtime_ns == stamp


def test_a_refused_adaptation_leaves_no_bank_either(best, small_demo, folder, capsys):
    (folder / "pen").rename(folder / load(small_demo).base[3])
    argv = ["register", str(best), "--support", "support", "--out", "my.bank", "--adapt", "--device", "cpu"]
    assert main(argv) == 2
    assert "base classes of the detector" in capsys.readouterr().err
    assert not Path("my.bank").exists() and not Path("my.bank.adapted").exists()


def test_what_registering_says_of_shots_comes_before_the_training(best, folder, caplog, monkeypatch):
    """And once: a picture in two folders can be put right before minutes of training."""
    shutil.copy("support/mug/1.png", "support/pen/cup.png")
    told: list[str] = []

    def train(start, run, **_):
        told.extend(record.message for record in caplog.records)
        assert start.joined.novel == ("mug", "pen") and not Path("my.bank").exists(), "a bank is written at the end"
        return Adapted(run / "best.pt", start.joined.novel, 0.5, 0.5)

    monkeypatch.setattr("fsdet.tasks.adapt.adapt", train)
    argv = ["register", str(best), "--support", "support", "--out", "my.bank", "--adapt", "--device", "cpu"]
    assert main(argv) == 0 and Path("my.bank").is_file()
    assert sum("cup.png is 1.png of 'mug'" in line for line in told) == 1
    assert sum("another class" in record.message for record in caplog.records) == 1


def test_adaptation_is_the_demos_stage_3():
    """The same numbers twice: the demo's file does not travel with the package, so they are held together here."""
    shipped = config.load(Path(__file__).resolve().parents[2] / "configs/demo/stage_3.yaml")
    adapted = config.load(None, [*SETTINGS, f"optim.steps={STEPS}"])
    assert adapted.optim == shipped.optim and adapted.loss == shipped.loss
    assert adapted.episode.queries == shipped.episode.queries and adapted.data.augment == shipped.data.augment
    assert (adapted.stage.freeze, adapted.stage.freeze_norm) == (shipped.stage.freeze, shipped.stage.freeze_norm)
