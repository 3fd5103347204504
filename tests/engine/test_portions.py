# SPDX-License-Identifier: AGPL-3.0-or-later
"""A batch that does not fit is run in parts: the same gradient where it can be, told, kept across a resume."""

from dataclasses import replace

import pytest
import torch

from engine.test_step import controller, everything
from engine.test_trainer import Power, same
from engine.toy import ToyBatch, ToyTask, trainer
from fsdet.config import Save
from fsdet.engine import portions
from fsdet.engine.checkpoint import load
from fsdet.engine.position import Position
from fsdet.errors import RunFailed

HOW = {"lr_factor": 1.0, "clip_norm": 0.0}


class Halved(ToyBatch):
    def halves(self):
        cut = (len(self.image_ids) + 1) // 2
        return tuple(replace(self, pixels=self.pixels[rows], answer=self.answer[rows], image_ids=self.image_ids[rows])
                     for rows in (slice(None, cut), slice(cut, None)))  # fmt: skip


class Task(ToyTask):
    """At most `fits` images at once, from batch `since` on."""

    fits, since = 99, 0

    def batch(self, index):
        return Halved(**vars(super().batch(index)))

    def losses(self, batch):
        if batch.index >= self.since and len(batch.image_ids) > self.fits:
            self.model.backbone(batch.pixels)  # running statistics move before the memory is used up
            torch.rand(3)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().losses(batch)


def task(fits=99, since=0, **options):
    made = Task(**options)
    made.fits, made.since = fits, since
    return made


def gradients(fits, rows, accumulate=1):
    """Parameter changes of one step of plain SGD, which is the gradient times the rate; and the position after it."""
    toy = task(fits, rows=rows, norm=False)
    before = [p.detach().clone() for p in toy.model.parameters()]
    position = Position()
    report = portions.run(controller(toy), [toy.batch(i) for i in range(accumulate)], position, HOW)
    assert report.committed
    return [(b - p.detach()) for b, p in zip(before, toy.model.parameters(), strict=True)], position.parts


@pytest.mark.parametrize("rows, fits, parts", [(8, 4, 2), (8, 1, 8), (7, 3, 4), (5, 2, 4)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_parts_have_the_gradient_of_the_whole_without_batchnorm(rows, fits, parts, accumulate):
    whole, one = gradients(99, rows, accumulate)
    halved, many = gradients(fits, rows, accumulate)
    assert (one, many) == (1, parts)
    for a, b in zip(whole, halved, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(a.abs().max()) + 1e-8)


def test_what_was_interrupted_leaves_no_trace():
    """Buffers, gradients and generators: the step in halves is the one that a run with half batches would have made."""
    toy, twin = task(2), task(2)
    c, other = controller(toy), controller(twin)
    state = torch.get_rng_state()
    portions.run(c, [toy.batch(0)], Position(), HOW)
    torch.set_rng_state(state)
    portions.run(other, [twin.batch(0)], Position(parts=2), HOW)
    assert all(map(torch.equal, everything(c), everything(other)))
    assert all(p.grad is None for p in toy.model.parameters())


def test_it_is_told_once_and_says_whether_the_gradient_is_the_same(tmp_path, caplog):
    for name, norm in (("a", True), ("b", False)):
        result = trainer(task(2, since=3, norm=norm), tmp_path / name).fit()
        assert result.steps == 10
    first, second = [r.message for r in caplog.records if "out of memory" in r.message]
    assert "at step 3 with 4 images at once; from here on 2 at most, 2 times as many" in first
    assert "approximately the same gradient, as BatchNorm" in first and ": the same gradient" in second
    assert load(tmp_path / "a/last.pt")["position"]["parts"] == 2


def test_a_resumed_run_goes_on_with_the_parts_and_is_the_straight_run(tmp_path):
    trainer(task(2, since=3), tmp_path / "a", save=Save(every_steps=2)).fit()
    stopped = task(2, since=3)
    batch, stopped.tamper = stopped.batch, None
    stopped.batch = lambda index: batch(index) if index < 7 else (_ for _ in ()).throw(Power())
    with pytest.raises(Power):
        trainer(stopped, tmp_path / "b", save=Save(every_steps=2)).fit()
    trainer(task(2, since=0), tmp_path / "b", save=Save(every_steps=2), resume=True).fit()
    assert same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))


def test_one_image_that_does_not_fit_ends_the_run_with_the_cure(tmp_path):
    with pytest.raises(RunFailed, match=r"(?s)at step 0.*one image at a time.*data\.image_size.*2 GiB"):
        trainer(task(0), tmp_path / "r").fit()


def test_a_batch_that_cannot_be_cut_ends_it_with_the_keys_to_change():
    toy = ToyTask(spoil=lambda batch, report: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(RunFailed, match=r"episode\.queries.*optim\.accumulate"):
        portions.run(controller(toy), [toy.batch(0)], Position(), HOW)


def test_memory_that_runs_out_in_the_update_is_not_tried_again(monkeypatch):
    """Some parameters have moved by then; the step could not be repeated."""
    toy = task()
    c = controller(toy)
    monkeypatch.setattr(c.optimizer, "step", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(RunFailed, match="after the backward"):
        portions.run(c, [toy.batch(0)], Position(), HOW)


def test_a_batch_is_cut_into_a_power_of_two_and_nothing_is_lost():
    batch = task(rows=7).batch(0)
    for parts in (1, 2, 4, 8, 16):
        found = portions.cut(batch, parts)
        assert len(found) == min(parts, 7) and sum((b.image_ids for b in found), ()) == batch.image_ids
        assert torch.equal(torch.cat([b.pixels for b in found]), batch.pixels)
