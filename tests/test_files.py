# SPDX-License-Identifier: AGPL-3.0-or-later
"""A file is replaced whole or not at all, and nothing is left beside it."""

import os

import pytest

from fsdet.errors import UserError
from fsdet.files import is_json_with, refuse_foreign, write_durably


def test_replaces_or_makes_the_file_and_its_folder(tmp_path):
    path = tmp_path / "new" / "file"
    assert write_durably(path, b"one") == path
    write_durably(path, b"two")
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content_and_no_rest(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_durably(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, call, full)
        write_durably(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_disk_before_the_name_is_and_the_name_before_it_returns(tmp_path, monkeypatch):
    order, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("sync"), sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), rename(a, b)))
    write_durably(tmp_path / "file", b"x")
    assert order == ["sync", "rename", "sync"]


def test_a_file_of_another_kind_and_a_folder_are_refused_and_stay(tmp_path):
    ours = is_json_with("setting", "shots")
    path = tmp_path / "file.json"
    refuse_foreign(path, "a results.json", ours)
    path.write_text('{"setting": 1, "shots": {}}')
    refuse_foreign(path, "a results.json", ours)
    for text in ('{"setting": 1}', "[1]", "no json", "\xff"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"expected no file yet, or a .*, got another file"):
            refuse_foreign(path, "a results.json", ours)
        assert path.read_text() == text
    with pytest.raises(UserError, match="got a folder"):
        refuse_foreign(tmp_path, "a results.json", ours)
