# SPDX-License-Identifier: AGPL-3.0-or-later
"""Everything drawn: boxes on images (drawing), several images on one sheet (sheets), curves and counts (plots).

A page in one HTML file: page, style, charts.
"""

from fsdet.pictures.crops import around
from fsdet.pictures.drawing import (
    TRUTH,
    Picture,
    colour,
    draw_detections,
    is_picture,
    jpeg,
    refuse_other_pictures,
    save_jpeg,
)
from fsdet.pictures.plots import plot_confusion, plot_labels, plot_pr, plot_results, plot_shots
from fsdet.pictures.sheets import contact_sheet, episode_sheet

__all__ = [
    "TRUTH",
    "Picture",
    "around",
    "colour",
    "contact_sheet",
    "draw_detections",
    "episode_sheet",
    "is_picture",
    "jpeg",
    "plot_confusion",
    "plot_labels",
    "plot_pr",
    "plot_results",
    "plot_shots",
    "refuse_other_pictures",
    "save_jpeg",
]
