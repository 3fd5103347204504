# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet report RUN --html`: a run on one page that needs nothing beside itself.

Read: metrics.jsonl, results.json, config.yaml, environment.json. Computed: one look at images of the test split, by the
run's best checkpoint.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fsdet import __version__
from fsdet.config import Config
from fsdet.data.sources import DataSet
from fsdet.engine import checkpoint as checkpoints
from fsdet.engine.history import History, read_history
from fsdet.engine.optimizer import choose_device
from fsdet.errors import CheckpointError, ConfigError, DataError, explain
from fsdet.evaluation.summary import read_results
from fsdet.files import read_json, refuse_foreign, write_durably
from fsdet.pictures.page import Section, is_page, page
from fsdet.tasks import judge, kind_of
from fsdet.tasks.loading import Trained, data_of, rebuilt, spec_of
from fsdet.tasks.protocol import same_classes
from fsdet.tasks.webpage import cards, curves, detector, images, tables
from fsdet.tasks.webpage.exhibit import Exhibit

log = logging.getLogger("fsdet")
IMAGES = 200  # of the test split that are looked at
LARGEST = 7_500_000  # characters of a page; of one that is larger, shares of the pictures are left out
SHARES = (1.0, 0.5, 0.2, 0.05)


def write_page(run: Path, out: Path, *, data: str | None = None, most: int = IMAGES, device: str = "auto") -> Path:
    """One HTML file about a run folder.

    Without a usable checkpoint or data set the page has what the run's files say, and why there are no pictures; where
    `data` was named for it, that is an error.
    Raises:
        UserError: no run folder, or `out` is a file of another kind. DataError: a damaged results.json.
    """
    history = read_history(run)
    refuse_foreign(out, "a page of fsdet report", is_page)
    results = _results(run)
    exhibit, missing = _looked(history, results, data, most, device)
    warning = judge.outdated(results, run) if results else ""
    before, after = tables.sections(results, run.name, warning), [curves.training(history), curves.setting(history)]
    told = f"step {history.last_step}, {'finished' if history.finished else 'unfinished'}"
    for share in SHARES:
        shown = [*before, *(cards.sections(exhibit, share) if exhibit else missing), *after]
        text = page(f"{run.resolve().name}: report of a run", told, shown, f"Made by fsdet {__version__} of {run}.")
        if len(text) <= LARGEST:
            break
    return write_durably(out, text.encode("utf-8", errors="replace"))


def _results(run: Path) -> Mapping[str, Any]:
    path = run / "results.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    return found if judge.is_of_a_split(found) else read_results(path)


def _looked(history: History, results: Mapping[str, Any], data: str | None, most: int,
            device: str) -> tuple[Exhibit | None, list[Section]]:  # fmt: skip
    """What a look at the test split shows, or a section that says why there was none."""
    try:
        return _look(history, results, data, most, device), []
    except (CheckpointError, ConfigError, DataError) as error:
        if data:
            raise
        log.warning("no pictures on the page: %s", error)
        return None, [Section("Classes", "", f"No pictures: {error}")]


def _look(history: History, results: Mapping[str, Any], data: str | None, most: int, device: str) -> Exhibit:
    path, content = _checkpoint(history.folder)
    spec = spec_of(path, content)
    kind = kind_of(spec["task"], str(path))
    trained = rebuilt(path, content, kind.network(spec["model"], str(path)), choose_device(device, "--device"))
    config = _config(path, content)
    source = data or data_of(trained)
    found = kind.read(config.model_copy(update={"data": config.data.model_copy(update={"path": source})}))
    _refuse_other_classes(trained, found)
    log.info("%s looks at images of split %s of %s", path, config.eval.split, source)
    if spec["task"] == "classifier":
        return images.look_classifier(trained, config, found, most)
    if spec["task"] == "maskrcnn":
        return images.look_maskrcnn(trained, config, found, most)
    return detector.look(trained, config, found, results, most)


def _checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """best.pt, or the newest that is intact. Raises CheckpointError where there is none."""
    best = folder / "best.pt"
    if best.is_file():
        return best, checkpoints.load(best)
    for found in checkpoints.intact(folder):
        return found
    raise CheckpointError("nothing is saved yet")


def _config(path: Path, content: Mapping[str, Any]) -> Config:
    """The run's configuration. Raises CheckpointError for one of another version."""
    try:
        return Config.model_validate(content["config"])
    except ValidationError as error:
        raise CheckpointError(explain("the configuration of this version", str(error).partition("\n")[0], str(path),
                                      "use the version that wrote it")) from error  # fmt: skip


def _refuse_other_classes(trained: Trained, data: DataSet) -> None:
    """Raises DataError when the data set does not number the classes of the checkpoint."""
    if trained.spec["task"] == judge.BY_SHOTS:
        same_classes(trained, data)
    elif list(data.names) != list(trained.classes):
        raise DataError(explain(f"the classes {', '.join(trained.classes[:8])}", ", ".join(data.names[:8]), data.name,
                                "name a data set with the classes of the checkpoint"))  # fmt: skip
