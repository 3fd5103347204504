# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet probe --incident` names what was not finite, with the run's own weights, and says when nothing is."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fsdet import tasks
from fsdet.cli.main import main
from fsdet.engine import probe
from fsdet.engine.guard import plain
from fsdet.models.prototypes import class_prototypes
from fsdet.tasks import inspect
from fsdet.types import Pyramid
from tasks import injection


@pytest.fixture
def incident(best, settings, tmp_path):
    """incidents/step_2 of a copy of a run, with batch 0 in it; change its batch or report by the call."""
    run = tmp_path / "copy"
    shutil.copytree(best.parent, run)
    folder = run / "incidents/step_2"
    folder.mkdir(parents=True)
    config = settings()
    task, _ = tasks.build_task(config, tasks.read_data(config), resume=True)
    batch = plain(task.batch(0))
    report = {"outcome": "bad_loss", "step": 2, "epoch": 1, "culprit": "dfl_loss", "image_ids": batch["image_ids"]}

    def make(change=lambda batch, report: None):
        change(batch, report)
        torch.save([batch], folder / "batch.pt")
        (folder / "report.json").write_text(json.dumps(report))
        return folder

    return make


def test_a_batch_with_a_nan_names_the_module_and_the_losses(incident, capsys):
    def poison(batch, report):
        batch["query"][1, 0, 3, 3] = torch.nan

    assert main(["probe", "--incident", str(incident(poison))]) == 0
    shown = capsys.readouterr().out
    assert "bad_loss at step 2, epoch 1; dfl_loss" in shown and "000" in shown.splitlines()[1]
    assert "weights: last.pt of step 2" in shown and "NOT FINITE" in shown
    assert "first output that is not finite: backbone.0.conv (Conv2d) for " in shown
    assert "so: not finite in float32 too: what reaches the losses is bad already" in shown
    assert "not finite in float32: " in shown


def test_weights_that_explode_are_named_by_parameter(incident, capsys, monkeypatch):
    """Finite losses whose gradient is not: the square root of zero, added to the total."""
    from fsdet.tasks.fewshot import FewshotTask

    honest = FewshotTask.losses

    def losses(self, batch):
        report = honest(self, batch)
        weight = self.model.head.bias
        object.__setattr__(report, "total", report.total + (weight - weight.detach()).abs().sum().sqrt())
        return report

    monkeypatch.setattr(FewshotTask, "losses", losses)
    assert main(["probe", "--incident", str(incident())]) == 0
    shown = capsys.readouterr().out
    assert "not finite in float32: head.bias (Grad stats: " in shown and "the network's backward breaks" in shown


def test_a_loss_that_sends_a_bad_gradient_is_named(incident, capsys, monkeypatch):
    from fsdet import objective

    honest, clamped = objective.KINDS["dfl"]
    steep = (lambda *a: honest(*a) + (honest(*a) - honest(*a).detach()).sqrt(), clamped)
    monkeypatch.setitem(objective.KINDS, "dfl", steep)
    assert main(["probe", "--incident", str(incident())]) == 0
    shown = capsys.readouterr().out
    assert (
        "the gradient comes from: dfl_loss" in shown and "first gradient that is not finite: at the output of " in shown
    )
    assert "so a loss or its gradient is the reason" in shown


def test_a_batch_that_is_fine_in_float32_is_said_to_be(incident, capsys):
    assert main(["probe", "--incident", str(incident())]) == 0
    assert "losses and gradients are finite in float32 with these weights" in capsys.readouterr().out


def test_a_batch_that_could_not_be_made_repeats_the_reason(incident, capsys):
    def lost(batch, report):
        batch.clear()
        batch.update(index=7, reason="DataError: truncated", image_ids=["batch 7"])

    assert main(["probe", "--incident", str(incident(lost))]) == 0
    assert "batch 7 could not be made: DataError: truncated" in capsys.readouterr().out


def test_a_damaged_incident_and_other_weights_are_the_users_to_mend(incident, capsys):
    folder = incident()
    assert main(["probe", "--incident", str(folder), "model.embed_dim=24"]) == 2
    assert "expected weights that fit the run's configuration and data" in capsys.readouterr().err
    (folder / "batch.pt").write_bytes(b"no tensors")
    assert main(["probe", "--incident", str(folder)]) == 2
    assert "expected an incident's report.json and batch.pt" in capsys.readouterr().err
    (folder.parents[1] / "config.yaml").unlink()
    assert main(["probe", "--incident", str(folder)]) == 2
    assert "expected the run's config.yaml" in capsys.readouterr().err


def test_the_incident_that_a_run_wrote_is_replayed_to_the_same_culprit(settings, capsys, monkeypatch):
    """From a run's own folder: batch, weights and report as the guard left them."""
    from fsdet import objective

    honest, calls = objective.dfl_loss, []

    def dfl_loss(logits, distance):
        rows = honest(logits, distance)
        calls.append(1)
        return rows * float("nan") if len(calls) in (2, 3) else rows  # the second step, and its replay

    monkeypatch.setitem(objective.KINDS, "dfl", (dfl_loss, objective.KINDS["dfl"][1]))
    config = settings("optim.steps=3")
    tasks.build(config).fit()
    (folder,) = (Path(config.run.dir) / "incidents").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["evidence"]["cause"] == "loss" and list(report["evidence"]["losses"]) == ["dfl"]
    assert report["image_ids"] and len(report["last_norms"]) == 1 and report["loss_scale"] == 1.0
    calls[:] = [1]
    assert main(["probe", "--incident", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "bad_loss at step 1, epoch 1; dfl_loss (rows [0" in shown and "NOT FINITE" in shown


def test_a_pixel_that_is_not_finite_is_bad_input_with_its_image(settings):
    """Set behind the loader's back; the step sees it before any forward."""
    config = settings()
    task, _ = tasks.build_task(config, tasks.read_data(config), resume=True)
    batch = task.batch(0)
    assert batch.finite() and batch.unsound() == ()
    batch = task.batch(0)
    batch.query[1, 0, 3, 3] = torch.nan
    assert not batch.finite() and batch.unsound() == (batch.image_ids[1],)
    batch = task.batch(0)
    batch.targets.boxes[0, 0, 2] = torch.inf
    assert not batch.finite() and batch.unsound() == (batch.image_ids[0],)


def test_the_probe_speaks_when_the_trunk_is_frozen(settings):
    """The head's inputs have no gradient then; its outputs have."""
    text = inspect.probe(settings("stage.freeze=[backbone, neck]"))
    rows = [line.split() for line in text.splitlines()[1:4]]
    assert [r[0] for r in rows] == ["bbox", "cls", "dfl"] and all(float(r[4]) > 0 for r in rows)
    assert "no loss has a gradient here" in inspect.probe(settings("stage.freeze=[backbone, neck, head, support]"))


@pytest.fixture(scope="module")
def bench():
    return injection.Bench()


def test_the_probe_stops_at_the_heads_inputs(bench):
    """The oracle runs the head alone, on leaves that no neck connects."""
    model, batch = bench.model, bench.batch
    seen = probe.measure(bench.losses(batch))
    pyramid = model.features(batch.query)
    leaves = [level.detach().requires_grad_() for level in pyramid.levels]
    ways = class_prototypes(model.instances(batch.support, batch.support_boxes), batch.support_way, batch.ways)
    output = model.with_prototypes(model.head(Pyramid(tuple(leaves), pyramid.strides)), ways)
    losses = bench.objective(output, batch.targets, batch.class_ids, contrast=model.contrast).weighted
    for row in seen:
        grads = torch.autograd.grad(losses[row.name], leaves, retain_graph=True, allow_unused=True)
        assert row.norm == pytest.approx(
            float(torch.nn.utils.get_total_norm([g for g in grads if g is not None])), rel=1e-4
        )


@pytest.mark.parametrize("place", injection.PLACES)
def test_an_injected_fault_is_named(bench, place):
    """One of each kind; sixty below, and hundreds in scripts/bench/soak.py."""
    fault = injection.Injection("dfl", place, 7)
    assert injection.misnamed(fault, injection.strike(bench, fault)) is None


@pytest.mark.slow
def test_sixty_injected_faults_are_named_and_leave_no_trace(bench):
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    wrong = [injection.misnamed(f, injection.strike(bench, f)) for f in injection.faults(60)]
    assert [w for w in wrong if w] == []
    assert all(torch.equal(v, before[k]) for k, v in bench.model.state_dict().items())


def test_a_report_that_names_another_place_is_told_from_the_right_one(bench):
    """The check of the checks: a fault compared with another fault's report is misnamed."""
    one, two = injection.Injection("dfl", "row", 1), injection.Injection("bbox", "module", 2)
    reports = [injection.strike(bench, fault) for fault in (one, two)]
    assert injection.misnamed(one, reports[1]) and injection.misnamed(two, reports[0])
