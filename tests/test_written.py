# SPDX-License-Identifier: AGPL-3.0-or-later
"""What runs have put beside an index: known by its bytes, replaced and removed only as it was written."""

import hashlib
import json
from pathlib import Path

import pytest

from fsdet import written
from fsdet.files import write_durably
from fsdet.written import Journal, earlier, recorded, remove_unchanged


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_an_index_and_notes_are_one_record_and_only_files_as_noted_are_in_it(tmp_path):
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"written": ["old.jpg", "bare.mp4", "again.jpg"],
                                 "sha256": {"old.jpg": sha256(b"old"), "again.jpg": sha256(b"before")}}))  # fmt: skip
    Journal(index).write(tmp_path, {"again.jpg": b"now", "new.jpg": b"new", "changed.jpg": b"ours"})
    Journal(index, removable=False).write(tmp_path, {"film.mp4": b"film"})
    Journal(index).note({"never.jpg": sha256(b"never written")})
    (tmp_path / "changed.jpg").write_bytes(b"a user's")
    known = {"old.jpg": sha256(b"old"), "bare.mp4": "", "again.jpg": sha256(b"now"), "new.jpg": sha256(b"new")}
    assert recorded(index) == known | {"film.mp4": ""}
    assert earlier(index, ["new.jpg"]) == {"again.jpg": sha256(b"now"), "film.mp4": ""}, "the others do not lie there"


def test_what_this_run_has_written_is_not_read_again(tmp_path, monkeypatch):
    index = tmp_path / "index.json"
    done = Journal(index).write(tmp_path, {"a.jpg": b"a", "b.jpg": b"b"})
    monkeypatch.setattr(written, "sha256_of", lambda path: pytest.fail(f"{path} is read"))
    assert earlier(index, done) == {}


def test_what_is_as_it_was_written_is_removed_and_why_the_rest_stays_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    written = {name: hashlib.sha256(b"drawn").hexdigest() for name in ("a", "b", "c", "d", "../e")} | {"film": ""}
    write_durably(tmp_path / "e", b"drawn")
    for name in ("a", "b", "c", "film"):
        write_durably(folder / name, b"drawn")
    write_durably(folder / "b", b"mine")
    (folder / "d").symlink_to(tmp_path / "e")
    gone = Path.unlink

    def guarded(path):
        if path.name == "c":
            raise PermissionError(13, "Permission denied")
        gone(path)

    monkeypatch.setattr(Path, "unlink", guarded)
    let_be = "as links and what is outside of the folder are let be"
    assert remove_unchanged(folder, written) == {
        "b": "changed since", "c": "which cannot be removed: Permission denied", "d": let_be, "../e": let_be,
        "film": "which may have been changed since: no sha256 was noted"}  # fmt: skip
    assert {p.name for p in folder.iterdir()} == {"b", "c", "d", "film"} and (tmp_path / "e").is_file()
