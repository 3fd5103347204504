# SPDX-License-Identifier: AGPL-3.0-or-later
"""The studies on photographs: data YAMLs, configurations, study files and commands that their readers understand."""

import shlex
from pathlib import Path

import pytest

from fsdet import config
from fsdet.cli._arguments import split_overrides
from fsdet.data.datayaml import parse
from fsdet.data.report import Report
from fsdet.tasks import study

FOLDERS = [*(f"chess/{s}/images" for s in ("train", "valid", "test")), *(f"{d}/{s}" for d in ("cards", "fruits")
           for s in ("train", "test"))]  # fmt: skip


@pytest.fixture
def real(module):
    return module("real")


@pytest.fixture
def written(real, tmp_path):
    """(root, out) with every study in out."""
    root, out = tmp_path / "data", tmp_path / "out"
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    assert real.main([str(root), str(out), "--shots", "1,5", "--draws", "2", "--trainings", "2", "--steps", "7"]) == 0
    return root, out


NAMES = ("chess", "photos", "chess-inside", "cards-inside")


@pytest.mark.parametrize("name", NAMES)
def test_a_data_yaml_names_what_is_there(real, written, name):
    root, out = written
    report = Report()
    listed = parse(out / name / "data.yaml", report)
    assert listed.root == root.resolve() and len(report) == 0
    assert {"train", "test", "support"} <= set(listed.splits)
    assert all((root / source.path).is_dir() for group in listed.splits.values() for source in group)
    assert listed.base and listed.novel and not set(listed.base) & set(listed.novel)
    assert "bishop" not in (*listed.base, *listed.novel)
    seen = {s.path for split in ("train", "support", "val") for s in listed.splits.get(split, ())}
    assert not seen & {s.path for s in listed.splits["test"]}


@pytest.mark.parametrize("name", NAMES)
def test_configurations_load_and_fit_their_classes(real, written, name):
    home = written[1] / name
    loaded = [config.load(home / f"stage_{n}.yaml") for n in (1, 2, 3)]
    assert [c.stage.name for c in loaded] == ["base", "episodic", "finetune"]
    assert loaded[0].optim.steps == 7 and loaded[1].episode.ways <= len(real.STUDIES[name].base)
    for c in loaded:
        assert c.data.path == str(home / "data.yaml") and c.data.image_size == 224 and c.eval.shots == [1, 5]


@pytest.mark.parametrize("name", NAMES)
def test_study_files_are_understood_once_their_checkpoints_are_there(written, name):
    home = written[1] / name
    for path in ("stage2-0/best.pt", "stage2-1/best.pt", "rival/finetune.json", "rival/finetune_head.json"):
        (home / path).parent.mkdir(exist_ok=True)
        (home / path).write_text("")
    small, whole = study.read_plan(home / "study.yaml"), study.read_plan(home / "table.yaml")
    assert set(small.methods) < set(whole.methods) and small.out == whole.out
    assert len(small.methods["stage 3"].checkpoints) == 2 and whole.shots == (1, 5) and whole.seeds == 2


def test_every_command_is_understood(module, written):
    home = written[1] / "chess"
    lines = [
        shlex.split(line) for line in (home / "run.sh").read_text().splitlines() if line.startswith(("./", '"$PY"'))
    ]
    stages = [line for line in lines if line[0].startswith("./")]
    assert len(stages) == 4 and all((Path(__file__).parents[2] / line[0]).is_file() for line in stages)
    for line in stages:
        rest, overrides = split_overrides(line[1:])
        run = config.load(rest[0], overrides).run
        assert run.dir.endswith(f"-{run.seed}")
    rivals = [module("rival").arguments(line[2:]) for line in lines if "scripts/bench/rival.py" in line]
    assert [(r.what, r.head_only) for r in rivals] == [("base", False), ("finetune", False), ("finetune", True)]
    assert rivals[0].images == 16 * 7 and rivals[1].shots == [1, 5] and rivals[1].epochs == [30, 60, 120]
    assert (home / "run.sh").stat().st_mode & 0o100


def test_a_root_without_the_sets_is_refused(real, tmp_path, capsys):
    (tmp_path / "chess/train/images").mkdir(parents=True)
    assert real.main([str(tmp_path), str(tmp_path / "out"), "--study", "chess"]) == 2
    told = capsys.readouterr().err
    assert "cards/train" in told and "chess/valid/images" in told and "chess/train/images" not in told
    assert not (tmp_path / "out").exists()
