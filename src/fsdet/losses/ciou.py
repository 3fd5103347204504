# SPDX-License-Identifier: AGPL-3.0-or-later
"""Complete-IoU box loss. Zheng et al. 2020, eq. 10 and 11, https://arxiv.org/abs/1911.08287"""

from torch import Tensor

from fsdet.boxes import complete_iou


def ciou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Overlap, centre distance and aspect ratio in one loss.

        L = 1 - IoU + d^2 / c^2 + a* v,   v = 4/pi^2 (atan w_t/h_t - atan w/h)^2,   a = v / (1 - IoU + v),   * detached

    Args:
        pred, target: [P, 4] xyxy px, any float dtype. d: distance of the centres; c: diagonal of the enclosing box.
    Returns:
        [P] float32 in [0, 3). At init, little overlap: about 1.
        |dL/dcoordinate| <= 5 / (shorter side of the target) + 1.3 / (longer side of pred + 1e-3 px). NaN in, NaN out.
    Raises:
        ShapeError: unless both are [P, 4].
    """
    return 1 - complete_iou(pred, target)
