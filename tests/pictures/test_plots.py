# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every plot is a readable PNG whose panels hold the numbers given, also when there are few of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsdet.errors import DataError, ShapeError
from fsdet.pictures import plot_confusion, plot_labels, plot_pr, plot_results, plot_shots, plots
from fsdet.types import ImageRecord


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to look into."""
    seen = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, out: (seen.append(figure), save(figure, out))[1])
    return seen


def inked(path: Path) -> float:
    with Image.open(path) as file:
        image = np.asarray(file.convert("L"))
    assert min(image.shape) > 200
    return float((image < 250).mean())


def test_results_has_a_panel_for_every_column_with_its_points(tmp_path, figures):
    csv = tmp_path / "results.csv"
    rows = [f"{e},{e * 10},{1 / e},{'' if e % 2 else e / 10},nan" for e in range(1, 9)]
    csv.write_text("\n".join(["epoch, step, train/bbox_loss,val/base/AP50 ,train/triplet_loss", *rows]))
    assert inked(plot_results(csv, tmp_path / "results.png")) > 0.005
    panels = {axes.get_title(): axes.lines[0].get_xydata() for axes in figures[0].axes if axes.has_data()}
    assert set(panels) == {"train/bbox_loss", "val/base/AP50"}  # a column without a number has no panel
    assert panels["train/bbox_loss"].tolist() == [[e, 1 / e] for e in range(1, 9)]
    assert panels["val/base/AP50"].tolist() == [[e, e / 10] for e in (2, 4, 6, 8)]


def test_results_of_a_single_epoch_and_of_rows_cut_off(tmp_path):
    csv = tmp_path / "results.csv"
    csv.write_text("epoch,train/total_loss\n1,2.5\n2")
    assert inked(plot_results(csv, tmp_path / "new" / "results.png")) > 0.002


@pytest.mark.parametrize("text", ["", "epoch,loss\n", "epoch,loss\n1,nan\n"])
def test_results_without_numbers_are_refused(tmp_path, text):
    csv = tmp_path / "results.csv"
    with pytest.raises(DataError, match=r"results\.csv"):
        plot_results(csv, tmp_path / "results.png")
    csv.write_text(text)
    with pytest.raises(DataError, match="at least one epoch"):
        plot_results(csv, tmp_path / "results.png")


def test_results_draws_no_counter_and_all_learning_rates_in_one_panel(tmp_path, figures):
    csv = tmp_path / "results.csv"
    rows = ["1,100,100,9,3,0.02,0.01,", "2,200,200,19,2,0.01,0.005,", "3,300,300,29,1,0,0,"]
    header = "epoch,step,batch,time,train/total_loss,lr/head,lr/backbone,lr/nothing"
    csv.write_text("\n".join([header, *rows]))
    plot_results(csv, tmp_path / "results.png")
    loss, rates = (axes for axes in figures[0].axes if axes.has_data())
    assert (loss.get_title(), rates.get_title()) == ("train/total_loss", "lr")
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["head", "backbone"]
    assert [line.get_ydata().tolist() for line in rates.lines] == [[0.02, 0.01, 0], [0.01, 0.005, 0]]
    assert rates.get_yscale() == "linear"  # a schedule that falls to 0 is not groups that differ
    assert loss.get_xlim() == rates.get_xlim() == pytest.approx((0.9, 3.1))


@pytest.mark.parametrize("backbone, scale", [("0.011", "linear"), ("0.01", "log"), ("0", "linear")])
def test_learning_rates_far_apart_are_drawn_on_a_logarithmic_axis(tmp_path, figures, backbone, scale):
    csv = tmp_path / "results.csv"
    csv.write_text(f"epoch,lr/head,lr/backbone\n1,0.1,{backbone}\n2,0,0\n")
    plot_results(csv, tmp_path / "results.png")
    (panel,) = (axes for axes in figures[0].axes if axes.has_data())
    assert panel.get_yscale() == scale


@pytest.mark.parametrize("values, top", [((0.9155, 0.9167), 1), ((91.55, 91.67), 100), ((0.0, 1.0), 1)])
def test_panels_of_a_validation_show_the_whole_scale(tmp_path, figures, values, top):
    csv = tmp_path / "results.csv"
    csv.write_text(f"epoch,val/base/AP50,train/cls_loss\n1,{values[0]},0.91\n2,{values[1]},0.92\n")
    plot_results(csv, tmp_path / "results.png")
    limits = {axes.get_title(): axes.get_ylim() for axes in figures[0].axes if axes.has_data()}
    assert limits["val/base/AP50"] == (0, top)
    assert limits["train/cls_loss"] == pytest.approx((0.9095, 0.9205))


@pytest.mark.parametrize("rows", [5, 9, 41])
def test_smoothing_keeps_straight_lines_and_both_ends(rows):
    line = 3 - 0.5 * np.arange(rows)
    assert plots._smooth(line) == pytest.approx(line)
    falling = 10.0 / np.arange(1, rows + 1)
    smooth = plots._smooth(falling)
    assert (smooth[0], smooth[-1]) == pytest.approx((falling[0], falling[-1]))
    assert np.all(np.diff(smooth) < 0)


def test_smoothing_evens_out_what_alternates():
    assert plots._smooth(np.tile([0.0, 1.0], 20))[5:35] == pytest.approx(np.full(30, 0.5), abs=0.01)


def test_labels_counts_boxes_of_every_class(tmp_path, figures):
    records = [
        ImageRecord(Path("a.jpg"), (100, 200), [[0, 0, 50, 50], [10, 10, 190, 90]], [0, 2]),
        ImageRecord(Path("b.jpg"), (300, 100), [], []),
    ]
    assert inked(plot_labels(records, ["king", "queen", "jack", "ace"], tmp_path / "labels.png")) > 0.01
    assert [bar.get_height() for bar in figures[0].axes[0].patches] == [1, 0, 1, 0]
    assert [text.get_text() for text in figures[0].axes[0].get_xticklabels()] == ["king", "queen", "jack", "ace"]
    with pytest.raises(DataError):
        plot_labels(records[1:], ["king"], tmp_path / "none.png")


@pytest.mark.parametrize("count, step", [(40, 1), (41, 2), (80, 2), (1203, 31)])
def test_labels_names_as_many_classes_as_fit(tmp_path, figures, count, step):
    names = [f"class {i}" for i in range(count)]
    names[0] = "a long name that would leave no room"
    plot_labels([ImageRecord(Path("a.jpg"), (100, 200), [[0, 0, 50, 50]], [3])], names, tmp_path / "labels.png")
    ticks = figures[0].axes[0]
    assert ticks.get_xticks().tolist() == list(range(0, count, step))
    shown = [text.get_text() for text in ticks.get_xticklabels()]
    assert shown == ["a long name that would …", *names[step::step]]


def test_confusion_prints_shares_of_each_true_class(tmp_path, figures):
    matrix = np.array([[3, 0, 1], [1, 0, 0], [0, 0, 0]])  # the second class never occurs
    assert inked(plot_confusion(matrix, ["king", "queen"], tmp_path / "confusion.png")) > 0.01
    texts = {t.get_position(): t.get_text() for t in figures[0].axes[0].texts}
    assert texts == {(0, 0): "0.75", (2, 0): "1.00", (0, 1): "0.25"}  # (true, predicted)
    plot_confusion(matrix, ["king", "queen"], tmp_path / "counts.png", normalise=False, of="5 shots")
    assert [f.axes[0].get_title() for f in figures[:2]] == ["confusion matrix, share of each true class",
                                                            "confusion matrix, counts, 5 shots"]  # fmt: skip
    assert sorted(t.get_text() for t in figures[1].axes[0].texts) == ["1", "1", "3"]
    with pytest.raises(ShapeError):
        plot_confusion(matrix, ["king"], tmp_path / "x.png")


def test_pr_leaves_out_classes_without_ground_truth(tmp_path, figures):
    precision = np.stack([np.linspace(1, 0, 101), np.full(101, np.nan), np.full(101, 0.5)])
    assert inked(plot_pr(precision, ["king", "queen", "jack"], tmp_path / "pr.png")) > 0.005
    labels = [line.get_label() for line in figures[0].axes[0].lines]
    assert labels == ["king 0.500", "jack 0.500", "all classes 0.500"]
    plot_pr(precision, ["king", "queen", "jack"], tmp_path / "pr.png", mean="novel classes", of="5 shots, draw 0")
    assert figures[1].axes[0].lines[-1].get_label() == "novel classes 0.500"
    assert [f.axes[0].get_title() for f in figures] == [
        "precision and recall at IoU .5", "precision and recall at IoU .5, 5 shots, draw 0"]  # fmt: skip
    assert plot_pr(precision[1:2], ["queen"], tmp_path / "none.png").exists()
    with pytest.raises(ShapeError):
        plot_pr(precision, ["king"], tmp_path / "x.png")


def test_shots_draws_means_and_bands_over_k_and_survives_null(tmp_path, figures):
    def shot(mean):
        return {"nAP50": {"mean": mean, "ci95": 0.05}, "bAP50": {"mean": None, "ci95": None}}

    result = {"setting": "gfsod", "metric": "coco", "checkpoint_sha256": "ab" * 32}
    result["shots"] = {"10": shot(0.4), "1": shot(0.2), "5": shot(None)}
    assert inked(plot_shots([result], tmp_path / "shots.png", ["ours"])) > 0.005
    (line,) = figures[0].axes[0].lines  # bAP50 has no figures
    assert line.get_label() == "ours: nAP50"
    assert line.get_xydata() == pytest.approx(np.array([[1, 20], [10, 40]]))  # in order of K; 5 has no figures
    band = figures[0].axes[0].collections[0].get_paths()[0].vertices
    assert {(round(x), round(y)) for x, y in band} == {(1, 15), (1, 25), (10, 35), (10, 45)}
    with pytest.raises(ShapeError):
        plot_shots([result], tmp_path / "x.png", ["a", "b"])


def test_the_only_k_of_a_fine_tuned_detector_shows_two_whole_marks(tmp_path, figures):
    sure = {"nAP50": {"mean": 0.998, "ci95": 0.0}, "bAP50": {"mean": 1.0, "ci95": 0.0}}
    result = {"setting": "gfsod", "metric": "coco", "checkpoint_sha256": "ab" * 32, "shots": {"10": sure}}
    plot_shots([result], tmp_path / "shots.png", ["ours"])
    novel, base = figures[0].axes[0].lines
    assert (novel.get_marker(), novel.get_fillstyle()) != (base.get_marker(), base.get_fillstyle())
    bottom, top = figures[0].axes[0].get_ylim()
    assert bottom == 0 and top > 103
