# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet probe --incident` names what was not finite, with the run's own weights, and says when nothing is."""

import json
import shutil

import pytest
import torch

from fsdet import tasks
from fsdet.cli.main import main
from fsdet.engine.guard import plain


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
    assert "first output that is not finite: backbone.0.conv (Conv2d)" in shown
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
    assert "not finite in float32: head.bias (Grad stats: " in capsys.readouterr().out


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
