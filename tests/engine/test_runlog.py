# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run writes can be read back by those who look for it, and no sink can stop a training."""

import json
import logging
import math
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image

from engine.test_guard import report
from engine.test_step import spoiled
from engine.test_trainer import rows, same
from engine.toy import ToyTask, trainer
from fsdet.config import Log, Wandb
from fsdet.engine import runlog
from fsdet.engine.checkpoint import load
from fsdet.engine.guard import Flag
from fsdet.engine.records import Records, cut_rows, input_block
from fsdet.engine.runlog import AXIS, RunLog, step_values

WANDB_KEYS = {
    "train_step/global_step", "train_step/dfl_loss", "train_step/weighted/dfl", "train_step/total_loss",
    "train_step/grad_norm", "train_step/grad_l2_postclip", "train_step/clip_ratio", "train_step/loss_scale",
    "train_step/lr/head", "health/committed_total", "epoch",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run with everything that is local switched on."""
    folder = tmp_path_factory.mktemp("run") / "r"
    options = Log(every=1, debug=True, tensorboard=True, probe_every=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(ToyTask(), folder, log=options, changes={"clip_norm": 2.0}).fit()
    return folder


@pytest.mark.parametrize("words, count", [("NaN/Inf gradient", 0), ("Skipping optimizer step", 0), ("bbox_loss:", 10),
                                          ("Total Loss:", 10), ("Total Grad Norm:", 10), ("Norm after clip", 10),
                                          ("Gradient Norms:", 1), ("Loss Components:", 1),
                                          ("Input check:", 1)])  # fmt: skip
def test_the_log_answers_the_greps(run, words, count):
    assert sum(words in line for line in (run / "training_debug.log").read_text().splitlines()) == count


def test_the_debug_blocks_come_at_the_first_step_and_every_fifty_and_agree_with_the_row(tmp_path):
    task = ToyTask(batches_per_epoch=60)
    options = Log(every=100, debug=True)
    trainer(task, tmp_path / "r", log=options, changes={"epochs": 1, "clip_norm": 0.5}).fit()
    text = (tmp_path / "r/training_debug.log").read_text()
    for words in ("Input check:", "Gradient Norms:", "Loss Components:"):
        places = [line.split(words)[0] for line in text.splitlines() if words in line]
        assert places == ["step 1 ", "step 51 "], words
    (row,) = rows(tmp_path / "r", "step")
    block = text[text.index("Gradient Norms:") :].splitlines()
    assert float(block[1].removeprefix("  total: ")) == pytest.approx(row["grad_l2_preclip"], rel=1e-5)
    norms = [float(line.split(": ")[1]) for line in block[2:6]]
    assert norms == sorted(norms, reverse=True) and norms[0] < row["grad_l2_preclip"]
    parts = text[text.index("Loss Components:") :].splitlines()
    assert parts[1] == f"  total: {row['total']:.6f}"
    assert parts[2] == f"    bbox: raw {row['raw']['bbox']:.6f}, weighted {row['weighted']['bbox']:.6f}"


def test_the_input_check_counts_what_is_no_pixel():
    batch = ToyTask().batch(0)
    batch.pixels.view(-1)[:6] = torch.tensor([math.nan, math.inf, -math.inf, 11.0, -12.0, 9.0])
    answer, pixels = input_block([batch]).splitlines()[1:]
    assert "0.pixels [4, 3, 8, 8]: min=-12, max=11" in pixels and "0.answer [4]" in answer
    assert pixels.endswith("|x| > 10: 2, NaN: 1, inf: 2") and "|x|" not in answer


def test_the_norm_after_clip_never_exceeds_the_threshold_and_the_one_before_does(run):
    lines = (run / "training_debug.log").read_text().splitlines()
    after = [float(line.split("Norm after clip: ")[1].split()[0]) for line in lines if "Norm after clip" in line]
    before = [float(line.split("Total Grad Norm: ")[1].split()[0]) for line in lines if "Total Grad Norm:" in line]
    assert max(after) <= 2.0 < max(before) and all(a <= b for a, b in zip(after, before, strict=True))


def test_every_json_line_is_json_and_equal_runs_have_equal_files(run, tmp_path):
    for name in ("metrics.jsonl", "timings.jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in (run / name).read_text().splitlines())
    assert {r["kind"] for r in rows(run)} == {"step", "probe", "val"}
    trainer(ToyTask(), tmp_path / "again", log=Log(every=1, probe_every=5), changes={"clip_norm": 2.0}).fit()
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "again/metrics.jsonl").read_bytes()
    first = json.loads((run / "timings.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and first["seconds"]["step"] > 0


def test_the_environment_and_the_configuration_are_kept(run):
    content = json.loads((run / "environment.json").read_text())
    assert content["threads"] == 1 and content["versions"]["torch"] and content["device"] == "cpu"
    assert (run / "config.yaml").read_text() == "task: toy\n"


def test_tensorboard_reads_it_back(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
    assert len(events.Scalars("val/score")) == 2
    logged = rows(run, "step")
    figures = {"train_step/total_loss": "total", "train_step/grad_norm": "grad_l2_preclip",
               "train_step/grad_l2_postclip": "grad_l2_postclip", "train_step/clip_ratio": "clip_ratio"}  # fmt: skip
    for key, name in figures.items():
        assert [(e.step, e.value) for e in events.Scalars(key)] == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged
        ]
    for group in ("raw", "weighted"):
        key = {"raw": "train_step/{}_loss", "weighted": "train_step/weighted/{}"}[group]
        for name in ("bbox", "cls"):
            assert [e.value for e in events.Scalars(key.format(name))] == pytest.approx(
                [row[group][name] for row in logged], rel=1e-6
            )


def pictures(folder):
    """A sheet, and the list of its images beside it."""
    photo = Image.new("RGB", (40, 20), "red")
    turned = photo.getexif()
    turned[0x0112] = 6  # to be seen a quarter turn to the right
    photo.save(folder / "photo.jpg", exif=turned)
    sheet = folder / "step_000007.jpg"
    Image.new("RGB", (60, 30)).save(sheet)
    entry = {"path": str(folder / "photo.jpg"), "true": [[1, 2, 9, 12, 0]], "found": [[1, 2, 8, 11, 1, 0.75]]}
    sheet.with_suffix(".json").write_text(json.dumps({"step": 7, "names": ["cat", "dog"], "images": [entry]}))
    return sheet


@pytest.mark.filterwarnings("ignore")
def test_pictures_and_alerts_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, Log(tensorboard=True), {}) as log:
        log.flag(Flag("dfl_high", "too high"), 7, 1, 7)
        log.pictures([pictures(tmp_path)], 7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("media/episodes")
    assert (image.step, image.width, image.height) == (7, 60, 30)
    assert events.Tensors("alerts/dfl_high/text_summary")[0].tensor_proto.string_val == [b"too high"]


@pytest.mark.filterwarnings("ignore")
def test_a_tensorboard_that_breaks_goes_silent(tmp_path, monkeypatch, caplog):
    log = RunLog(tmp_path, Log(tensorboard=True), {})

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    for name in ("add_scalar", "add_text", "add_image"):
        monkeypatch.setattr(log.sinks[0].writer, name, full)
    with log:
        log.flag(Flag("dfl_high", "too high"), 1, 1, 1)
        log.step(report(), 1, 1, 10.0, {"committed": 1})
        log.pictures([pictures(tmp_path)], 1)
    assert caplog.text.count("TensorBoard stopped working (no space left on device)") == 1


def test_the_keys_of_a_step_are_the_ones_people_look_for():
    values = step_values(report(norm=20.0, ratio=2.0, dfl=2.7), 1, {"committed": 1})
    assert WANDB_KEYS <= values.keys()
    assert (values["train_step/grad_norm"], values["train_step/grad_l2_postclip"]) == (20.0, 10.0)


def test_the_share_of_saturated_rows_is_logged_where_a_loss_has_a_clamp(tmp_path):
    clamped = replace(report(dfl=2.7), saturated={"dfl": 0.25})
    assert step_values(clamped, 1, {"committed": 1})["train_step/saturated/dfl"] == 0.25
    with RunLog(tmp_path, Log(), {}) as log:
        for one in (clamped, report(dfl=2.7)):
            log.step(one, 1, 1, 10.0, {"committed": 1})
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["saturated"] == {"dfl": 0.25} and "saturated" not in second


def test_rows_after_the_position_of_a_resume_are_cut_with_a_half_written_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"batch": b}) + "\n" for b in range(1, 6)) + '{"batch": 6, "los')
    cut_rows(path, 3)
    assert [json.loads(line)["batch"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_file_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    records = Records(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    records.open()
    records.step(report(), 1, 1, 10.0)
    records.close()
    assert caplog.text.count("cannot be written") == 1
    assert "Total Loss" in (tmp_path / "training_debug.log").read_text()


def test_the_logger_is_left_as_it_was(tmp_path):
    logger = logging.getLogger("fsdet")
    before = (logger.level, list(logger.handlers))
    with RunLog(tmp_path, Log(), {}):
        assert len(logger.handlers) == len(before[1]) + 1
    assert (logger.level, list(logger.handlers)) == before


def inspected(folder) -> str:
    """The offline run as the wandb command line reads it."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    done = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)], capture_output=True,
                          text=True, timeout=60, check=True)  # fmt: skip
    return done.stdout


@pytest.mark.filterwarnings("ignore")
def test_an_offline_wandb_run_reads_back_with_its_keys(tmp_path):
    with RunLog(tmp_path, Log(wandb=Wandb(mode="offline", name="toy")), {"task": "toy"}) as log:
        log.step(report(norm=20.0, ratio=2.0, dfl=2.7), 1, 1, 10.0, {"committed": 1})
        log.step(report("bad_loss", norm=math.nan, total=math.nan, dfl=math.nan), 1, 2, 10.0, {"bad_loss": 1})
        log.flag(Flag("dfl_high", "too high"), 1, 1, 1)
        log.evaluation({"val/base/AP50": 0.5}, 1, 1.0, 1)
        log.pictures([pictures(tmp_path)], 1)
    text = inspected(tmp_path)
    media = next(tmp_path.glob("wandb/offline-run-*/files/media"))
    (photo,) = (media / "images/media").glob("validation*.jpg")
    assert Image.open(photo).size == (20, 40), "upright"
    boxes = [json.loads(path.read_text()) for path in (media / "metadata/boxes2D").rglob("*.json")]
    assert {box["box_caption"] for found in boxes for box in found["box_data"]} == {"cat", "dog 0.75"}
    assert boxes[0]["box_data"][0]["position"]["minX"] == 1 and list((media / "images/media").glob("episodes*"))
    assert '"alert"' in text and "dfl_high" in text
    for key in (*WANDB_KEYS, "val/base/AP50", "health/bad_loss_total"):
        assert key in text, key
    assert "NaN" not in text


@pytest.mark.filterwarnings("ignore")
def test_a_dead_wandb_server_costs_bounded_time_and_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(runlog, "INIT_SECONDS", 2.0)
    began = time.monotonic()
    trainer(ToyTask(), tmp_path / "r", log=Log(every=1, wandb=Wandb(mode="auto"))).fit()
    assert time.monotonic() - began < 30
    assert caplog.text.count("cannot start online") == 1 and "logging offline instead" in caplog.text
    assert list((tmp_path / "r/wandb").glob("offline-run-*")) and len(rows(tmp_path / "r", "step")) == 10


def test_a_missing_wandb_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trainer(ToyTask(), tmp_path / "r", log=Log(wandb=Wandb(mode="auto"))).fit()
    assert caplog.text.count("wandb is not installed") == 1


def test_a_wandb_run_that_breaks_goes_silent(tmp_path, monkeypatch, caplog):
    class Broken:
        def log(self, values):
            raise OSError("broken pipe")

        alert = finish = log

    class Fake(runlog.WandbSink):
        def __init__(self, *args):
            self.run, self._failed, self._mistakes = Broken(), False, (OSError, TypeError)

    monkeypatch.setattr(runlog, "WandbSink", Fake)
    trainer(ToyTask(), tmp_path / "r", log=Log(every=1, wandb=Wandb(mode="offline"))).fit()
    assert caplog.text.count("W&B stopped working (broken pipe)") == 1
    assert AXIS == "train_step/global_step"


def test_a_rejected_step_alerts_with_its_culprit_and_its_report(tmp_path, monkeypatch):
    alerts = []

    class Sink:
        def __init__(self, *args):
            self.log = self.pictures = self.close = lambda *a, **k: None

        def alert(self, title, text):
            alerts.append((title, text))

    monkeypatch.setattr(runlog, "WandbSink", Sink)
    task = ToyTask(spoil=lambda b, r: spoiled("bbox", float("nan"))(b, r) if b.index == 3 else r)
    trainer(task, tmp_path / "r", log=Log(every=1, wandb=Wandb(mode="offline"))).fit()
    ((title, text),) = [a for a in alerts if "rejected" in a[0]]
    assert title == "step rejected: bad_loss" and "step 3: bbox_loss (rows [1] of image_3_1)" in text
    assert str(tmp_path / "r/incidents/step_3/report.json") in text


class Full:
    """An open file whose disk has no space any more."""

    def __init__(self, file):
        self.file, self.fileno = file, file.fileno

    def write(self, text):
        raise OSError(28, "No space left on device")

    def close(self):
        self.file.close()
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl", "training_debug.log", "results.csv"])
def test_a_disk_that_is_full_for_a_log_costs_one_warning_and_no_step(tmp_path, caplog, name):
    files = []

    def spoil(batch, report):
        if batch.index == 4 and name == "results.csv":
            (tmp_path / "r" / name).mkdir()
        elif batch.index == 4:
            files.append(run.log.records._files[name])
            run.log.records._files[name] = Full(files[0])
        return report

    run = trainer(ToyTask(spoil=spoil, batches_per_epoch=10), tmp_path / "r", changes={"epochs": 1})
    assert run.fit().steps == 10
    for file in files:
        file.close()
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 1 and name in told[0]
    trainer(ToyTask(batches_per_epoch=10), tmp_path / "a", changes={"epochs": 1}).fit()
    assert same(load(tmp_path / "a/last.pt")["model"], load(tmp_path / "r/last.pt")["model"])
