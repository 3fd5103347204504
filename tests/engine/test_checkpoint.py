# SPDX-License-Identifier: AGPL-3.0-or-later
"""A checkpoint is whole or absent, is verified before use, and runs no code."""

import hashlib
import io
import json
import os
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from fsdet.engine import checkpoint
from fsdet.engine.checkpoint import Writer, is_finished, load, newest, snapshot
from fsdet.errors import CheckpointError, RunFailed


def state(step: int, value: float = 1.0, **more) -> dict:
    model = {"w": torch.full((50,), value)}
    return {"model": model, "ema": model, "optimizer": {"state": {}}, "step": step, "batch": step, **more}


def test_a_saved_state_reads_back_and_the_manifest_has_its_hash(tmp_path):
    writer = Writer(tmp_path)
    writer.save(state(3, finished=True, rng={"cpu": torch.get_rng_state()}), best=True, wait=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert (
        sorted(p.name for p in tmp_path.glob("*.pt")) == sorted(manifest) == ["best.pt", "last.pt", "step_00000003.pt"]
    )
    for name, entry in manifest.items():
        assert entry["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() and "replaces" not in entry
    assert load(tmp_path / "best.pt")["step"] == 3 and is_finished(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_the_snapshot_is_taken_at_once_and_keeps_the_memory_layout(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    taken = snapshot({"a": [weight, (1, "x", None)]})
    before, stride = weight.clone(), weight.stride()
    weight.zero_()
    assert torch.equal(taken["a"][0], before) and taken["a"][0].stride() == stride and taken["a"][1] == (1, "x", None)


def test_what_is_not_plain_is_refused_before_it_is_written():
    with pytest.raises(TypeError, match="PosixPath"):
        snapshot({"path": Path("x")})


def test_the_ring_keeps_the_newest_and_leaves_best_alone(tmp_path):
    writer = Writer(tmp_path, keep=2)
    for step in range(1, 6):
        writer.save(state(step, step), best=step == 2, wait=True)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "best.pt",
        "last.pt",
        "step_00000004.pt",
        "step_00000005.pt",
    ]
    assert (load(tmp_path / "best.pt")["step"], load(tmp_path / "last.pt")["step"]) == (2, 5)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "empty": lambda p: p.write_bytes(b""),
    "bit": flip,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(tmp_path, caplog, kind):
    writer = Writer(tmp_path)
    for step in (1, 2):
        writer.save(state(step), wait=True)
    DAMAGE[kind](tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt.*(intact|empty)"):
        load(tmp_path / "last.pt")
    path, found = newest(tmp_path)
    assert path.name == "step_00000002.pt" and found["step"] == 2 and "last.pt" in caplog.text
    DAMAGE[kind](tmp_path / "step_00000002.pt")
    assert newest(tmp_path)[0].name == "step_00000001.pt"


def test_a_flipped_bit_is_seen_without_a_manifest(tmp_path):
    """torch.load does not look at the checksums of the zip archive that a checkpoint is."""
    Writer(tmp_path).save({**state(1), "weight": torch.linspace(0, 1, 5000)}, wait=True)
    path = tmp_path / "last.pt"
    (tmp_path / "manifest.json").unlink()
    whole, needle = bytearray(path.read_bytes()), torch.linspace(0, 1, 5000)[2500:2510].numpy().tobytes()
    assert load(path)["step"] == 1
    whole[whole.index(needle) + 2] ^= 8
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"intact.*a part that is not as it was written \("):
        load(path)


def test_an_archive_that_cannot_be_listed_or_unpacked_is_damage(tmp_path):
    """What zipfile and zlib raise is no traceback either: a repacked checkpoint, cut in its compressed part."""
    Writer(tmp_path).save(state(1), wait=True)
    (tmp_path / "manifest.json").unlink()
    packed, path = io.BytesIO(), tmp_path / "packed.pt"
    with zipfile.ZipFile(tmp_path / "last.pt") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        first = new.infolist()[0]
    start = first.header_offset + 30 + len(first.filename)
    for at, count in ((start, first.compress_size), (packed.getbuffer().nbytes - 10, 4)):
        data = bytearray(packed.getvalue())
        data[at : at + count] = b"\xff" * count
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="intact"):
            load(path)


@pytest.mark.parametrize("kind", ["truncated", "empty"])
def test_damage_is_seen_without_a_manifest_too(tmp_path, kind):
    Writer(tmp_path).save(state(1), wait=True)
    (tmp_path / "manifest.json").unlink()
    DAMAGE[kind](tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="an empty file. Next: copy it again" if kind == "empty" else "intact"):
        load(tmp_path / "last.pt")


def test_an_empty_file_is_told_as_one_and_is_not_advised(tmp_path):
    """A copy that was cut off, or a full disk; no manifest came with it."""
    Writer(tmp_path).save(state(1), best=True, wait=True)
    (tmp_path / "manifest.json").unlink()
    best = tmp_path / "best.pt"
    assert checkpoint.to_judge(tmp_path) == best and checkpoint.damage(best) is None
    best.unlink()
    best.write_bytes(b"")
    assert f"{best}: expected a checkpoint, got an empty file. Next: " in (checkpoint.damage(best) or "")
    assert checkpoint.to_judge(tmp_path) == tmp_path / "last.pt"


def test_no_intact_checkpoint_is_an_error_that_lists_the_damaged(tmp_path):
    Writer(tmp_path).save(state(1), wait=True)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt, step_00000001\.pt"):
        newest(tmp_path)


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_payload_is_refused_and_its_code_not_run(tmp_path):
    torch.save({**state(1), "extra": Payload(tmp_path / "touched")}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="not run"):
        load(tmp_path / "bad.pt")
    assert not (tmp_path / "touched").exists()


def test_a_missing_file_and_a_foreign_dict_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="nothing there"):
        load(tmp_path / "none.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="model, ema, optimizer, step"):
        load(tmp_path / "foreign.pt")
    torch.save({**state(1), "format": 99}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="format 99"):
        load(tmp_path / "newer.pt")


def test_non_finite_weights_are_never_written_and_refused_when_found(tmp_path, caplog):
    writer = Writer(tmp_path)
    writer.save(state(1), wait=True)
    with pytest.raises(RunFailed, match=r"model\.w"):
        writer.save(state(2, float("nan")), wait=True)
    with pytest.raises(RunFailed, match=r"objective\.mean"):
        writer.save(state(2, objective={"mean": torch.tensor(float("inf"))}), wait=True)
    assert load(tmp_path / "last.pt")["step"] == 1
    torch.save(state(3, float("inf")), tmp_path / "poisoned.pt")
    with pytest.raises(CheckpointError, match=r"NaN or inf in model\.w"):
        load(tmp_path / "poisoned.pt")


def test_a_full_disk_is_one_warning_and_the_next_save_works(tmp_path, monkeypatch, caplog):
    writer = Writer(tmp_path)
    writer.save(state(1), wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        writer.save(state(2))
        writer.join()
    assert caplog.text.count("not saved") == 1 and "No space left" in caplog.text
    assert load(tmp_path / "last.pt")["step"] == 1 and not list(tmp_path.glob(".*"))
    writer.save(state(3), wait=True)
    assert load(tmp_path / "last.pt")["step"] == 3


class Killed(BaseException):
    """Passes every handler, as SIGKILL does."""


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_kill_before_any_rename_leaves_a_folder_that_verifies(tmp_path, monkeypatch, moment):
    """Five renames in a save: manifest, best, step file, last, manifest."""
    writer, rename, calls = Writer(tmp_path), os.replace, iter(range(1, 6))
    writer.save(state(1), best=True, wait=True)

    def dying(source, target):
        if next(calls) == moment:
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dying)
        writer._write(snapshot(state(2, 2.0)), True)
    steps = {path.name: load(path)["step"] for path in tmp_path.glob("*.pt")}
    assert (steps["last.pt"], steps["best.pt"]) == (1 + (moment > 4), 1 + (moment > 2)) and steps[
        "step_00000001.pt"
    ] == 1
    assert newest(tmp_path)[1]["step"] == steps["last.pt"]
    writer.save(state(3), wait=True)
    assert newest(tmp_path)[1]["step"] == 3


def test_generators_are_restored():
    kept = checkpoint.random_state()
    first = torch.rand(3)
    checkpoint.restore_random_state(kept)
    assert torch.equal(torch.rand(3), first)


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path, caplog):
    """The kernel's own limit, with a write that stops in the middle."""
    writer = Writer(tmp_path)
    writer.save(state(1), wait=True)
    big = state(2) | {"model": {"w": torch.zeros(100_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for _ in range(3):
            writer.save(big)
            writer.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("not saved") == 1 and "File too large" in caplog.text, "one warning, however often"
    assert newest(tmp_path)[1]["step"] == 1 and not list(tmp_path.glob(".*")) and writer.failures == 3
    writer.save(big, wait=True)
    assert newest(tmp_path)[1]["step"] == 2 and "step 2 saved, after 3 that were not" in caplog.text


def test_a_folder_that_vanished_is_made_again_and_told(tmp_path, caplog):
    writer = Writer(tmp_path / "r")
    writer.save(state(1), wait=True)
    shutil.rmtree(tmp_path / "r")
    writer.save(state(2), best=True, wait=True)
    assert "is gone; it is made again" in caplog.text and newest(tmp_path / "r")[1]["step"] == 2
    writer.save(state(3), wait=True)
    assert caplog.text.count("is gone") == 1 and len(list((tmp_path / "r").glob("step_*"))) == 2


def test_files_of_a_way_that_was_left_do_not_push_out_new_ones(tmp_path):
    """Resumed from step 1 because later ones were damaged: those would be the newest of the ring by their names."""
    writer = Writer(tmp_path, keep=2)
    for step in (1, 8, 9):
        writer.save(state(step), wait=True)
    (tmp_path / "step_00000007.pt").write_bytes(b"no manifest knows it")
    writer.save(state(2), wait=True)
    writer.save(state(3), wait=True)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000002.pt", "step_00000003.pt"]
    assert set(json.loads((tmp_path / "manifest.json").read_text())["files"]) == {p.name for p in tmp_path.glob("*.pt")}


def test_a_run_is_finished_when_its_last_save_is(tmp_path, monkeypatch):
    writer, rename, calls = Writer(tmp_path), os.replace, iter(range(1, 9))
    writer.save(state(1), wait=True)

    def dying(source, target):
        if next(calls) == 4:  # manifest, step file, last.pt are there
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dying)
        writer._write(snapshot(state(2, finished=True)), False)
    assert load(tmp_path / "last.pt")["finished"] and not is_finished(tmp_path)
    writer.save(state(2, finished=True), wait=True)
    assert is_finished(tmp_path)


@pytest.mark.parametrize("files", [{"best.pt": "abc"}, ["best.pt"], None])
def test_a_manifest_whose_entries_are_none_vouches_for_nothing(tmp_path, files):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files, "finished": True}))
    (tmp_path / "best.pt").write_bytes(b"any")
    assert checkpoint.damage(tmp_path / "best.pt") is None
    assert checkpoint.read_manifest(tmp_path) == {"files": {}, "finished": True}
