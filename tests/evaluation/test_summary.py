# SPDX-License-Identifier: AGPL-3.0-or-later
"""Intervals by hand, results.json as promised, and a table that never mixes what cannot be compared."""

import json
import math
import re

import numpy as np
import pytest
from scipy.stats import t as student

from evaluation.scenes import scene
from fsdet.cli.main import main
from fsdet.errors import DataError, ShapeError
from fsdet.evaluation import summary
from fsdet.evaluation.scorer import Scorer
from fsdet.evaluation.summary import FIGURES, harmonic_mean, interval, read_results, results_json, table, write_json


def result(**changes):
    rows = [{key: v for key in FIGURES} for v in (0.2, 0.3, 0.4)]
    plain = {
        "setting": "gfsod",
        "metric": "coco",
        "checkpoint_sha256": "ab" * 32,
        "seeds": [0, 1, 2],
        "standard": {"bAP50": 0.7, "bAP": 0.5},
        "shots": {10: rows, 1: rows},
        "ms_per_image": 12.3,
    }
    return results_json(**{**plain, **changes})


def test_interval_by_hand():
    got = interval([1, 2, 3, 4])  # mean 2.5, variance 5/4 (ddof 0) and 5/3 (ddof 1)
    assert got["mean"] == 2.5 and got["values"] == [1, 2, 3, 4]
    assert got["ci95"] == pytest.approx(1.96 * math.sqrt(5 / 4) / 2)
    assert got["ci95_t"] == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)


def test_interval_of_one_value_has_no_t_interval_and_of_none_is_refused():
    one = interval([0.4])
    assert (one["mean"], one["ci95"]) == (0.4, 0) and math.isnan(one["ci95_t"])
    assert math.isnan(interval([0.1, math.nan])["mean"])
    with pytest.raises(ShapeError):
        interval([])


def test_t_quantile_equals_scipy():
    for freedom in (*range(1, 41), 100, 1000):
        assert summary.t975(freedom) == pytest.approx(student.ppf(0.975, freedom), abs=1e-5)


@pytest.mark.parametrize(("b", "n", "want"), [(0, 0, 0), (0.5, 0, 0), (0.6, 0.3, 0.4), (0.5, 0.5, 0.5)])
def test_harmonic_mean(b, n, want):
    assert harmonic_mean(b, n) == pytest.approx(want)
    assert math.isnan(harmonic_mean(math.nan, n))


def test_figures_of_a_draw_are_means_over_base_and_novel_classes():
    records, detections = scene(np.random.default_rng(0), images=10, classes=5)
    scores = Scorer(records, 5).score(detections)
    row = summary.figures(scores, base=[0, 1, 2], novel=[3, 4], fp_per_image=0.25)
    assert tuple(row) == FIGURES
    assert row["bAP50"] == pytest.approx(scores.class_ap50[:3].mean()) and row["nAP"] == scores.ap([3, 4])
    assert row["AP50"] == pytest.approx(scores.class_ap50.mean()) and row["recall"] == scores.recall([3, 4])
    assert row["HM50"] == pytest.approx(2 / (1 / row["bAP50"] + 1 / row["nAP50"])) and row["fp_per_image"] == 0.25
    assert summary.per_class([scores, scores], "abcde")["d"]["mean"] == scores.class_ap50[3]


def test_results_json_has_the_promised_keys():
    got = result(per_class={"king": 1})
    promised = {"setting", "metric", "checkpoint_sha256", "seeds", "tta", "standard", "shots", "ms_per_image"}
    assert set(got) == promised | {"per_class"}
    assert got["tta"] is False and got["standard"] == {"bAP50": 0.7, "bAP": 0.5} and list(got["shots"]) == ["1", "10"]
    assert set(got["shots"]["10"]) == set(FIGURES)
    assert got["shots"]["10"]["nAP50"] == interval([0.2, 0.3, 0.4])
    with pytest.raises(ShapeError, match="K = 1"):
        result(seeds=[0])


def test_written_json_is_whole_strict_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"old": True})
    value = result(ms_per_image=math.nan, array=np.float32(0.5), nested=[np.arange(2), (math.inf,)])
    write_json(path, value)
    text = path.read_text()
    got = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert got["ms_per_image"] is None and got["array"] == 0.5 and got["nested"] == [[0, 1], [None]]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "results.json", {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text()) == {"old": True} and len(list(tmp_path.iterdir())) == 1


def test_table_survives_the_file_and_prints_per_cent_with_intervals(tmp_path):
    nothing = [{**{key: 0.5 for key in FIGURES}, "nAP50": math.nan}] * 3
    ours = result()
    ours["shots"] = dict(reversed(ours["shots"].items()))  # 10 before 1, as other tools may have sorted it
    files = [write_json(tmp_path / "a.json", ours), write_json(tmp_path / "b.json", result(shots={5: nothing}))]
    text = table([read_results(f) for f in files], ["ours", "other"])
    assert "setting gfsod, metric coco, TTA off" in text and "abababababab" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + 3 + 2
    ci, t = 1.96 * math.sqrt(0.02 / 3) / math.sqrt(3), 4.302653 * 0.1 / math.sqrt(3)  # std .0816 (ddof 0), .1 (ddof 1)
    assert lines[0][:3] == ["", "K", "n"] and [line[2] for line in lines[2:]] == ["-", "3", "3", "-", "3"]
    assert lines[2][:7] == ["ours, standard head", "-", "-", "-", "-", "70.0", "50.0"]
    assert [line[1] for line in lines[2:]] == ["-", "1", "10", "-", "5"]  # K in numeric order
    assert lines[3][3] == f"30.0 ± {100 * ci:.1f} (t {100 * t:.1f})"
    assert lines[3][9] == f"0.30 ± {ci:.2f} (t {t:.2f})"
    assert lines[6][3] == "-" and lines[6][4] == "50.0 ± 0.0 (t 0.0)"


@pytest.mark.parametrize("change", [{"setting": "fsod"}, {"metric": "voc07"}])
def test_table_refuses_to_mix(change):
    with pytest.raises(DataError, match=next(iter(change))) as caught:
        table([result(), result(**change)], ["mine", "theirs"])
    assert "theirs" in str(caught.value) and caught.value.exit_code == 2


def test_table_refuses_other_json_and_wrong_labels(tmp_path):
    path = write_json(tmp_path / "x.json", {"setting": "gfsod"})
    with pytest.raises(DataError, match="metric"):
        read_results(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"x\.json"):
        read_results(path)
    with pytest.raises(DataError):
        table([], [])
    with pytest.raises(ShapeError):
        table([result()], [])


def with_thresholds(**changes):
    at = {"fp_per_image": 0.05, "recall": 0.75, "threshold": 0.3}
    rows = [{**{key: 0.5 for key in FIGURES}, "at_threshold": {**at, "recall": r}} for r in (0.7, 0.8)]
    return result(seeds=[0, 1], shots={5: rows}, **changes)


def test_figures_at_the_proposed_thresholds_have_their_intervals_and_columns():
    got = with_thresholds(scoring={"reduce": "best"})
    assert got["shots"]["5"]["at_threshold"]["recall"] == interval([0.7, 0.8])
    assert set(got["shots"]["5"]["at_threshold"]) == {"fp_per_image", "recall", "threshold"}
    text = table([got, result()], ["ours", "before"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0][11:] == ["FP/image at threshold", "recall at threshold", "ms/image"]
    assert len({len(line) for line in lines}) == 1 and lines[2][11:13] == lines[5][11:13] == ["-", "-"]
    assert lines[3][11:13] == ["0.05 ± 0.00 (t 0.00)", "75.0 ± 6.9 (t 63.5)"]
    assert "ours: checkpoint abababababab, seeds 0, 1, reduce best" in text
    assert "at threshold" not in table([result()], ["before"])


def test_novel_classes_by_k_and_result():
    entry = {"king": interval([0.25, 0.75]), "table": interval([0.9]), "queen": interval([math.nan])}
    ours = result(per_class={"10": entry, "1": entry}, novel=["king", "queen"])
    text = summary.per_class_table([ours, result(per_class={"5": {"king": interval([0.1])}})], ["a", "b"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["AP50", "a, K = 1", "a, K = 10", "b, K = 5"] and [line[0] for line in lines[2:]] == [
        "king",
        "queen",
    ]
    assert lines[2][1:] == ["50.0 ± 34.6 (t 317.7)", "50.0 ± 34.6 (t 317.7)", "10.0"]
    assert lines[3][1:] == ["-", "-", "-"]
    with pytest.raises(DataError, match="AP50 by class"):
        summary.per_class_table([result()], ["a"])
    with pytest.raises(DataError, match="one setting"):
        summary.per_class_table([ours, result(setting="fsod")], ["a", "b"])


DATA = {"name": "set/data.yaml", "sha256": "1" * 64, "classes_sha256": "2" * 64, "base": 3, "novel": 2,
        "novel_counted": 2}  # fmt: skip


def measured(**changes):
    return result(**{"split": "test", "images": 400, "novel": ["king", "queen"], "data": DATA, **changes})


@pytest.mark.parametrize(
    ("change", "told"),
    [({"split": "val"}, "one split"), ({"images": 29}, "one number of images"),
     ({"novel": ["king", "rook"]}, "one list of novel classes"),
     ({"data": {**DATA, "classes_sha256": "3" * 64}}, "one list of classes"),
     ({"data": {**DATA, "sha256": "3" * 64}}, "one data set")],
)  # fmt: skip
def test_table_refuses_what_was_measured_on_something_else(change, told):
    for make in (table, summary.per_class_table):
        with pytest.raises(DataError, match=f"expected {told}.*theirs.* Next: ") as caught:
            make([measured(), measured(**change)], ["mine", "theirs"])
        assert caught.value.exit_code == 2


def test_table_says_once_what_it_was_measured_on_and_which_file_does_not():
    moved = measured(data={**DATA, "name": "elsewhere/data.yaml"})
    text = table([measured(), moved, result(split="test", images=400)], ["a", "b", "rival"])
    stamp = "measured on set/data.yaml, sha256 111111111111, split test, 400 images, 3 base and 2 novel classes"
    assert text.splitlines()[1] == stamp and text.count("measured on") == 1
    assert text.splitlines()[2] == "rival: the file does not say its list of classes, data set; taken as the same"
    assert "does not say" not in table([measured()], ["a"])
    few = measured(data={**DATA, "novel_counted": 1})
    assert "2 novel classes (1 of them with ground truth, which alone count)" in table([few], ["a"])


def test_an_uneven_merger_says_n_of_each_k_and_every_checkpoint():
    rows = [dict.fromkeys(FIGURES, v) for v in (0.2, 0.4)]
    uneven = result(seeds=[0, 1], shots={1: rows}, checkpoints_sha256=["ab" * 32, "cd" * 32])
    uneven["shots"]["5"] = result(seeds=[0, 1], shots={5: rows})["shots"]["5"] | {"nAP50": interval([0.1] * 7)}
    text = table([uneven], ["ours"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [line[1:3] for line in lines[3:]] == [["1", "2"], ["5", "7"]]
    assert "ours: checkpoint abababababab, cdcdcdcdcdcd, seeds 0, 1" in text


def test_the_standard_heads_row_is_there_where_it_means_something():
    nothing = {"bAP50": math.nan, "bAP": math.nan}
    assert "standard head" in table([result()], ["a"])
    assert "standard head" not in table([result(standard=nothing)], ["rival"])
    assert "standard head" not in table([result(setting="fsod")], ["a"])


@pytest.mark.parametrize(
    ("change", "told"),
    [(lambda v: v.update(shots=[]), r"shots is \[\]"), (lambda v: v.update(shots={}), "shots is empty"),
     (lambda v: v["shots"].update({"1": [1]}), r"shots 1 is \[1\]"),
     (lambda v: v["shots"].update(one=v["shots"]["1"]), "K of 'one'"),
     (lambda v: v["shots"]["1"]["nAP50"].update(mean="0.5"), "shots 1 nAP50 is"),
     (lambda v: v["shots"]["1"]["nAP50"].update(values=[]), "shots 1 nAP50 is"),
     (lambda v: v["shots"]["1"]["nAP50"]["values"].append(math.nan), "NaN, which is no number"),
     (lambda v: v.update(seeds=[0, None]), "a seed is None"), (lambda v: v.update(seeds=3), "seeds is 3"),
     (lambda v: v.update(standard=[]), r"standard is \[\]"), (lambda v: v["standard"].update(bAP="x"), "bAP is 'x'"),
     (lambda v: v.update(ms_per_image="fast"), "ms_per_image is 'fast'"),
     (lambda v: v.update(data=[]), r"data is \[\]"),
     (lambda v: v.update(per_class={"1": {"king": 3}}), "per_class 1 king is 3"),
     (lambda v: v.update(draws={"1": {}}), r"draws 1 is \{\}"), (lambda v: v.pop("shots"), "nothing under shots")],
)  # fmt: skip
def test_damage_is_told_in_a_sentence(tmp_path, capsys, change, told):
    path = write_json(tmp_path / "x.json", measured())
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))  # writes NaN for nan, as many tools do
    assert main(["eval", "--table", str(path)]) == 2
    text = capsys.readouterr().err
    assert re.search(told, text) and "x.json" in text and "Next: " in text and "Traceback" not in text


def test_null_figures_are_whole(tmp_path):
    path = write_json(tmp_path / "x.json", result(shots={1: [dict.fromkeys(FIGURES, math.nan)] * 3}, split=None))
    assert "standard head" in table([read_results(path)], ["a"])
