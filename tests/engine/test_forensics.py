# SPDX-License-Identifier: AGPL-3.0-or-later
"""The one to blame is named: row and image, module and image, the parameter that backward reached first, the loss."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from engine.test_step import controller, everything, nan_pixel, spoiled, step
from engine.toy import ToyTask
from fsdet.engine import forensics
from fsdet.engine.forensics import Rows

NAN = math.nan
CPU = torch.device("cpu")


def broken_output(module: nn.Module, image: int):
    return module.register_forward_hook(lambda m, i, out: out.index_fill(0, torch.tensor([image]), NAN))


def zero_root(name: str):
    """A finite loss whose gradient is NaN."""

    def spoil(batch, report):
        loss = report.weighted[name]
        weighted = {**report.weighted, name: loss + (loss - loss.detach()).sqrt()}
        return replace(report, total=sum(weighted.values()), weighted=weighted)

    return spoil


@pytest.mark.parametrize("name, kind", [("backbone.0", "Conv2d"), ("backbone.1", "BatchNorm2d"),
                                        ("backbone", "Sequential"), ("drop", "Dropout")])  # fmt: skip
def test_a_module_is_named_with_the_image_whose_output_is_bad(name, kind):
    task = ToyTask()
    c = controller(task)
    handle, before = broken_output(task.model.get_submodule(name), 2), everything(c)
    report = step(c)
    handle.remove()
    assert report.evidence["module"] == f"{name} ({kind})" and report.evidence["module_images"] == ["image_0_2"]
    assert report.evidence["cause"] == "data" and f"first in the output of {name} ({kind}), image_0_2" in report.culprit
    assert all(map(torch.equal, before, everything(c)))


def test_a_bad_gradient_is_named_by_the_first_parameter_of_its_backward_and_by_the_loss_that_sent_it():
    """All five gradients are NaN; the one nearest to the losses is where it began."""
    report = step(controller(ToyTask(spoil=zero_root("bbox"))))
    assert report.outcome == "bad_grad" and report.culprit.startswith("head.")
    assert "5 of 5 gradients are not finite" in report.culprit
    evidence = report.evidence
    assert (evidence["gradient_of"], evidence["cause"]) == (["bbox"], "loss")
    assert evidence["gradient_at"] == "head (Linear)" and "sent by bbox_loss" in report.culprit


def test_a_backward_that_breaks_inside_the_network_names_the_module_it_reaches_first():
    task = ToyTask(norm=False)
    task.model.backbone[0].register_forward_hook(lambda m, i, out: (out.register_hook(lambda g: g * NAN), out)[1])
    report = step(controller(task))
    assert report.culprit.startswith("backbone.0.weight") and report.evidence["cause"] == "backward"
    assert report.evidence["gradient_at"] in ("backbone.0 (Conv2d)", "backbone.1 (Identity)", "backbone (Sequential)")


def test_a_gradient_that_is_finite_when_run_again_in_float32_says_so():
    task = ToyTask()
    c, first = controller(task), [True]
    task.model.head.bias.register_hook(lambda g: g * NAN if first.pop() else g)
    first.insert(0, False)
    report = step(c)
    assert report.outcome == "bad_grad" and report.culprit.startswith("head.bias")
    assert report.culprit.endswith("gone when run again") and report.evidence["cause"] is None


def test_rows_name_their_images_several_a_row_too_and_the_largest_when_only_the_sum_overflows():
    task = ToyTask()
    good = task.losses(task.batch(0))
    bad = replace(good, raw={"bbox": torch.tensor(math.inf)}, weighted={})
    bad = replace(bad, row_values={"bbox": torch.tensor([1.0, NAN, 2.0])},
                  row_images={"bbox": torch.tensor([[0, 0], [3, 1], [2, 2]])})  # fmt: skip
    assert forensics.losses_not_finite([good, bad]) == {"bbox": Rows((1,), ("image_0_1", "image_0_3"))}
    large = replace(bad, row_values={"bbox": torch.tensor([1.0, 3e38, -2.0])}, row_images={"bbox": torch.arange(3)})
    (rows,) = forensics.losses_not_finite([large]).values()
    assert rows == Rows((1,), ("image_0_1",), True) and "largest, each being finite: rows [1] of image_0_1" in str(rows)


def test_a_total_whose_parts_are_finite_and_a_bad_normaliser_are_called_that():
    task = ToyTask()
    good = task.losses(task.batch(0))
    assert forensics.losses_not_finite([good]) == {}
    assert list(forensics.losses_not_finite([replace(good, total=torch.tensor(NAN))])) == [forensics.TOTAL]
    odd = replace(good, normaliser=torch.tensor(NAN))
    assert list(forensics.losses_not_finite([odd])) == ["normaliser of a micro-batch"]


def test_of_several_micro_batches_the_bad_one_is_named():
    task = ToyTask(spoil=lambda b, r: spoiled("bbox", NAN)(b, r) if b.index == 2 else r)
    report = controller(task).run([task.batch(i) for i in range(4)], lr_factor=1.0, clip_norm=1.0)
    assert report.evidence["losses"] == {"bbox": {"rows": [1], "images": ["image_2_1"]}}


def test_only_the_images_with_a_bad_pixel_are_named_where_the_batch_can_tell():
    task = ToyTask(tamper=nan_pixel)
    report = step(controller(task))
    assert report.evidence == {"images": [f"image_0_{i}" for i in range(4)], "cause": "data"}
    batch = task.batch(0)
    object.__setattr__(batch, "unsound", lambda: ("image_0_0",))
    (finding,) = [forensics.bad_input([ToyTask().batch(1), batch])]
    assert finding.evidence["images"] == ["image_0_0"] and "batch 0: image_0_0" in finding.culprit


@dataclass
class Answer:
    points: torch.Tensor
    names: list


class Odd(nn.Module):
    """A dataclass of nested outputs, from a module that is called twice and returns a parameter once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(2, 2), nn.ParameterList([nn.Parameter(torch.ones(2))])

    def forward(self, x):
        self.inner(x)
        return Answer(x, [{"deep": self.inner(x * NAN)}])


def test_hooks_look_into_whatever_a_module_returns_and_are_gone_afterwards():
    model = Odd()
    with forensics._listening(model, ("a", "b", "c")) as heard:
        model(torch.ones(3, 2))
    assert heard.outputs == [("inner (Linear), call 2", ())]
    assert not any(m._forward_hooks for m in model.modules())
    model.inner.forward = lambda x: torch.ones(3, 2)
    model.register_forward_hook(
        lambda m, i, out: (setattr(out, "names", [{"deep": (torch.tensor([[NAN], [1.0], [1.0]]),)}]), out)[1]
    )
    with forensics._listening(model, ("a", "b", "c")) as heard:
        model(torch.ones(3, 2))
    assert heard.outputs == [("the model (Odd)", ("a",))]
