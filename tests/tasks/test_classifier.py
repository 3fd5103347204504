# SPDX-License-Identifier: AGPL-3.0-or-later
"""The classifier: its losses by their definitions, data that are looked at first, stages that thaw, several classes."""

import itertools
import math
import shutil
from functools import partial

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from dataset_files import image
from fsdet import config, tasks
from fsdet.engine.freezing import Freezer
from fsdet.engine.schedule import lr_factor
from fsdet.errors import ConfigError, DataError
from tasks import others

pytestmark = pytest.mark.usefixtures("free_fsync")


@pytest.fixture
def pages(sets):
    return sets["classifier"]


@pytest.fixture
def small(of_task):
    return partial(of_task, "classifier")


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    """Three classes, one of them rare; the brightness tells."""
    root = tmp_path_factory.mktemp("animals")
    for split in ("train", "val"):
        for name, count in (("ant", 6), ("bee", 6), ("cat", 3)):
            for i in range(count):
                image(root / split / name / f"{name}{i}.png", (32, 32), seed=len(split))
    return root


def test_two_classes_share_a_logit_and_the_positive_one_is_what_it_says(small):
    loss = []
    for name in ("forged", "genuine"):
        task = others.built(small(f"classifier.positive={name}", "classifier.loss=bce"))
        labels = torch.tensor([0, 1])
        loss.append(task.rows(torch.tensor([[3.0], [3.0]]), labels))
        own = task.data.names.index(name)
        assert loss[-1][own] == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-5)
        assert loss[-1][1 - own] == pytest.approx(math.log(1 + math.exp(3)), rel=1e-5)
        assert task.judge.positive == own
    with pytest.raises(ConfigError, match=r"'forgd'\. Did you mean 'forged'"):
        others.built(small("classifier.positive=forgd"))


def test_scores_follow_the_positive_class(small, monkeypatch):
    for name, column in (("forged", 0), ("genuine", 1)):
        task = others.built(small(f"classifier.positive={name}"))
        with torch.no_grad():
            task.model.classifier[1].bias.fill_(2.0)
            task.model.classifier[1].weight.zero_()
        scores = task.judge.scores(task.model.eval())
        assert scores[:, column] == pytest.approx(1 / (1 + math.exp(-2))) and scores.sum(1) == pytest.approx(1.0)


def test_the_sheet_says_what_an_image_is_beside_what_it_is_taken_for(small):
    task = others.built(small())
    with torch.no_grad():
        task.model.classifier[1].bias.fill_(9.0)  # every page is taken for the positive class
    said = task.data.names[task.judge.positive]
    titles = [picture.title for picture in task.judge._pictures(task.model.eval())]
    assert titles == [f"{said} 1.00, true: {task.data.names[true]}" for true in task.judge.true]


def test_focal_is_stable_where_its_naive_form_is_not_and_bce_weighs_positives(small):
    task = others.built(small("classifier.positive=forged"))
    logits = torch.tensor([[-120.0], [120.0]], requires_grad=True)  # both confidently wrong
    rows = task.rows(logits, torch.tensor([0, 1]))
    rows.sum().backward()
    assert rows.isfinite().all() and logits.grad.abs().min() > 0.99
    weighted = others.built(small("classifier.loss=bce", "classifier.pos_weight=3", "classifier.positive=forged"))
    z = torch.tensor([[0.3], [-0.7]])
    want = binary_cross_entropy_with_logits(
        z, torch.tensor([[1.0], [0.0]]), pos_weight=torch.tensor(3.0), reduction="none"
    )
    torch.testing.assert_close(weighted.rows(z, torch.tensor([0, 1])), want[:, 0])


def test_pos_weight_auto_is_negatives_over_positives_of_train(small, animals):
    assert others.built(small("classifier.loss=bce", "classifier.pos_weight=auto")).pos_weight == 1.0
    several = others.built(
        small(f"data.path={animals}", "classifier.positive=null", "classifier.loss=bce", "classifier.pos_weight=auto")
    )
    assert several.pos_weight == 2.0, "each image is one of three"


@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_more_than_two_classes_have_a_column_each(small, animals, loss):
    task = others.built(small(f"data.path={animals}", "classifier.positive=null", f"classifier.loss={loss}"))
    assert task.spec["columns"] == 3
    report = task.losses(task.batch(0))
    expected = task.expected_initial(report)["cls"]
    assert expected == pytest.approx(3 * math.log(2) * (0.25 if loss == "focal" else 1.0), rel=1e-5)
    assert float(report.raw["cls"].detach()) == pytest.approx(expected, rel=0.1)
    found = task.evaluate(task.model)
    assert (
        set(found) == {"val/accuracy", "val/f1", "val/auc", "val/fitness"} and found["val/fitness"] == found["val/auc"]
    )


def test_data_are_looked_at_before_the_first_step(small, pages, tmp_path):
    copy = shutil.copytree(pages.parent, tmp_path / "copy")
    victim = next((copy / "train/forged").iterdir())
    victim.write_bytes(victim.read_bytes()[:-400])
    with pytest.raises(DataError, match=f"sound data, got 1 error\n.*{victim.name}(?!.*Next:.*Next:)"):
        tasks.build(small(f"data.path={copy}"))
    trusting = small(f"data.path={copy}", "classifier.validate_data=false")
    assert tasks.build_task(trusting, tasks.read_data(trusting), resume=False)


def test_a_file_that_is_no_picture_is_named_before_the_first_step(small, pages, tmp_path):
    copy = shutil.copytree(pages.parent, tmp_path / "copy")
    (copy / "train/forged/notes.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"got 1 error\n.*train/forged/notes\.jpg: unreadable image"):
        tasks.build(small(f"data.path={copy}"))
    trusting = small(f"data.path={copy}", "classifier.validate_data=false")
    assert tasks.build_task(trusting, tasks.read_data(trusting), resume=False)


def test_a_class_without_training_images_is_refused(small, animals, tmp_path):
    """It would be a column that is never taught, or a class of val that everything is wrong about."""
    copy = shutil.copytree(animals, tmp_path / "copy")
    (copy / "train/dog").mkdir()
    (copy / "train/bee").rename(copy / "bee")
    shutil.move(copy / "bee", tmp_path / "bee")
    with pytest.raises(
        DataError, match=r"training images of every class, got none of bee \(val 6\); none of dog\. Next"
    ):
        tasks.build(small(f"data.path={copy}", "classifier.positive=null"))


def test_parts_thaw_by_epoch_and_frozen_statistics_stand_still(small):
    """backbone frozen in epoch 1, all but its first stage in epoch 2, nothing from epoch 3 on."""
    schedule = "stage.freeze={1: [backbone], 2: [backbone.conv1, backbone.bn1, backbone.layer1], 3: []}"
    task = others.built(small(schedule))
    freezer = Freezer(task, task.config.stage.freeze)
    backbone, statistics = task.model.backbone, {}
    for epoch, trains, still in ((1, set(), {"bn1", "layer1", "layer4"}), (2, {"layer4"}, {"bn1", "layer1"}),
                                 (3, {"conv1", "layer1", "layer4"}, set())):  # fmt: skip
        freezer.apply(epoch)
        moving = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
        assert moving & {"conv1", "layer1", "layer4"} == trains, epoch
        statistics = {n: b.clone() for n, b in backbone.named_buffers() if n.endswith("running_mean")}
        task.losses(task.batch(0)).total.backward()
        stood = {
            n.split(".")[0] for n, b in backbone.named_buffers() if n in statistics and torch.equal(b, statistics[n])
        }
        assert stood & {"bn1", "layer1", "layer4"} == still, epoch
        frozen = [p for p in backbone.parameters() if not p.requires_grad]
        assert all(p.grad is None for p in frozen)
        task.model.zero_grad(set_to_none=True)


def test_the_shipped_rate_warms_up_for_three_epochs_restarts_and_never_falls_below_its_lowest():
    shipped = config.load(others.ROOT / "configs/docuforge.yaml")
    o = shipped.optim
    assert (o.min_lr, o.clip_norm, o.warmup_epochs, o.schedule, o.epochs) == (1e-8, 0.5, 3, "restarts", 40)
    assert set(o.lr_scale) == {"backbone", "attention", "classifier"}
    rates = [o.lr * lr_factor(i, 400, 30, o.schedule, o.min_lr / o.lr, restarts=o.restarts) for i in range(400)]
    assert all(a < b for a, b in itertools.pairwise(rates[:30])) and min(rates) >= 1e-8
    rises = [i for i in range(31, 400) if rates[i] > rates[i - 1]]
    assert len(rises) == o.restarts - 1 and all(rates[i] > 0.99 * o.lr for i in rises)
    assert min(rates[30:]) < 1e-3 * o.lr


@pytest.mark.parametrize(
    "line",
    ["classifier.loss=bce classifier.pos_weight=auto", "classifier.head=dropout classifier.dropout=0.5",
     "stage.freeze=[backbone.conv1,backbone.bn1,backbone.layer1,backbone.layer2,backbone.layer3]"],
)  # fmt: skip
def test_the_alternatives_that_the_shipped_file_names_are_settings(line, small):
    assert line in (others.ROOT / "configs/docuforge.yaml").read_text(encoding="utf-8")
    config.load(others.ROOT / "configs/docuforge.yaml", line.split())
    trainer = tasks.build(small("optim.lr_scale.attention=0.1", *line.split()))
    report = trainer.controller.run([trainer.task.batch(0)], lr_factor=1.0, clip_norm=0.5)
    assert report.committed and report.grad_l2_postclip <= 0.5 + 1e-6


def test_frozen_noise_is_told(small, caplog):
    tasks.build(small("stage.freeze=[backbone]"))
    assert [m for m in caplog.messages if "from scratch" in m and "frozen: backbone is noise" in m]
    tasks.build(small("stage.freeze_norm=true"), exist_ok=True)
    assert [m for m in caplog.messages if "from scratch, and BatchNorm frozen" in m]


def test_sections_of_another_task_are_refused(tmp_path):
    for line, told in (
        (["task=classifier", "episode.ways=3"], "key 'episode.ways': expected nothing, as task 'classifier'"),
        (["classifier.gamma=1"], "key 'classifier': expected nothing, as task 'fewshot' does not read it"),
        (["task=maskrcnn", "loss.bbox=wiou_v3"], "it belongs to task 'fewshot'"),
    ):
        with pytest.raises(ConfigError, match=told):
            config.load(None, line)
