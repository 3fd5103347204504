# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pixels before the network: fitted in, laid out, and a checkpoint that wants something else refused."""

import numpy as np
import pytest
import torch

from fsdet.data.preprocessing import Preprocessing
from fsdet.errors import CheckpointError


def test_an_image_is_fitted_in_the_middle_and_divided():
    prepare = Preprocessing(64, 32)
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[...] = (255, 51, 0)  # RGB stays RGB
    fitted, factor, padding = prepare.fitted(pixels)
    assert factor == 2.0 and padding == (0, 16) and fitted.shape == (64, 64, 3)
    [tensor] = prepare.tensor([fitted])
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 64, 64)
    assert tensor[:, 32, 5].tolist() == pytest.approx([1.0, 0.2, 0.0]), "the image"
    assert tensor[:, 2, 5].tolist() == pytest.approx([114 / 255] * 3), "the grey above it"


def test_a_checkpoint_says_what_it_wants_and_another_wish_is_refused():
    own = Preprocessing(640, 160)
    spec = {"image_size": 640, "support_size": 160}
    assert Preprocessing.of(spec, "a.pt") == own == Preprocessing.of({**spec, "preprocessing": own.stored()}, "a.pt")
    for theirs, told in (({**own.stored(), "pad": 0, "order": "bgr"}, "order 'bgr', pad 0"),
                         ({**own.stored(), "mean": 0.5}, "mean 0.5"), ("plain", "'plain'")):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"a.pt: preprocessing: expected .*got {told}"):
            Preprocessing.of({**spec, "preprocessing": theirs}, "a.pt")
