# SPDX-License-Identifier: AGPL-3.0-or-later
"""Progress bars and console log lines that do not tear them. The only import of tqdm."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
QUIET_SECONDS = 10.0  # without a terminal: at most one line in this time
log = logging.getLogger("fsdet")


class Progress:
    """A bar on a terminal; a log line now and then elsewhere. Never raises when the stream is gone.

    shown: False for no bar, in a process beside another that has one.
    """

    def __init__(
        self, total: int | None, description: str = "", start: int = 0, unit: str = "it", shown: bool = True
    ) -> None:
        self.description, self.total, self.count = description, total, start
        self._told, self._begun, self._start = time.monotonic(), time.monotonic(), start
        self._bar = None
        if shown and _is_terminal():
            self._bar = tqdm(
                total=total,
                desc=description,
                initial=start,
                unit=unit,
                dynamic_ncols=True,
                leave=False,
                mininterval=0.2,
            )

    def update(self, n: int = 1, **values: Any) -> None:
        """Advance by `n`; `values` are shown beside the bar."""
        self.count += n
        if self._bar is None:
            self._line(values)
            return
        try:
            if values:
                self._bar.set_postfix(values, refresh=False)
            self._bar.update(n)
        except (OSError, ValueError):  # the terminal went away
            self._bar = None

    def _line(self, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._told < QUIET_SECONDS:
            return
        self._told = now
        rate = (self.count - self._start) / max(now - self._begun, 1e-9)
        shown = " ".join(f"{k}={v}" for k, v in values.items())
        of = f"/{self.total}" if self.total else ""
        log.info("%s %d%s (%.2f/s) %s", self.description, self.count, of, rate, shown)

    def close(self) -> None:
        try:
            if self._bar is not None:
                self._bar.close()
        except (OSError, ValueError):
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def track(items: Iterable[T], description: str = "", total: int | None = None) -> Iterator[T]:
    """Iterate with a Progress beside it."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(total, description) as bar:
        for item in items:
            yield item
            bar.update()


class ConsoleHandler(logging.Handler):
    """Writes log records to stderr above a running bar; a closed stream is ignored."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if _is_terminal():
                tqdm.write(self.format(record), file=sys.stderr)
            elif sys.stderr is not None:
                sys.stderr.write(self.format(record) + "\n")
                sys.stderr.flush()
        except (OSError, ValueError):
            return


def log_to_console(level: int = logging.INFO) -> None:
    """Send the fsdet logger to the console, once."""
    log.setLevel(min(level, log.level or level))
    if not any(isinstance(h, ConsoleHandler) for h in log.handlers):
        handler = ConsoleHandler(level)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False
