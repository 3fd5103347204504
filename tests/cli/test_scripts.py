# SPDX-License-Identifier: AGPL-3.0-or-later
"""scripts/train.py turns flags into keys; scripts/run_stage.py brings a stage about from whatever is missing."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsdet import config
from fsdet.data import sources
from fsdet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO_2, DEMO_3 = (ROOT / f"configs/demo/stage_{n}.yaml" for n in (2, 3))


@pytest.fixture(scope="module")
def scripts():
    """(train, run_stage) as modules."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("train"), importlib.import_module("run_stage")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def flags(scripts):
    """The configuration that flags make of the demo's stage 2 (or another stage)."""

    def resolve(line: str, stage: int = 2):
        request = scripts[0].translate(line.split(), stage)
        return config.load(ROOT / f"configs/demo/stage_{request.stage}.yaml", request.overrides), request

    return resolve


def test_the_command_of_the_documents_means_what_its_users_mean(flags):
    got, request = flags(
        "--stage 2 --epochs 100 --batch_size 32 --n_way 4 --n_query 4 --lr 1e-4 --gradient_clip_norm 10.0 "
        "--dfl_weight 0.75 --warmup_epochs 3 --checkpoint checkpoints/stage1/best.pt"
    )
    assert (got.optim.epochs, got.optim.lr, got.optim.clip_norm, got.optim.warmup_epochs) == (100, 1e-4, 10, 3)
    assert (got.episode.ways, got.episode.queries) == (4, 16), "queries per episode = n_way x n_query"
    assert (got.loss.weights.dfl, got.stage.init_from) == (0.75, "checkpoints/stage1/best.pt")
    assert [note for note in request.notes if "--batch_size" in note]


def test_a_rate_below_the_lowest_of_the_configuration_takes_it_along_and_says_so(flags):
    lowest = config.load(DEMO_2).optim.min_lr
    got, request = flags(f"--lr {lowest / 2}")
    assert (got.optim.lr, got.optim.min_lr) == (lowest / 2, pytest.approx(lowest / 200))
    assert "lowered" in request.notes[0]
    got, request = flags(f"--lr {2 * lowest}")
    assert got.optim.min_lr == lowest and not any("lowered" in note for note in request.notes)


def test_a_rate_that_leaves_muons_kernels_alone_says_so(flags):
    assert config.load(DEMO_2).optim.name == "muon"
    assert any("kernels keep optim.muon_lr=0.015" in note for note in flags("--lr 1e-4")[1].notes)
    for line in ("--lr 1e-4 optim.name=adamw", "--n_way 4"):
        assert not any("Muon" in note for note in flags(line)[1].notes)


ALL = {
    "--bbox_weight 1.5": ("loss.weights.bbox", 1.5),
    "--cls_weight 1.5": ("loss.weights.cls", 1.5),
    "--supcon_weight 1.5": ("loss.weights.supcon", 1.5),
    "--cpe_weight 1.5": ("loss.weights.cpe", 1.5),
    "--triplet_weight 1.5": ("loss.weights.triplet", 1.5),
    "--use_triplet": ("loss.weights.triplet", 0.2),
    "--use_triplet --triplet_weight 0": ("loss.weights.triplet", 0.0),
    "--weight_decay 5e-3": ("optim.weight_decay", 5e-3),
    "--gradient_accumulation 4": ("optim.accumulate", 4),
    "--head-lr-multiplier 5": ("optim.lr_scale", {"head": 5.0}),
    "--head_lr_multiplier=5": ("optim.lr_scale", {"head": 5.0}),
    "--save_dir x/y": ("run.dir", "x/y"),
    "--checkpoint_dir x/y": ("run.dir", "x/y"),
    "--mixed_precision": ("run.precision", "auto"),
    "--device cuda:1": ("run.device", "cuda:1"),
    "--num_workers 3": ("data.workers", 3),
    "--n_episodes 200": ("episode.per_epoch", 200),
    "--n_shot 5": ("episode.shots", 5),
    "--use_wandb": ("log.wandb.mode", "auto"),
    "--wandb_project p": ("log.wandb.project", "p"),
    "--wandb_entity e": ("log.wandb.entity", "e"),
    "--wandb_name n": ("log.wandb.name", "n"),
    "--debug": ("log.debug", True),
    "--batch_size 8": ("episode.queries", 8),
    "--lr 1e-4 optim.lr=2e-4": ("optim.lr", 2e-4),
}


@pytest.mark.parametrize(("line", "wanted"), ALL.items(), ids=list(ALL))
def test_each_flag_sets_its_key(line, wanted, flags):
    got, _ = flags(line)
    for name in wanted[0].split("."):
        got = getattr(got, name)
    assert got == wanted[1]


@pytest.mark.parametrize("flag", ["--save_interval 5", "--triplet_ratio 0.5", "--triplet_batch_size 8"])
def test_a_flag_without_meaning_here_is_accepted_and_says_so(flag, flags):
    got, request = flags(flag)
    assert got == config.load(DEMO_2) and f"{flag.split()[0].replace('_', '-')} has no effect" in request.notes[0]


def test_the_batch_size_counts_images_in_stages_1_and_3(flags):
    assert [flags("--batch_size 6", stage)[0].episode.queries for stage in (1, 3)] == [6, 6]


def test_slips_in_flags_are_told(scripts, flags, capsys):
    with pytest.raises(UserError, match="expected --n_way beside --n_query"):
        flags("--n_query 4")
    with pytest.raises(UserError, match="expected a data YAML or folder, got nothing there"):
        flags("--data_root no/where")
    assert scripts[0].guarded(lambda: flags("--lrr 3")) == 2
    assert "Did you mean '--lr'?" in capsys.readouterr().err
    assert scripts[0].guarded(lambda: scripts[0].train([])) == 2
    assert "expected --stage 1, 2 or 3" in capsys.readouterr().err


def yolo_folder(folder: Path, count: int) -> Path:
    """A folder as these users have it: images/ and labels/ with two classes, and a data.yaml that names them."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((40, 50, 3), 9 * i, np.uint8)).save(folder / f"images/{i}.png")
        (folder / f"labels/{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.4 0.4\n")
    (folder / "data.yaml").write_text("train: images\nnames: [cup, fork]\n")
    return folder


def test_two_roots_become_one_data_set(scripts, tmp_path):
    roots = yolo_folder(tmp_path / "d/train", 3), yolo_folder(tmp_path / "d/val", 2)
    data = sources.load(scripts[0].data_path(*roots))
    assert {split: len(data.split(split)) for split in data.splits} == {"train": 3, "val": 2}
    assert data.names == ("cup", "fork")
    for root in roots:
        (root / "data.yaml").unlink()
    (tmp_path / "d/data.yaml").write_text("train: train\nnames: [cup, fork]\nbase: [fork]\nnovel: [cup]\n")
    data = sources.load(scripts[0].data_path(*roots))
    assert (data.base, data.novel) == (("fork",), ("cup",)), "class lists one folder up are found"
    ours = tmp_path / "d/train+val.yaml"
    ours.write_text("train: mine\n")
    with pytest.raises(UserError, match="expected a file that this script wrote, or none"):
        scripts[0].data_path(*roots)
    assert ours.read_text() == "train: mine\n"
    assert scripts[0].data_path(roots[0], None) == scripts[0].data_path(roots[0], roots[0]) == roots[0]


def draw(**changes):
    """The demo's data.yaml; a key of `changes` that is None is left out."""
    keys = {split: f"{split}.json" for split in ("train", "val", "test", "support")}
    keys |= {"base": ["cup"], "novel": ["mug"], **changes}
    Path("datasets/demo").mkdir(parents=True)
    Path("datasets/demo/data.yaml").write_text(json.dumps({k: v for k, v in keys.items() if v is not None}))


class World:
    """Stands in for `fsdet`: notes every command and leaves the files that it would leave."""

    def __init__(self, scripts, monkeypatch):
        self.commands: list[list[str]] = []
        monkeypatch.setattr(scripts[0], "fsdet", self)
        monkeypatch.setattr(scripts[1], "fsdet", self)
        scripts[1].times.clear()
        self.code = 0

    def __call__(self, argv):
        self.commands.append(argv)
        if argv[0] == "data":
            draw()
        if argv[0] == "train" and not self.code:
            settings = config.load(argv[1], [word for word in argv[2:] if "=" in word])
            leave(settings, finished=True)
        if argv[0] == "eval" and "--json" in argv:
            Path(argv[argv.index("--json") + 1]).write_text(json.dumps(RESULTS))
        return self.code

    def verbs(self):
        return [" ".join(command[:2]) if command[0] == "data" else command[0] for command in self.commands]


ASKED = config.load(DEMO_2).eval
RESULTS = {"setting": "gfsod", "metric": "coco", "tta": False, "checkpoint_sha256": "ab", "split": "test",
           "seeds": list(range(ASKED.seeds)), "standard": {}, "shots": {str(k): {} for k in ASKED.shots},
           "ms_per_image": 1.0}  # fmt: skip


def leave(settings, finished):
    folder = Path(settings.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.dump(settings))
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "finished": finished, "files": {}}))
    for name in ("last.pt", "best.pt"):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (1e9, 1e9))


@pytest.fixture
def world(scripts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return World(scripts, monkeypatch)


@pytest.fixture
def stage(scripts, world):
    return lambda *argv: scripts[0].guarded(lambda: scripts[1].main(list(argv)))


def test_from_nothing_stage_2_draws_data_trains_stage_1_then_2_and_evaluates(stage, world, capsys):
    both, own = ["model.embed_dim=64", "run.seed=1"], ["optim.epochs=1"]
    assert stage("2", *both, *own) == 0
    assert world.verbs() == ["data demo", "train", "train", "eval"]
    first, second = world.commands[1:3]
    assert first[1].endswith("demo/stage_1.yaml") and first[2:] == both
    assert second[1].endswith("demo/stage_2.yaml") and second[2:] == both + own
    assert "--resume" not in first + second
    told = capsys.readouterr().out
    for part in ("demo data", "train stage 1", "train stage 2", "evaluation of stage2", "scripts/train_stage_3.sh"):
        assert part in told


def test_a_stopped_run_is_resumed_and_a_finished_one_only_prints_its_table(stage, world):
    leave(config.load(DEMO_2), finished=False)
    draw()
    assert stage("2") == 0
    assert world.verbs() == ["train", "eval"] and "--resume" in world.commands[0]
    world.commands.clear()
    assert stage("2", "run.threads=1", "log.every=3") == 0
    assert world.commands == [["eval", "--table", "checkpoints/stage2/results.json"]]


def test_a_stopped_stage_before_is_brought_to_its_end_first(stage, world, capsys):
    """Its best.pt is there, of a training half done; the user may name it, and then it is taken as it is."""
    draw()
    leave(config.load(DEMO_2.with_name("stage_1.yaml")), finished=False)
    assert stage("2", "stage.init_from=checkpoints/stage1/best.pt", "run.dir=checkpoints/early") == 0
    assert world.verbs() == ["train", "eval"]
    world.commands.clear()
    capsys.readouterr()
    assert stage("2") == 0
    assert world.verbs() == ["train", "train", "eval"]
    first, second = world.commands[:2]
    assert first[1].endswith("demo/stage_1.yaml") and "--resume" in first
    assert second[1].endswith("demo/stage_2.yaml") and "--resume" not in second
    assert "checkpoints/stage1 was stopped before its end: training stage 1 first" in capsys.readouterr().out


def test_a_stopped_stage_before_of_own_data_is_brought_to_its_end_first(stage, world):
    """The script itself names that one, which is not the user's doing."""
    assert stage("1") == 0
    Path("datasets/demo").rename("mine")
    own = ["data.path=mine/data.yaml", "run.dir=checkpoints/mine"]
    leave(config.load(DEMO_2.with_name("stage_1.yaml"), [own[0], "run.dir=checkpoints/mine-stage1"]), finished=False)
    world.commands.clear()
    assert stage("2", *own) == 0
    assert world.verbs() == ["train", "train", "eval"]
    assert "--resume" in world.commands[0] and "run.dir=checkpoints/mine-stage1" in world.commands[0]


def test_a_checkpoint_without_its_run_is_taken_as_it_is(stage, world):
    draw()
    Path("checkpoints/stage1").mkdir(parents=True)
    Path("checkpoints/stage1/best.pt").write_bytes(b"")
    assert stage("2") == 0
    assert world.verbs() == ["train", "eval"]


def test_a_run_folder_to_start_from_stands_for_its_best_checkpoint(stage, world, capsys):
    """Where the run is missing, was stopped, has ended, or was of other data, as with best.pt itself."""
    draw()
    Path("own").mkdir()
    one, two = (Path(f"own/stage_{number}.yaml") for number in (1, 2))
    for path in (one, two):
        path.write_text(f"extends: {DEMO_2.with_name(path.name)}\n")
    two.write_text(f"{two.read_text()}stage: {{init_from: checkpoints/stage1}}\n")
    for name, trained in (("missing", 2), ("ended", 1), ("stopped", 2)):
        if name == "stopped":
            leave(config.load(one), finished=False)
        assert stage("2", str(two), f"run.dir=checkpoints/{name}") == 0
        assert world.verbs() == [*["train"] * trained, "eval"], name
        world.commands.clear()
    leave(config.load(one), finished=False)
    assert stage("2", "stage.init_from=checkpoints/stage1", "run.dir=checkpoints/named") == 0
    assert world.verbs() == ["train", "eval"], "taken as it is"
    Path("datasets/demo").rename("mine")
    capsys.readouterr()
    assert stage("2", str(two), "data.path=mine/data.yaml", "run.dir=checkpoints/mine") == 0
    told = capsys.readouterr().out
    assert "stage1/best.pt was trained on other data: this run starts from checkpoints/mine-stage1/best.pt" in told


@pytest.mark.parametrize("chosen", ["near", "far", "far_long"])
def test_a_finished_stage_3_is_itself_again_whatever_recipe_it_chose(chosen, stage, world, capsys):
    """What the run writes is its settings with the name of the recipe in place of auto: nothing else may differ."""
    leave(config.load(DEMO_3, [f"stage.recipe={chosen}"]), finished=True)
    draw()
    assert stage("3") == 0 and "train" not in world.verbs(), capsys.readouterr().err
    assert stage("3", "optim.steps=7") == 2 and "optim.steps 400 -> 7" in capsys.readouterr().err


def test_another_question_to_a_finished_run_is_evaluated_anew(stage, world):
    leave(config.load(DEMO_2), finished=True)
    Path("checkpoints/stage2/results.json").write_text(json.dumps(RESULTS))
    assert stage("2", "eval.shots=[2]") == 0
    assert world.commands[0][:4] == ["eval", "checkpoints/stage2/best.pt", "--shots", "2"]


def test_the_split_and_the_device_of_the_configuration_are_those_of_its_evaluation(stage, world):
    leave(config.load(DEMO_2), finished=True)
    Path("checkpoints/stage2/results.json").write_text(json.dumps(RESULTS))
    assert stage("2", "eval.split=val", "run.device=cpu") == 0
    asked = world.commands[0]
    assert asked[0] == "eval" and asked[asked.index("--split") + 1] == "val" and asked[-2:] == ["--device", "cpu"]


def test_a_finished_run_with_other_settings_is_not_passed_off_as_this_one(stage, world, capsys):
    leave(config.load(DEMO_2), finished=True)
    assert stage("2", "loss.weights.bbox=77") == 2
    told = capsys.readouterr().err
    before = config.load(DEMO_2).loss.weights.bbox
    assert f"loss.weights.bbox {before} -> 77.0" in told and "--exist-ok" in told and world.commands == []


def test_exist_ok_makes_a_finished_run_anew_with_everything_that_it_needs(stage, world):
    leave(config.load(DEMO_2), finished=True)
    assert stage("2", "optim.epochs=77", "--exist-ok") == 0
    assert world.verbs() == ["data demo", "train", "train", "eval"]
    assert "--exist-ok" in world.commands[2] and "--exist-ok" not in world.commands[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"novel": None}, "no novel classes"),
        ({"support": None}, "no split support"),
        ({"test": None}, "no split test"),
        ({"novel": None, "support": None, "test": None}, "no novel classes, no split support, no split test"),
    ],
)
def test_data_that_cannot_be_evaluated_are_said_before_training_and_trained_on(changes, told, stage, world, capsys):
    draw(**changes)
    assert stage("2") == 0
    assert world.verbs() == ["train", "train"]
    shown = capsys.readouterr().out
    said = f"evaluation will be skipped: datasets/demo/data.yaml has {told}\n"
    assert said in shown and shown.index(said) < shown.index("== train")


def supports(mugs: int) -> None:
    """datasets/demo/support.json with so many mugs, an image each, or one image without any."""
    boxes, images = range(mugs), range(max(1, mugs))
    for i in images:
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(f"datasets/demo/{i}.png")
    content = {"images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 40} for i in images],
               "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 20]} for i in boxes],
               "categories": [{"id": 1, "name": "mug"}]}  # fmt: skip
    Path("datasets/demo/support.json").write_text(json.dumps(content))


def test_shots_that_the_data_do_not_have_are_told_before_training_and_not_asked_for(stage, world, capsys):
    draw()
    supports(7)
    assert stage("2") == 0
    shown, evaluation = capsys.readouterr().out, world.commands[-1]
    told = "no figures at 10 shots: of support instances, class 'mug' has 7 (datasets/demo/data.yaml)\n"
    assert told in shown and shown.index(told) < shown.index("== train")
    assert evaluation[evaluation.index("--shots") + 1] == "1,3,5"
    assert "./scripts/train_stage_3.sh\n" in shown, "it has its five shots"
    Path("checkpoints/stage2/results.json").write_text(json.dumps({**RESULTS, "shots": {k: {} for k in "135"}}))
    world.commands.clear()
    assert stage("2") == 0
    assert world.commands == [["eval", "--table", "checkpoints/stage2/results.json"]], "it has what can be had"


def test_the_stage_after_is_asked_for_as_many_shots_as_there_are(stage, world, capsys):
    draw()
    supports(3)
    assert stage("2") == 0
    assert "  ./scripts/train_stage_3.sh episode.shots=3\n" in capsys.readouterr().out


def test_without_a_single_shot_the_training_is_all_there_is(stage, world, capsys):
    draw()
    supports(0)
    assert stage("2") == 0
    assert world.verbs() == ["train", "train"] and "no figures at 1, 3, 5, 10 shots" in capsys.readouterr().out


def test_how_a_run_logs_is_how_the_stage_before_it_logs(stage, world):
    draw()
    assert stage("2", "log.wandb.mode=disabled", "log.wandb.name=mine") == 0
    first, second = world.commands[:2]
    assert "log.wandb.mode=disabled" in first and "log.wandb.mode=disabled" in second
    assert "log.wandb.name=mine" in second and "log.wandb.name=mine" not in first, "two runs of one name"


def test_stage_1_asks_for_nothing_but_its_base_classes(stage, world, capsys):
    draw(novel=None, support=None, test=None)
    assert stage("1") == 0
    assert world.verbs() == ["train"] and "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "told"), [({"novel": None}, "no novel classes"), ({"support": None}, "no split")])
def test_stage_3_without_shots_is_refused_before_the_stages_before_it_are_trained(changes, told, stage, world, capsys):
    draw(**changes)
    assert stage("3") == 2
    assert f"expected novel classes and shots of them, got {told}" in capsys.readouterr().err and world.commands == []


def test_stage_3_takes_the_shots_of_a_file_without_a_split_support(stage, world):
    draw(support=None)
    leave(config.load(DEMO_2), finished=True)
    assert stage("3", "data.shots=shots.json") == 0
    assert world.verbs() == ["train", "eval"]


def test_a_failing_part_ends_the_script_with_its_code(stage, world):
    world.code = 143
    assert stage("1") == 143 and len(world.commands) == 1


def test_a_missing_checkpoint_that_no_shipped_stage_makes_is_told(stage, world, capsys):
    draw()
    assert stage("2", "--checkpoint", "mine.pt") == 2
    assert "stage.init_from=mine.pt: expected a checkpoint, got no such file" in capsys.readouterr().err


def test_a_configuration_of_another_stage_is_told(stage, world, capsys):
    assert stage("2", str(ROOT / "configs/demo/stage_3.yaml")) == 2
    assert "expected stage.name episodic, got finetune" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--data_root", "mine"], ["data.path=mine"]])
def test_without_config_both_scripts_take_the_demos_whatever_data_is_named(argv, scripts, stage, world):
    draw()
    Path("datasets/demo").rename("mine")
    assert stage("1", *argv) == 0
    assert scripts[0].train(["--stage", "1", *argv, "--exist-ok"]) == 0
    trained = [command for command in world.commands if command[0] == "train"]
    assert [Path(command[1]).resolve() for command in trained] == [ROOT / "configs/demo/stage_1.yaml"] * 2


def test_paths_mean_what_they_mean_where_the_user_stands(scripts, monkeypatch, tmp_path):
    """As if a shell script had come from `stood` to the checkout, here `root`."""
    root, stood = tmp_path / "root", tmp_path / "stood"
    for place, names in ((root, ["ours.yaml", "both.yaml"]), (stood, ["mine.yaml", "both.yaml"])):
        place.mkdir()
        for name in names:
            (place / name).write_text("")
    monkeypatch.chdir(root)
    monkeypatch.setenv("FSDET_STOOD", str(stood))

    def got(*argv):
        request = scripts[0].translate(argv, 2)
        return [str(request.config), request.resume, *request.overrides]

    assert got("mine.yaml", "data.path=both.yaml", "run.dir=new") == [
        f"{stood}/mine.yaml", None, f"data.path={stood}/both.yaml", f"run.dir={stood}/new"]  # fmt: skip
    assert got("ours.yaml", "--checkpoint", "a.pt", "--resume", "../stood/r") == [
        "ours.yaml", f"{tmp_path}/stood/r", f"stage.init_from={stood}/a.pt"]  # fmt: skip
    for argv in (["--data_root=mine.yaml"], ["--data-root", "mine.yaml"]):
        assert got("ours.yaml", *argv)[2:] == [f"data.path={stood}/mine.yaml"]
    assert got("ours.yaml", "run.dir=ours.yaml")[2:] == [f"run.dir={stood}/ours.yaml"]
    kept = ["stage.init_from=", "data.shots=null", "data.path=/whole", "model.backbone=both.yaml"]
    assert got("ours.yaml", *kept)[2:] == kept


def test_a_shell_script_tells_where_the_user_stands(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$PWD|$FSDET_STOOD|$*"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "FSDET_PYTHON": str(python)}
    for stood, told in ((tmp_path, str(tmp_path)), (ROOT, "")):
        done = subprocess.run([ROOT / "train_stage_2.sh", "data.path=x y", "--debug"], cwd=stood, env=environment,
                              capture_output=True, text=True, timeout=30)  # fmt: skip
        assert done.stdout == f"{ROOT}|{told}|{ROOT}/scripts/run_stage.py 2 data.path=x y --debug\n", done.stderr


def test_train_py_starts_from_scratch_without_a_checkpoint_and_says_so(scripts, world, capsys):
    assert scripts[0].train("--stage 2 --epochs 5 --n_way 2 --batch_size 16 --warmup_epochs 1".split()) == 0
    assert world.verbs() == ["data demo", "train"]
    settings = config.load(world.commands[1][1], world.commands[1][2:])
    assert (settings.stage.init_from, settings.episode.ways, settings.episode.queries) == (None, 2, 16)
    assert not settings.stage.freeze_norm, "norms without statistics have to learn them"
    assert "starting from scratch" in capsys.readouterr().out


def test_train_py_takes_a_run_folder_of_a_configuration_for_its_best_checkpoint(scripts, world, capsys):
    """One that has none yet is a checkpoint that is missing; one that is named by a flag is left to `fsdet train`."""
    Path("mine.yaml").write_text(f"extends: {DEMO_2}\nstage: {{init_from: checkpoints/before}}\n")
    before = Path("checkpoints/before")
    before.mkdir(parents=True)
    argv = ["--stage", "2", "mine.yaml"]
    for flags, wanted in ((["--checkpoint", str(before)], str(before)), ([], None)):
        assert scripts[0].train([*argv, *flags]) == 0
        assert config.load(world.commands[-1][1], world.commands[-1][2:]).stage.init_from == wanted
    assert "checkpoints/before/best.pt is missing and no --checkpoint is given" in capsys.readouterr().out
    (before / "best.pt").write_bytes(b"x")
    assert scripts[0].train(argv) == 0 and not any("init_from" in word for word in world.commands[-1])


def test_own_data_after_the_demo_get_a_stage_1_of_their_own(stage, world, capsys):
    """Not the demo's checkpoint, whose classes are others; the second start finds it finished."""
    assert stage("2") == 0
    Path("datasets/demo").rename("mine")
    draw()
    world.commands.clear()
    own = ["data.path=mine/data.yaml", "run.dir=checkpoints/mine"]
    assert stage("2", *own) == 0
    assert world.verbs() == ["train", "train", "eval"]
    first, second = world.commands[:2]
    assert first[1].endswith("demo/stage_1.yaml") and "run.dir=checkpoints/mine-stage1" in first
    assert "data.path=mine/data.yaml" in first
    assert second[-1] == "stage.init_from=checkpoints/mine-stage1/best.pt"
    assert "trained on other data" in capsys.readouterr().out
    world.commands.clear()
    assert stage("2", *own) == 0
    assert world.verbs() == ["eval"]
    world.commands.clear()
    assert (
        stage(
            "2", "data.path=mine/data.yaml", "run.dir=checkpoints/third", "stage.init_from=checkpoints/stage1/best.pt"
        )
        == 0
    )
    assert world.verbs()[0] == "train" and len(world.commands) == 2, "a checkpoint that is named is taken"


def test_the_next_command_is_that_of_this_run(stage, world, capsys):
    """Pasted, it goes on from this run's checkpoint, with its data and its configuration, into a folder beside."""
    own = Path("my files")
    own.mkdir()
    for n in (1, 2):
        (own / f"stage_{n}.yaml").write_text(f"extends: {ROOT}/configs/demo/stage_{n}.yaml\n")
    assert stage("1", str(own / "stage_1.yaml"), "run.dir=runs/one", "model.embed_dim=64", "optim.epochs=1") == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "./train_stage_2.sh" in line)
    assert shlex.split(told) == ["./train_stage_2.sh", "my files/stage_2.yaml", "model.embed_dim=64",
                                 "stage.init_from=runs/one/best.pt", "run.dir=runs/one-stage2"]  # fmt: skip
    assert stage("1") == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "./train_stage_2.sh" in line)
    assert shlex.split(told) == ["./train_stage_2.sh"], "the demo's own needs no word more"


def test_nproc_starts_training_under_torchrun_and_nothing_else(scripts, monkeypatch):
    started, module = [], scripts[0]

    class Running:
        def __init__(self, command, **options):
            started.append(command)

        def send_signal(self, number):
            started.append(number)

        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return 1

    monkeypatch.setattr(module.subprocess, "Popen", Running)
    monkeypatch.setattr(module, "alone", lambda words: started.append(words) or 0)
    assert module.fsdet(["train", "c.yaml"]) == 0
    monkeypatch.setenv("NPROC", "2")
    before = signal.getsignal(signal.SIGTERM)
    assert module.fsdet(["eval", "x"]) == 0 and module.fsdet(["train", "c.yaml"]) == 128 + signal.SIGTERM
    assert started[:2] == [["train", "c.yaml"], ["eval", "x"]] and started[3] == signal.SIGTERM
    assert started[2][-7:] == ["--standalone", "--nproc_per_node", "2", "-m", "fsdet", "train", "c.yaml"]
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setenv("NPROC", "two")
    with pytest.raises(UserError, match="NPROC: expected a number of processes, got 'two'"):
        module.fsdet(["train", "c.yaml"])
