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


def test_smoothing_keeps_constants_and_straight_middles():
    assert plots._smooth(np.full(9, 3.0)) == pytest.approx(np.full(9, 3.0))
    line = np.arange(41.0)
    assert plots._smooth(line)[15:26] == pytest.approx(line[15:26])


def test_labels_counts_boxes_of_every_class(tmp_path, figures):
    records = [
        ImageRecord(Path("a.jpg"), (100, 200), [[0, 0, 50, 50], [10, 10, 190, 90]], [0, 2]),
        ImageRecord(Path("b.jpg"), (300, 100), [], []),
    ]
    assert inked(plot_labels(records, ["king", "queen", "jack", "ace"], tmp_path / "labels.png")) > 0.01
    assert [bar.get_height() for bar in figures[0].axes[0].patches] == [1, 0, 1, 0]
    with pytest.raises(DataError):
        plot_labels(records[1:], ["king"], tmp_path / "none.png")


def test_confusion_prints_shares_of_each_true_class(tmp_path, figures):
    matrix = np.array([[3, 0, 1], [1, 0, 0], [0, 0, 0]])  # the second class never occurs
    assert inked(plot_confusion(matrix, ["king", "queen"], tmp_path / "confusion.png")) > 0.01
    texts = {t.get_position(): t.get_text() for t in figures[0].axes[0].texts}
    assert texts == {(0, 0): "0.75", (2, 0): "1.00", (0, 1): "0.25"}  # (true, predicted)
    plot_confusion(matrix, ["king", "queen"], tmp_path / "counts.png", normalise=False)
    assert sorted(t.get_text() for t in figures[1].axes[0].texts) == ["1", "1", "3"]
    with pytest.raises(ShapeError):
        plot_confusion(matrix, ["king"], tmp_path / "x.png")


def test_pr_leaves_out_classes_without_ground_truth(tmp_path, figures):
    precision = np.stack([np.linspace(1, 0, 101), np.full(101, np.nan), np.full(101, 0.5)])
    assert inked(plot_pr(precision, ["king", "queen", "jack"], tmp_path / "pr.png")) > 0.005
    labels = [line.get_label() for line in figures[0].axes[0].lines]
    assert labels == ["king 0.500", "jack 0.500", "all classes 0.500"]
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
