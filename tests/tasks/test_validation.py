# SPDX-License-Identifier: AGPL-3.0-or-later
"""The sheets of a validation: what is dashed as truth is what was looked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fsdet.data.sources import load
from fsdet.errors import DataError
from fsdet.tasks import loading, supply, validation

EPISODIC = ("stage.name=episodic", "episode.ways=2")


def drawn(best, settings, monkeypatch, tmp_path, *overrides: str):
    """The validator of a config, and (supports, queries, title) of its sheet."""
    sheets = []

    def sheet(supports, queries, out, *, title=""):
        sheets.append((supports, queries, title))
        return out

    monkeypatch.setattr(validation, "episode_sheet", sheet)
    config = settings(*overrides)
    validator = validation.Validator(config, load(config.data.path))
    validator.illustrate(loading.load_trained(best).model, tmp_path, 7)
    (only,) = sheets
    return validator, *only


def truths(validator, classes) -> list[list]:
    """Boxes of `classes` in the first images of val that hold one."""
    records = [r for r in validator.store.records if set(classes) & set(r.labels.tolist())][: validation.SHOWN]
    return [[box for box, c in zip(r.boxes.tolist(), r.labels.tolist(), strict=True) if c in classes] for r in records]


def test_an_episode_dashes_only_the_classes_that_are_sought(best, settings, monkeypatch, tmp_path):
    validator, supports, queries, title = drawn(best, settings, monkeypatch, tmp_path, *EPISODIC)
    sought = {picture.colours[0] for picture in supports}
    assert 0 < len(sought) <= validation.SHOWN_WAYS < len(validator.base)
    shown = [q.truth.tolist() for q in queries]
    assert shown == truths(validator, sought) and all(shown)
    assert sum(map(len, shown)) < sum(len(r.boxes) for r in validator.store.records)  # there were others to leave out
    assert "step 7" in title and "classes on the left" in title


@pytest.mark.parametrize("stage", ["base", "finetune"])
def test_without_supports_every_base_class_is_dashed(best, settings, monkeypatch, tmp_path, stage):
    validator, supports, queries, title = drawn(best, settings, monkeypatch, tmp_path, f"stage.name={stage}")
    assert not supports and title.endswith("dashed: truth")
    assert [q.truth.tolist() for q in queries] == truths(validator, set(validator.base))
    listed = json.loads((tmp_path / "step_000007.json").read_text())
    assert [[row[:4] for row in image["true"]] for image in listed["images"]] == truths(validator, set(validator.base))
    assert [len(image["found"]) for image in listed["images"]] == [len(q.boxes) for q in queries]
    assert all(Path(image["path"]).is_file() for image in listed["images"])
    assert listed["names"] == list(validator.data.names)
    assert all(c < len(validator.base) for r in validator.store.records for c in r.labels.tolist())


def test_a_training_looks_at_images_from_all_over_a_large_split(settings, monkeypatch):
    monkeypatch.setattr(supply, "MOST", 3)
    config = settings(*EPISODIC)
    data = load(config.data.path)
    records = data.split("val")
    step = -(-len(records) // 3)
    assert step > 1
    looked = [r.path for r in validation.Validator(config, data).store.records]
    assert looked == [r.path for r in records[::step]]


def test_an_image_of_val_that_cannot_be_read_is_left_out_and_named(best, settings, tmp_path, caplog):
    config, model = settings(*EPISODIC), loading.load_trained(best).model
    data, broken = load(config.data.path), tmp_path / "broken.jpg"
    broken.write_bytes(b"<html>")
    validator, without = validation.Validator(config, data), validation.Validator(config, data)
    validator.store.records[1] = replace(validator.store.records[1], path=broken)
    without.store.records.pop(1)
    without._count_on()
    assert validator.evaluate(model) == pytest.approx(without.evaluate(model), nan_ok=True)
    assert [m for m in caplog.messages if m.startswith("left out of validation, 5 images") and "broken.jpg" in m]


def test_a_support_that_cannot_be_read_is_replaced_and_named(best, settings, monkeypatch, tmp_path, caplog):
    """Its image is left out of what supports are drawn from, in a validation and in its sheet."""
    config, model = settings(*EPISODIC), loading.load_trained(best).model
    data, broken = load(config.data.path), tmp_path / "broken.jpg"
    broken.write_bytes(b"<html>")
    validator, without = validation.Validator(config, data), validation.Validator(config, data)

    def damage() -> None:
        first = validator.picks[validator.ways[0]][0][0]
        validator.supports.records[first] = replace(validator.supports.records[first], path=broken)
        without.supports.records.pop(first)
        without._draw_supports()

    damage()
    assert validator.evaluate(model) == pytest.approx(without.evaluate(model), nan_ok=True)
    assert [m for m in caplog.messages if m.startswith("other supports for validation") and "broken.jpg" in m]
    damage()
    assert validator.illustrate(model, tmp_path, 1)[0].is_file() and validator.picks == without.picks
    for i, record in enumerate(validator.supports.records):
        validator.supports.records[i] = replace(record, path=broken)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        validator.evaluate(model)


def test_where_no_class_has_enough_instances_the_standard_branch_alone_is_judged(best, settings, monkeypatch, tmp_path,
                                                                                 caplog):  # fmt: skip
    """A small set of one's own."""
    monkeypatch.setattr(validation, "VALIDATION_SHOTS", 1000)
    validator, supports, queries, _ = drawn(best, settings, monkeypatch, tmp_path, *EPISODIC)
    assert not supports and [q.truth.tolist() for q in queries] == truths(validator, set(validator.base))
    figures = validator.evaluate(loading.load_trained(best).model)
    assert not any("by_prototype" in name for name in figures) and validator.best_metric in figures
    assert "no base class has 1000 training instances" in caplog.text
