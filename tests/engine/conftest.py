# SPDX-License-Identifier: AGPL-3.0-or-later
"""Waiting for the disk is not what these tests are about."""

import os

import pytest


@pytest.fixture(autouse=True)
def _free_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
