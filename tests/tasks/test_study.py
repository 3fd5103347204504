# SPDX-License-Identifier: AGPL-3.0-or-later
"""A study: every cell once, the same draws for every method, merged values, and nothing made twice."""

import json
from pathlib import Path

import numpy as np
import pytest

from fsdet.cli.main import main
from fsdet.data.shots import draw_shots
from fsdet.errors import ConfigError, DataError, UserError
from fsdet.evaluation import summary
from fsdet.tasks import protocol, study

QUICK = ["run.threads=1", "data.workers=0", "data.image_size=96", "data.support_size=64", "episode.queries=2",
         "model.embed_dim=16", "model.refine=true", "model.objectness=true", "optim.steps=1",
         "optim.warmup_epochs=0"]  # fmt: skip


@pytest.fixture
def written(best, small_demo, tmp_path):
    """A study of registration (1 and 2 shots) and of one step of stage 3; its file."""
    tuned = tmp_path / "tune.yaml"
    tuned.write_text("stage: {name: finetune, freeze: [backbone, neck], freeze_norm: true}\n")
    plan = {"data": str(small_demo), "out": str(tmp_path / "out"), "shots": [1, 2], "seeds": 2,
            "methods": {"registration": {"checkpoints": [str(best)]},
                        "stage 3": {"checkpoints": [str(best)], "config": str(tuned), "overrides": QUICK}}}  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(plan))
    return path


@pytest.mark.slow
def test_a_study_makes_each_cell_once_and_its_table_from_their_values(written, capsys, monkeypatch):
    assert main(["eval", "--study", str(written), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    out = written.parent / "out"
    assert {p.name for p in out.iterdir()} >= {"registration.json", "stage_3.json", "table.md", "shots.png"}
    cells = sorted(p.parent.name for p in (out / "stage_3").rglob("results.json"))
    assert cells == ["1shot_seed0", "1shot_seed1", "2shot_seed0", "2shot_seed1"]
    merged = summary.read_results(out / "stage_3.json")
    one = [summary.read_results(out / f"stage_3/training0/2shot_seed{s}/results.json") for s in (0, 1)]
    values = [r["shots"]["2"]["bAP50"]["values"][0] for r in one]
    assert merged["shots"]["2"]["bAP50"]["values"] == values
    assert merged["shots"]["2"]["bAP50"]["mean"] == pytest.approx(np.mean(values))
    assert (out / "table.md").read_text().strip() in table

    def never(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(study, "evaluate_checkpoint", never)
    monkeypatch.setattr(study, "evaluate_scorings", never)
    assert main(["eval", "--study", str(written), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == table


def test_fine_tuning_takes_the_draw_that_registration_takes(written, best, small_demo):
    plan = study.read_plan(written)
    cells = study._cells(plan, "stage 3", plan.methods["stage 3"])
    run = study._fine_tuned(next(c for c in cells if c.shots == (2,) and c.seed == 1), plan, "cpu").parent
    from fsdet import config, tasks
    from fsdet.tasks.loading import load_trained

    task = tasks.build(config.load(run / "config.yaml"), resume=True).task
    data = tasks.read_data(config.load(run / "config.yaml"))
    drawn = draw_shots(data.split("support"), range(80, 96), [1, 2], 1, data.names)
    assert sorted(task.batches.shots) == sorted((c, *p) for c, picks in drawn.items() for p in picks[:2])
    assert load_trained(run / "best.pt").spec["shots"] == 2


@pytest.fixture
def registering(written, monkeypatch):
    """Call with keys of the plan: the study of registration alone; its merged results and the calls it made so far."""
    plan = json.loads(written.read_text())
    del plan["methods"]["stage 3"]
    calls = []
    real = study.evaluate_scorings
    monkeypatch.setattr(study, "evaluate_scorings", lambda *a, **k: calls.append(k) or real(*a, **k))

    def run(**changes):
        written.write_text(json.dumps({**plan, **changes}))
        study.run(written, "cpu")
        return summary.read_results(written.parent / "out/registration.json"), calls

    return run


@pytest.mark.slow
def test_more_draws_or_shots_are_made_and_fewer_are_taken_from_what_is_there(registering, written):
    two, _ = registering(shots=[1], seeds=2)
    cell = written.parent / "out/registration/training0/results.json"
    value = json.loads(cell.read_text())
    del value["asked"]  # as files were before
    cell.write_text(json.dumps(value))
    assert registering(shots=[1], seeds=3)[0]["seeds"] == [0, 1, 2]
    more, calls = registering(shots=[1, 2], seeds=3)
    assert len(calls) == 3 and more["seeds"] == [0, 1, 2] and set(more["shots"]) == {"1", "2"}
    assert len(more["shots"]["2"]["bAP50"]["values"]) == 3
    assert more["shots"]["1"]["nAP50"]["values"][:2] == two["shots"]["1"]["nAP50"]["values"]
    again, calls = registering(shots=[1], seeds=2)
    assert len(calls) == 3
    assert all(again[key] == two[key] for key in ("shots", "per_class", "seeds", "draws", "data"))


def test_other_settings_in_the_same_folder_are_refused(registering):
    registering(shots=[1], seeds=1)
    for change in ({"setting": "fsod"}, {"metric": "voc07"}, {"split": "val"}, {"setting": "fsod", "seeds": 3}):
        with pytest.raises(ConfigError, match="expected results of this study's settings"):
            registering(**{"shots": [1], "seeds": 1, **change})


def test_trainings_merge_with_their_draws_hashes_and_uneven_k():
    def one(sha, seeds, *ks):
        row = dict.fromkeys(summary.FIGURES, 0.5)
        draws = {str(k): {"unit": "instance", "sha256": {str(s): f"{k}-{s}" for s in seeds}} for k in ks}
        return summary.results_json(setting="gfsod", metric="coco", checkpoint_sha256=sha * 64, seeds=seeds,
                                    split="test", standard={"bAP50": 0.5, "bAP": 0.5}, ms_per_image=1.0, images=8,
                                    shots={k: [row] * len(seeds) for k in ks}, draws=draws)  # fmt: skip

    merged = study.merge([one("a", [0, 1], 1, 5), one("b", [0, 1], 1), one("c", [4], 5)])
    assert merged["seeds"] == [0, 1, 4] and merged["images"] == 8
    assert {k: len(v["nAP50"]["values"]) for k, v in merged["shots"].items()} == {"1": 4, "5": 3}
    assert merged["draws"]["5"]["sha256"] == {"0": "5-0", "1": "5-1", "4": "5-4"}
    text = summary.table([merged], ["ours"])
    assert f"checkpoint {'a' * 12}, {'b' * 12}, {'c' * 12}, seeds 0, 1, 4" in text
    with pytest.raises(DataError, match="one number of images"):
        study.merge([one("a", [0], 1), {**one("b", [0], 1), "images": 9}])


@pytest.mark.slow
def test_scorings_of_one_checkpoint_are_made_together_and_named(written, best, monkeypatch):
    plan = json.loads(written.read_text())
    one = {"checkpoints": [str(best)]}
    plan["methods"] = {"plain": one, "best": {**one, "scoring": {"reduce": "best"}}, "again": one,
                       "negatives": {**one, "scoring": {"background": True}}}  # fmt: skip
    written.write_text(json.dumps(plan))
    calls = []
    real = study.evaluate_scorings
    tag = {None: 0.1, "best": 0.2, "subtract": 0.3}  # a detector of two steps finds nothing under any scoring

    def tagged(checkpoint, scorings, **shared):
        calls.append(scorings)
        found = real(checkpoint, scorings, **shared)
        for results in found:
            value = tag[next(iter(results.get("scoring", {}).values()), None)]
            results["shots"]["1"]["nAP50"] |= {"mean": value, "values": [value, value]}
        return found

    monkeypatch.setattr(study, "evaluate_scorings", tagged)
    text = study.run(written, "cpu")
    assert [len(scorings) for scorings in calls] == [3] and "reduce best" in text and "background subtract" in text
    merged = {name: summary.read_results(written.parent / f"out/{name}.json") for name in plan["methods"]}
    assert merged["plain"]["shots"] == merged["again"]["shots"]
    means = {name: merged[name]["shots"]["1"]["nAP50"]["mean"] for name in merged}
    assert means == pytest.approx({"plain": 0.1, "best": 0.2, "again": 0.1, "negatives": 0.3}), "each from its own"
    assert "scoring" not in merged["plain"] and merged["best"]["scoring"] == {"reduce": "best"}
    assert len(merged["plain"]["shots"]["2"]["at_threshold"]["recall"]["values"]) == 2
    assert len(merged["plain"]["per_class"]["2"][merged["plain"]["novel"][0]]["values"]) == 2
    study.run(written, "cpu")
    assert len(calls) == 1
    plan["methods"]["best"]["scoring"] = {"reduce": "lse"}
    written.write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="expected results of this study's settings"):
        study.run(written, "cpu")


def test_every_problem_of_a_file_is_told_with_its_line(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("data: x\nout: y\nseed: 3\nmethods:\n  a: {checkpoints: [no.pt]}\n  b: {}\n")
    with pytest.raises(ConfigError) as told:
        study.read_plan(path)
    assert f"{path}:3: key 'seed'" in str(told.value) and "Did you mean 'seeds'" in str(told.value)
    for text, count in (("data: x\nseeds: 3\n", 2), ("{", 1)):  # keys that lack, and no YAML at all
        other = tmp_path / "other.yaml"
        other.write_text(text)
        with pytest.raises(ConfigError, match=rf"^{count} problems? in a study") as told:
            study.read_plan(other)
        assert "Did you mean" not in str(told.value)
    path.write_text(path.read_text().replace("seed: 3\n", ""))
    with pytest.raises(ConfigError) as told:
        study.read_plan(path)
    assert f"{path}:4: method 'a': expected a file, got nothing at 'no.pt'" in str(told.value)
    assert f"{path}:5: method 'b': expected either checkpoints or results" in str(told.value)
    path.write_text(path.read_text() + "  c:\n    results: [study.yaml]\n    scoring: {reduse: best}\n")
    with pytest.raises(ConfigError) as told:
        study.read_plan(path)
    assert f"{path}:6: method 'c': expected scoring where classes are registered" in str(told.value)
    assert f"{path}:8: method 'c': scoring: expected one of reduce" in str(told.value)


RESULTS = {"setting": "gfsod", "metric": "coco", "split": "test", "checkpoint_sha256": "", "seeds": [0], "tta": False,
           "standard": {"bAP50": 0.5, "bAP": 0.4}, "ms_per_image": 1.0,
           "shots": {"1": {"nAP50": {"mean": 0.25, "ci95": 0.0, "ci95_t": None, "values": [0.25]}}}}  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    """A study of two finished results under the names that are given; its file."""

    def write(*names):
        for i in range(len(names)):
            (tmp_path / f"r{i}.json").write_text(json.dumps({**RESULTS, "checkpoint_sha256": str(i) * 64}))
        methods = {name: {"results": [str(tmp_path / f"r{i}.json")]} for i, name in enumerate(names)}
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps({"data": "x", "out": str(tmp_path / "out"), "methods": methods}))
        return path

    return write


def test_names_that_differ_behind_a_dot_have_a_file_each(finished):
    path = finished("scale 0.5", "scale 0.25", "..")
    study.run(path, "cpu")
    out = path.parent / "out"
    wrote = {p.name: summary.read_results(p)["checkpoint_sha256"][0] for p in out.glob("*.json")}
    assert wrote == {"scale_0.5.json": "0", "scale_0.25.json": "1", "_..json": "2"}
    assert sorted(p.name for p in path.parent.iterdir()) == ["out", "r0.json", "r1.json", "r2.json", "study.yaml"]
    study.run(path, "cpu")  # its own files are written again


def test_names_of_one_file_are_refused(finished):
    with pytest.raises(ConfigError, match=r"method 'A_b': expected names that differ .* got one beside 'a b'"):
        study.read_plan(finished("a b", "A_b"))


@pytest.mark.parametrize("name", ["one.json", "table.md", "shots.png"])
def test_a_file_of_the_users_own_stays(finished, name):
    path = finished("one")
    (path.parent / "out").mkdir()
    mine = path.parent / "out" / name
    mine.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="another file"):
        study.run(path, "cpu")
    assert mine.read_text() == '{"mine": 1}' and [p.name for p in mine.parent.iterdir()] == [name]


def test_overrides_without_a_config_to_change_are_refused(finished):
    path = finished("one")
    plan = json.loads(path.read_text())
    plan["methods"]["one"]["overrides"] = ["optim.steps=5"]
    path.write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="method 'one': expected overrides beside config"):
        study.read_plan(path)


@pytest.mark.slow
def test_results_of_two_settings_are_not_merged(best, small_demo):
    rows = [protocol.evaluate_checkpoint(best, shots=[1], seeds=1, setting=s) for s in ("gfsod", "fsod")]
    with pytest.raises(ConfigError, match="results of one setting"):
        study.merge(rows)


def test_the_shipped_study_is_well_formed(monkeypatch, tmp_path):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints/stage2/best.pt", "configs/demo/stage_3.yaml"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("")
    assert set(study.read_plan(root / "scripts/bench/fewshot.yaml").methods) == {"registration", "stage 3"}
    scorings = study.read_plan(root / "scripts/bench/scoring.yaml").methods
    assert len({study.Scoring.of(m.scoring) for m in scorings.values()}) == len(scorings) == 10
