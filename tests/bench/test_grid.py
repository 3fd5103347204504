# SPDX-License-Identifier: AGPL-3.0-or-later
"""A grid's runs are found again, the best setting is the best over the same draws, and its file is a results.json."""

import json

import pytest

from fsdet.evaluation import summary
from fsdet.tasks import study


@pytest.fixture
def grid(module):
    return module("grid")


def run(k, seed, lr, ap, length="30 epochs", **more):
    """A finished run as rival.py writes it."""
    figures = dict.fromkeys(summary.FIGURES, 0.5) | {"nAP50": ap}
    return {"what": "finetune", "depth": "full", "k": k, "seed": seed, "draw": f"{k}/{seed}", "base": "ab" * 32,
            "optimizer": "MuSGD", "lr": lr, "length": length, "replay": 1.0, "size": 192, "test_images": 400,
            **figures, "steps": 60, "seconds": 20.0, "ms_per_image": 9.0, **more}  # fmt: skip


def test_a_grid_is_the_product_and_holds_nothing_twice(grid):
    found = grid.points(["MuSGD", "AdamW"], [1e-2, 3e-3, 1e-2], [30, 60, 120], [600], 1.0)
    assert len(found) == len(set(found)) == 2 * 2 * 4
    assert {p.length for p in found} == {"30 epochs", "60 epochs", "120 epochs", "600 steps"}


def test_a_length_in_steps_counts_base_images_too(grid):
    # 600 batches of 16 are 9,600 images, a quarter of them shots where 3 base images come with each: 2,400 of 32
    assert grid.Point("SGD", 0.01, "600 steps", 3.0).epochs(32, 16) == 75
    assert grid.Point("SGD", 0.01, "30 epochs", 3.0).epochs(32, 16) == 30


@pytest.mark.parametrize(("epochs", "told"), [(30, (10, 3)), (60, (10, 6)), (120, (10, 12)), (4, (4, 1)), (0.2, (1, 1)),
                                              (15, (8, 2))])  # fmt: skip
def test_passes_and_repetitions_make_up_the_epochs(grid, epochs, told):
    assert grid.passes(epochs) == told


def test_a_file_that_was_cut_short_loses_one_run_and_takes_further_ones(grid, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    grid.append_run(path, run(1, 0, 0.01, 0.3))
    grid.append_run(path, run(1, 1, 0.01, 0.4))
    path.write_bytes(path.read_bytes()[:-40])
    assert [r["seed"] for r in grid.read_runs(path)] == [0] and f"{path}:2" in capsys.readouterr().err
    grid.append_run(path, run(1, 1, 0.01, 0.5))
    assert [(r["seed"], r["nAP50"]) for r in grid.read_runs(path)] == [(0, 0.3), (1, 0.5)]
    assert grid.read_runs(tmp_path / "none") == []


OTHER = {"draw": "x", "base": "x", "size": 96, "test_images": 9, "depth": "head", "lr": 1.0, "length": "9 steps",
         "replay": 2.0, "optimizer": "SGD", "what": "bound", "k": 2, "seed": 1}  # fmt: skip


@pytest.mark.parametrize("other", [{key: value} for key, value in OTHER.items()], ids=OTHER)
def test_a_run_is_another_when_anything_that_shapes_it_is(grid, other):
    one = run(1, 0, 0.01, 0.3)
    assert grid.key_of(one) == grid.key_of({**one, "nAP50": 0.9, "seconds": 1}) != grid.key_of({**one, **other})


def test_best_compares_settings_over_the_same_draws(grid):
    rows = [run(1, 0, 0.01, 0.4), run(1, 1, 0.01, 0.2), run(1, 0, 0.003, 0.35), run(1, 1, 0.003, 0.33),
            run(1, 0, 0.1, 0.9)]  # fmt: skip
    point, mean = grid.best(rows, [0, 1])  # .1 lacks draw 1; means .3 and .34
    assert point.lr == 0.003 and mean == pytest.approx(0.34)
    assert grid.best(rows, [0])[0].lr == 0.1
    assert grid.best(rows, [2]) is None and grid.best(rows, []) is None


def test_results_take_the_best_setting_of_each_k_and_keep_the_rest(grid):
    rows = [run(5, 1, 0.01, 0.7), run(1, 0, 0.01, 0.4), run(1, 1, 0.01, 0.2), run(1, 0, 0.003, 0.3),
            run(5, 0, 0.003, 0.8, bAP50=None), run(5, 1, 0.003, 0.6), run(5, 0, 0.01, 0.6),
            run(1, 2, 0.01, 0.9)]  # fmt: skip
    found = json.loads(json.dumps(grid.results(rows, "Ultralytics")))
    assert found["seeds"] == [0, 1]  # draw 2 is there at 1 shot alone
    assert found["shots"]["1"]["nAP50"]["values"] == [0.4, 0.2]
    assert found["shots"]["5"]["nAP50"]["values"] == [0.8, 0.6]
    assert found["chosen"]["1"].startswith("MuSGD 0.01") and found["chosen"]["5"].startswith("MuSGD 0.003")
    assert "test split" in found["choice"]
    assert {(g["setting"][:11], tuple(g["seeds"])) for g in found["grid"]["1"]} == \
        {("MuSGD 0.01,", (0, 1, 2)), ("MuSGD 0.003", (0,))}  # fmt: skip


def test_no_results_before_every_k_has_a_setting_with_all_draws(grid):
    assert grid.results([], "x") is None
    assert grid.results([run(1, 0, 0.01, 0.4), run(5, 1, 0.01, 0.7)], "x") is None
    halves = [run(1, 0, 0.01, 0.4), run(1, 1, 0.003, 0.2)]
    assert grid.results(halves, "x") is None


def test_results_stand_in_a_study_and_in_a_table(grid, tmp_path):
    found = grid.results([run(1, 0, 0.01, 0.4), run(1, 1, 0.01, 0.2)], "Ultralytics")
    path = summary.write_json(tmp_path / "finetune.json", found)
    merged = study.merge([summary.read_results(path)])
    assert "30.0 ± 13.9" in summary.table([merged], ["rival"])  # 1.96 * .1 / sqrt(2)
