# SPDX-License-Identifier: AGPL-3.0-or-later
"""Verbs hand what they were told to the layer below, and print what it returns."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from fsdet import config
from fsdet.bank import PrototypeBank
from fsdet.cli.main import main
from fsdet.data import sources, synthetic
from fsdet.data.shots import ShotFile
from fsdet.detect.scoring import Scoring
from fsdet.evaluation import summary
from fsdet.tasks import about, incident, inspect, protocol, use

SIZES = {"train": 6, "val": 4, "test": 4, "support": 60}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return synthetic.draw_demo(tmp_path_factory.mktemp("demo") / "set", processes=1, sizes=SIZES)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("best.pt").write_bytes(b"x")
    return "best.pt"


def results() -> dict:
    row = dict.fromkeys(("nAP50", "nAP", "bAP50", "bAP", "AP50", "HM50", "fp_per_image", "recall"), 0.5)
    return summary.results_json(
        setting="gfsod",
        metric="coco",
        checkpoint_sha256="ab" * 32,
        seeds=[0, 1],
        standard={"bAP50": 0.6, "bAP": 0.4},
        shots={5: [row, row]},
        ms_per_image=3.0,
    )


def test_eval_passes_its_flags_on_and_prints_the_table(checkpoint, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(
        protocol, "evaluate_checkpoint", lambda path, **flags: seen.update(flags, path=path) or results()
    )
    assert main(["eval", checkpoint, "--shots", "1,5", "--seeds", "2", "--setting", "fsod", "--json", "r.json",
                 "--split", "val", "--device", "cpu"]) == 0  # fmt: skip
    assert seen == {"path": Path(checkpoint), "data": None, "shots": [1, 5], "seeds": 2, "bank": None,
                    "json_out": Path("r.json"), "setting": "fsod", "metric": None, "split": "val",
                    "device": "cpu", "scoring": Scoring(), "shot_file": None}  # fmt: skip
    assert "nAP50" in capsys.readouterr().out
    assert main(["eval", checkpoint, "--scoring", "reduce=best,background=true"]) == 0
    assert seen["scoring"] == Scoring("best", background="subtract")


def test_eval_refuses_switches_and_classes_where_they_mean_nothing(checkpoint, capsys):
    Path("r.json").write_text(json.dumps(results()), encoding="utf-8")
    for argv, told in (
        ([checkpoint, "--scoring", "reduse=best"], "Did you mean 'reduce'"),
        (["--table", "r.json", "--scoring", "reduce=best"], "expected CHECKPOINT beside --scoring"),
        (["--study", "s.yaml", "--per-class"], "expected CHECKPOINT or --table beside --per-class"),
        (["--table", "r.json", "--per-class"], "expected AP50 by class, got none"),
        (
            ["--table", "r.json", "--json", "t.json", "--split", "val", "--device", "cpu"],
            "expected CHECKPOINT beside --split, --json, --device, got --table",
        ),
        (
            ["--study", "s.yaml", "--shots", "1", "--bank", "b.bank"],
            "expected CHECKPOINT beside --shots, --bank, got --study",
        ),
        ([checkpoint, "--bank", "b.bank", "--seeds", "4"], "expected neither --shots nor --seeds beside --bank"),
    ):
        assert main(["eval", *argv]) == 2 and told in capsys.readouterr().err


def test_eval_table_by_class(checkpoint, capsys):
    by_class = {"5": {"king": {"mean": 0.5, "ci95": 0.01, "values": [0.49, 0.51]}}}
    Path("r.json").write_text(json.dumps({**results(), "per_class": by_class, "novel": ["king"]}), encoding="utf-8")
    assert main(["eval", "--table", "r.json", "--per-class"]) == 0
    assert "| king | 50.0 ± 1.0 |" in capsys.readouterr().out


def test_eval_table_puts_finished_results_side_by_side_by_run(checkpoint, capsys):
    for run in ("stage2", "stage3"):
        Path(run).mkdir()
        Path(run, "results.json").write_text(json.dumps(results()), encoding="utf-8")
    assert main(["eval", "--table", "stage2/results.json", "stage3/results.json"]) == 0
    shown = capsys.readouterr().out
    assert "| stage2" in shown and "| stage3" in shown


def test_register_predict_probe_check_and_info_print_what_they_are_told(checkpoint, monkeypatch, capsys):
    Path("support").mkdir()
    Path("c.yaml").write_text("run: {seed: 4}", encoding="utf-8")
    bank = PrototypeBank(("cup", "fork"), (torch.ones(1, 4) / 2, torch.ones(2, 4) / 2), "ab" * 32)
    monkeypatch.setattr(use, "registered", lambda checkpoint, support, device, into, views: bank)
    monkeypatch.setattr(use, "predict", lambda checkpoint, **flags: f"{flags['conf']} of {flags['support']}")
    monkeypatch.setattr(inspect, "probe", lambda settings: f"probed {settings.run.seed}")
    monkeypatch.setattr(inspect, "check", lambda settings: f"checked {settings.run.seed}")
    monkeypatch.setattr(about, "about_checkpoint", lambda path, asked: f"about {path}, {asked.budget} M")
    monkeypatch.setattr(incident, "replay", lambda folder, run, settings: f"{folder} of seed {settings.run.seed}")
    Path("run/incidents/step_4").mkdir(parents=True)
    Path("run/incidents/step_4/batch.pt").write_bytes(b"")
    Path("run/config.yaml").write_text("run: {seed: 8}", encoding="utf-8")
    assert main(["register", checkpoint, "--support", "support", "--out", "my.bank"]) == 0
    shown = capsys.readouterr().out
    assert "my.bank: 2 classes: cup, fork" in shown and "fork: 2 instances" in shown and "threshold none" in shown
    assert main(["predict", checkpoint, "--support", "support", "--source", ".", "--out", "o", "--conf", "0"]) == 0
    assert capsys.readouterr().out == "0.0 of support\n"
    for argv, told in (
        (["probe", "c.yaml", "run.seed=6"], "probed 6"),
        (["probe", "--incident", "run/incidents/step_4"], "run/incidents/step_4 of seed 8"),
        (["check", "c.yaml"], "checked 4"),
        (["info", checkpoint], "about best.pt, 50 M"),
    ):
        assert main(argv) == 0 and capsys.readouterr().out == told + "\n"


def test_info_of_a_config_counts_parameters_for_its_classes_or_says_that_it_assumes_some(demo, checkpoint, capsys):
    Path("c.yaml").write_text("model: {embed_dim: 16}", encoding="utf-8")
    counts = []
    for overrides in ([f"data.path={demo}"], [f"data.path={demo}", "stage.name=finetune"], ["data.path=gone.yaml"]):
        assert main(["info", "c.yaml", *overrides]) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
        rows = [line for line in told[1:] if re.match(r"#   \w+ +[\d.]+ M", line)]
        parts = [float(line.split()[2]) for line in rows]
        assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.02) and "of 50 M" in rows[-1]
        assert "GFLOPs an image at 640 px" in told[len(parts) + 1] and "a training step of 16 images" in told[-2]
        counts.append(told[0])
    assert counts[0] == f"# yolov8n, 80 classes ({demo}), 640 px" and "96 classes" in counts[1]
    assert counts[2] == "# yolov8n, 80 classes (assumed: there is no 'gone.yaml'), 640 px"


def test_info_of_a_config_prints_every_key_resolved(checkpoint, capsys):
    Path("c.yaml").write_text("optim: {steps: 9}", encoding="utf-8")
    assert main(["info", "c.yaml", "run.seed=7"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert config.load("printed.yaml") == config.load("c.yaml", ["run.seed=7"])


def test_bank_lists_merges_and_removes(checkpoint, capsys):
    rows = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    one = PrototypeBank(("cup", "fork"), (rows[:1], rows[1:]), "ab" * 32)
    one.proposed({"cup": (0.375, "1 copies of its shot")}).save(Path("a.bank"))
    PrototypeBank(("fork", "pen"), (rows[:2], rows[2:]), "ab" * 32).save(Path("b.bank"))
    assert main(["bank", "merge", "a.bank", "b.bank", "--out", "c.bank"]) == 0
    told = capsys.readouterr().out
    assert (
        "fork: 3 instances" in told and "b.bank: 1 of its shots is in the banks before it and kept once: fork 1" in told
    )
    assert main(["bank", "remove", "c.bank", "fork"]) == 0
    assert PrototypeBank.load(Path("c.bank")).names == ("cup", "pen")
    capsys.readouterr()
    assert main(["bank", "list", "c.bank"]) == 0
    shown = capsys.readouterr().out
    assert "2 classes" in shown and "cup: 1 instance, 0 of what is beside them; threshold 0.375 (1 copies" in shown
    assert main(["bank", "remove", "c.bank", "pne"]) == 2 and "Did you mean 'pen'?" in capsys.readouterr().err
    assert main(["bank", "remove", "c.bank", "cup", "pen", "cup"]) == 2, "a bank of nothing finds nothing, unsaid"
    assert "expected a class that stays, got all 2 of them" in capsys.readouterr().err
    assert main(["bank", "remove", "c.bank", "pen", "pen"]) == 0
    assert PrototypeBank.load(Path("c.bank")).names == ("cup",)


def test_a_merge_tells_of_a_shot_of_two_classes(tmp_path, monkeypatch, capsys):
    """By its mark, or in a bank without marks by its row; what one bank holds twice was told when it was registered."""
    monkeypatch.chdir(tmp_path)
    rows = torch.eye(8)
    known = {"sources": (("1.png", "2.png"),), "marks": (("a", "b"),)}
    PrototypeBank(("mug",), (rows[:2],), "ab" * 32, **known).save(Path("a.bank"))
    known = {"sources": (("0.png", "cup.png"), ("cup.png",)), "marks": (("c", "a"), ("a",))}
    PrototypeBank(("pen", "mug"), (rows[2:4], rows[3:4]), "ab" * 32, **known).save(Path("b.bank"))
    PrototypeBank(("tin", "can"), (rows[1:3], rows[1:2]), "ab" * 32).save(Path("c.bank"))
    assert main(["bank", "merge", "a.bank", "b.bank", "--out", "d.bank"]) == 0
    told = capsys.readouterr().out
    shared = (
        "b.bank: the same image and box as in another class of the banks before it: 'pen': cup.png is 1.png of 'mug'"
    )
    assert f"{shared}; the two will be taken for each other\n  next: `" in told and "d.bank CLASS SHOT` in" in told
    assert main(["bank", "merge", "d.bank", "b.bank", "--out", "e.bank"]) == 0
    assert "another class" not in capsys.readouterr().out, "what is in the bank has been told"
    assert main(["bank", "merge", "a.bank", "c.bank", "--out", "f.bank"]) == 0
    assert "before it: 'tin': a shot is 2.png of 'mug', 'can': a shot is 2.png of 'mug'; " in capsys.readouterr().out


def test_banks_that_do_not_go_together_are_refused_before_anything_is_told_of_their_shots(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, sha, views in (("a.bank", "ab" * 32, 6), ("b.bank", "cd" * 32, 6), ("c.bank", "ab" * 32, 1)):
        PrototypeBank(("cup",), (torch.eye(8)[:1],), sha, views=views).save(Path(name))
    for other, told in (
        ("b.bank", "a bank made by these weights"),
        ("c.bank", "shots of 6 views each, got a bank of 1"),
    ):
        assert main(["bank", "merge", "a.bank", other, "--out", "d.bank"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and f"{other}: expected {told}" in err


TWICE = (["predict", "best.pt", "--source", "a", "--source", "b", "--out", "o"],
         ["register", "best.pt", "--support", "a", "--out", "o", "--support", "b"])  # fmt: skip


@pytest.mark.parametrize("argv", TWICE, ids=lambda argv: argv[0])
def test_what_is_named_twice_is_refused_and_not_dropped(argv, capsys):
    assert main(argv) == 2 and "got a and b" in capsys.readouterr().err


def test_data_check_accepts_the_demo_and_refuses_a_damaged_one(demo, tmp_path, capsys):
    assert main(["data", "check", str(demo), "--shots", "1"]) == 0
    assert "errors: 0" in capsys.readouterr().out
    assert main(["data", "convert", str(demo), str(tmp_path / "yolo"), "--to", "yolo"]) == 0
    capsys.readouterr()
    picture = next((tmp_path / "yolo/images/val").iterdir())
    picture.write_bytes(picture.read_bytes()[:2000])
    assert main(["data", "check", str(tmp_path / "yolo/data.yaml"), "--deep", "--shots", "1"]) == 2
    assert picture.name in capsys.readouterr().out


def test_data_convert_and_shots_write_what_load_reads(demo, tmp_path, capsys):
    assert main(["data", "convert", str(demo), str(tmp_path / "voc"), "--to", "voc"]) == 0
    there, here = sources.load(demo), sources.load(tmp_path / "voc/data.yaml")
    assert here.names == there.names
    for split in there.splits:
        assert [len(r.boxes) for r in here.split(split)] == [len(r.boxes) for r in there.split(split)]
    assert main(["data", "shots", str(demo), "--shots", "1,2", "--seed", "3", "--out", str(tmp_path / "s.json")]) == 0
    drawn = ShotFile.load(tmp_path / "s.json")
    assert (drawn.ks, drawn.seed, len(drawn.classes)) == ((1, 2), 3, len(there.novel))


def test_data_shots_draws_a_file_a_seed_and_both_ways_of_numbers_mean_the_same(demo, tmp_path, capsys):
    told = ["data", "shots", str(demo), "--out"]
    assert main([*told, str(tmp_path / "all"), "--k", "1", "2", "--seeds", "2", "--unit", "image"]) == 0
    assert "seed1.json: 1, 2 shots (image) of 16 classes, seed 1" in capsys.readouterr().out
    files = [ShotFile.load(tmp_path / f"all/seed{seed}.json") for seed in (0, 1)]
    assert [(f.unit, f.ks, f.seed) for f in files] == [("image", (1, 2), 0), ("image", (1, 2), 1)]
    assert len(list((tmp_path / "all").iterdir())) == 2 and files[0].lists != files[1].lists
    for numbers in (["--k", "2", "1"], ["--k", "1,2"], ["--shots", "1,2"]):
        assert main([*told, str(tmp_path / "one.json"), *numbers, "--seed", "1"]) == 0
        one = ShotFile.load(tmp_path / "one.json")
        assert (one.unit, one.ks, one.lists) == ("instance", (1, 2), files[1].lists)


def test_data_shots_refuses_an_out_of_the_other_kind_and_two_words_for_one_thing(demo, tmp_path, capsys):
    told = ["data", "shots", str(demo), "--out"]
    (tmp_path / "file").write_text("mine")
    for words, answer in (
        ([str(tmp_path / "file"), "--seeds", "2"], "expected a folder, for --seeds, got a file"),
        ([str(tmp_path), "--seed", "2"], "expected a file, for one draw, got a folder"),
        (["x", "--k", "1", "--shots", "1"], "not allowed with argument"),
        (["x", "--seed", "1", "--seeds", "1"], "not allowed with argument"),
        (["x", "--k", "1", "x"], "expected numbers such as 1,3,5, got 'x'"),
        (["x", "--unit", "images"], "invalid choice: 'images'"),
    ):
        assert main([*told, *words]) == 2 and answer in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_data_demo_draws_into_the_folder_it_is_given(tmp_path, monkeypatch, capsys):
    seen = []

    def draw(out, seed, progress):
        progress(3, 3)
        seen.append((out, seed))
        return out / "data.yaml"

    monkeypatch.setattr(synthetic, "draw_demo", draw)
    assert main(["data", "demo", str(tmp_path / "d"), "--seed", "2"]) == 0
    assert seen == [(tmp_path / "d", 2)] and capsys.readouterr().out.strip() == str(tmp_path / "d/data.yaml")


def test_eval_takes_a_shot_file_as_its_one_draw(checkpoint, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(protocol, "evaluate_checkpoint", lambda path, **flags: seen.update(flags) or results())
    assert main(["eval", checkpoint, "--shot-file", "s.json"]) == 2 and "a shot file" in capsys.readouterr().err
    Path("s.json").write_text("{}")
    for more in (["--seeds", "2"], ["--bank", "x.bank"]):
        assert main(["eval", checkpoint, "--shot-file", "s.json", *more]) == 2
        assert "it is one draw" in capsys.readouterr().err
    assert not seen and main(["eval", checkpoint, "--shot-file", "s.json", "--shots", "5"]) == 0
    assert seen["shot_file"] == Path("s.json") and seen["shots"] == [5] and seen["seeds"] is None


def test_bank_renames_drops_and_tells_outliers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    alike = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1 * k, 0, 0] for k in range(4)]), dim=-1)
    far = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    PrototypeBank(("my cup", "fork"), (torch.cat((alike[:2], far, alike[2:])), alike[:2]), "ab" * 32).save(
        Path("a.bank")
    )
    assert main(["bank", "outliers", "a.bank"]) == 0
    told = capsys.readouterr().out
    assert "my cup: shot 3 is far from the others" in told and "fewer than three shots tell nothing: fork" in told
    assert "bank drop a.bank 'my cup' 3" in told
    assert (
        main(["bank", "drop", "a.bank", "my cup", "3"]) == 0
        and main(["bank", "rename", "a.bank", "fork", "spoon"]) == 0
    )
    left = PrototypeBank.load(Path("a.bank"))
    assert left.names == ("my cup", "spoon") and torch.equal(left.instances[0], alike)
    capsys.readouterr()
    assert main(["bank", "outliers", "a.bank"]) == 0 and "no shot is far" in capsys.readouterr().out
    before = Path("a.bank").read_bytes()
    assert main(["bank", "drop", "a.bank", "my cup", "9"]) == 2 and "shots 1 to 4" in capsys.readouterr().err
    assert main(["bank", "drop", "a.bank", "my cup", "1", "--out", "b.bank"]) == 0
    assert Path("a.bank").read_bytes() == before and len(PrototypeBank.load(Path("b.bank")).instances[0]) == 3


def test_a_class_that_starts_with_a_dash_is_changed_as_outliers_and_the_help_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0, 0, 1], [1, 0.2, 0]]), dim=-1)
    PrototypeBank(("-tri", "pen"), (rows, rows[:1]), "ab" * 32).save(Path("a.bank"))
    assert main(["bank", "outliers", "a.bank"]) == 0
    [line] = [text for text in capsys.readouterr().out.splitlines() if "next, if" in text]
    assert main(shlex.split(line.partition("-m fsdet ")[2])) == 0
    assert len(PrototypeBank.load(Path("a.bank")).instances[0]) == 3
    assert main(["bank", "rename", "a.bank", "--out", "b.bank", "--", "-tri", "tri"]) == 0
    assert PrototypeBank.load(Path("b.bank")).names == ("tri", "pen")


def test_what_bank_writes_replaces_no_other_bank_without_the_word_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = torch.eye(8)
    PrototypeBank(("cup", "pen"), (rows[:2], rows[2:3]), "ab" * 32).save(Path("a.bank"))
    many = tuple(f"c{i}" for i in range(8))
    PrototypeBank(many, tuple(rows[i : i + 1] for i in range(8)), "ab" * 32).save(Path("b.bank"))
    before = {path: path.read_bytes() for path in Path().iterdir()}
    held = "b.bank: expected no bank yet, got a bank of 8 classes, 8 shots (c0 1, c1 1, c2 1, c3 1, c4 1, c5 1, 2 more)"
    for words in (["merge", "a.bank", "b.bank"], ["remove", "a.bank", "cup"], ["rename", "a.bank", "cup", "mug"],
                  ["drop", "a.bank", "cup", "1"]):  # fmt: skip
        assert main(["bank", *words, "--out", "b.bank"]) == 2 and held in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path().iterdir()} == before
    assert main(["bank", "rename", "a.bank", "cup", "mug", "--out", "./a.bank"]) == 0, "the bank itself"
    assert main(["bank", "remove", "a.bank", "pen", "--replace"]) == 2
    assert "expected --out beside --replace" in capsys.readouterr().err
    assert main(["bank", "drop", "a.bank", "mug", "1", "--out", "b.bank", "--replace"]) == 0
    assert PrototypeBank.load(Path("b.bank")).names == ("mug", "pen")
