# SPDX-License-Identifier: AGPL-3.0-or-later
"""A bar on a terminal, a line now and then elsewhere, and nothing when the stream is gone."""

import io
import logging
import sys

import pytest

from fsdet import progress
from fsdet.progress import ConsoleHandler, Progress, log_to_console, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_it_says_a_line_at_most_every_ten_seconds(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, logger="fsdet"), Progress(60, "train") as bar:
        for _ in range(35):
            clock[0] += 1.0
            bar.update(1, loss="1.5")
    assert [r.message.split(" (")[0] for r in caplog.records] == ["train 10/60", "train 20/60", "train 30/60"]
    assert "loss=1.5" in caplog.text


def test_on_a_terminal_it_draws_a_bar_and_log_lines_do_not_tear_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, "train") as bar:
        bar.update(2, loss="1.5")
        ConsoleHandler().emit(logging.LogRecord("fsdet", 20, "", 0, "Total Loss: 1", (), None))
        bar.update(2)
    assert "train" in terminal.getvalue() and "\nTotal Loss: 1\n" in terminal.getvalue().replace("\r", "\n")


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_closed_stream_stops_nothing(monkeypatch, stream):
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    ConsoleHandler().emit(logging.LogRecord("fsdet", 20, "", 0, "x", (), None))
    assert list(track([1, 2], "items")) == [1, 2]


def test_a_terminal_that_goes_away_stops_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(100, "train") as bar:
        terminal.close()
        for _ in range(100):
            bar.update(1, loss="1")
    assert bar.count == 100


def test_the_console_is_joined_once():
    logger = logging.getLogger("fsdet")
    before, level = list(logger.handlers), logger.level
    log_to_console()
    log_to_console()
    assert sum(isinstance(h, ConsoleHandler) for h in logger.handlers) == 1
    logger.handlers[:] = before
    logger.setLevel(level)
