# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet register --adapt`: stage 3 on a support folder. The detector learns the new classes beside those it knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fsdet import config as configs
from fsdet.config import Config
from fsdet.data import sources
from fsdet.data.report import Report
from fsdet.data.sources import DataSet
from fsdet.errors import CheckpointError, DataError, counted, explain
from fsdet.models.build import SWITCHES
from fsdet.tasks import finetune_task, initial, trainer_of
from fsdet.tasks.loading import Trained, data_of, load_trained
from fsdet.types import ImageRecord

STEPS = 400  # half as many again where the recipe says so
SETTINGS = (
    "stage.name=finetune", "stage.recipe=auto", "stage.freeze_norm=true", "episode.queries=16",
    "data.augment.mosaic=0.5", "data.augment.scale=0.4",
    "loss.weights.bbox=15", "loss.weights.cls=1", "loss.weights.dfl=3",
    "optim.name=muon", "optim.lr=0.01", "optim.muon_lr=0.01", "optim.min_lr=0.0001",
    "optim.warmup_epochs=0.1", "optim.ema=0.98", "optim.ema_warmup=30",
    "eval.every=0", "log.wandb.mode=disabled",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prepared:
    """A detector to adapt; the base classes' images and the new classes' shots as one data set; the former's path."""

    trained: Trained
    joined: DataSet
    data: str


@dataclass(frozen=True)
class Adapted:
    """checkpoint of the adapted detector; its new classes; base AP50 on split val before and after."""

    checkpoint: Path
    classes: tuple[str, ...]
    before: float
    after: float


def prepared(checkpoint: Path, support: Path, data: str | None = None) -> Prepared:
    """A checkpoint and a support folder, read and found fit for `adapt`.

    Args:
        data: the data set with the base classes' images; None takes the one the checkpoint was trained on.
    Raises:
        CheckpointError: stage 3 has already given the detector its novel classes. DataError: no base images, or a
        class of the folder is a base class.
    """
    trained = load_trained(checkpoint)
    if trained.finetuned:
        raise CheckpointError(explain("a checkpoint of stage 1 or 2", "one of stage 3", str(checkpoint),
                                      "adapt the one it came from, with all new classes in the folder"))  # fmt: skip
    known = sources.load(data or data_of(trained))  # whole: a class may be shown by one split alone
    return Prepared(trained, with_support(known, trained.classes, support), data or str(trained.spec["data"]))


def adapt(start: Prepared, folder: Path, *, steps: int = STEPS, device: str = "auto",
          overrides: Sequence[str] = ()) -> Adapted:  # fmt: skip
    """Fine-tune a detector on a support folder and replayed base images, into the run folder `folder`.

    Every instance in the support folder is a shot; classes may have different numbers of them.
    """
    trained, joined = start.trained, start.joined
    config = _settings(trained, start.data, folder, steps, device, overrides)
    task, chosen = finetune_task(config, joined, _all_shots(joined), "support")
    before = task.evaluate(trained.model)["val/base/AP50"]
    result = trainer_of(task, f"{initial.initialise(task, task.config)}\n  {chosen}").fit()
    return Adapted(result.best, joined.novel, before, result.metrics["val/base/AP50"])


def with_support(known: DataSet, base: Sequence[str], support: Path) -> DataSet:
    """The base classes and splits of `known`, with the folder's classes as novel ones and its images as `support`.

    Raises:
        DataError: `known` has other base classes or no training images, or a class of the folder is one of them.
    """
    if not known.has("train"):
        raise DataError(explain("base images, without which base classes are forgotten", "no split train", known.name,
                                "name the base data with --data"))  # fmt: skip
    if list(known.base) != list(base):
        got = f"{counted(len(known.base), 'base class', 'es')}, such as {', '.join(known.base[:3])}"
        raise DataError(explain(f"the {counted(len(base), 'base class', 'es')} of the checkpoint", got, known.name,
                                "name the data it was trained on with --data"))  # fmt: skip
    names, records = sources.support_folder(support)
    if both := [name for name in names if name in base]:
        raise DataError(explain("new classes", f"base classes of the detector: {', '.join(both)}", str(support),
                                "rename or remove those folders"))  # fmt: skip
    splits = {split: _only_base(known.split(split), len(base)) for split in known.splits}
    splits["support"] = [_beside(r, len(base)) for r in records]
    return DataSet(known.root, base, names, splits, Report(), known.name)


def _beside(record: ImageRecord, base: int) -> ImageRecord:
    """A record of a support folder, whose classes are numbered from 0, with its classes after the base classes."""
    known = None if record.exhaustive is None else frozenset(c + base for c in record.exhaustive)
    return replace(record, labels=record.labels + base, exhaustive=known)


def _only_base(records: Sequence[ImageRecord], base: int) -> list[ImageRecord]:
    """Images without an object of the data set's own novel classes: their numbers mean other classes here."""
    return [r for r in records if not (r.labels >= base).any()]


def _settings(trained: Trained, data: str, folder: Path, steps: int, device: str, overrides: Sequence[str]) -> Config:
    spec, model = trained.spec, trained.spec["model"]
    kept = [f"model.{key}={model[key]}" for key in ("backbone", "levels", "embed_dim", "reg_max", "support")]
    kept += [f"model.{key}={str(bool(model.get(key))).lower()}" for key in ("proxies", *SWITCHES)]
    if encoder := trained.model.encoder:
        kept += ["model.support_encoder=vit", f"model.vit.name={encoder.name}", f"model.vit.weights={encoder.path}",
                 f"model.vit.image_size={encoder.image_size}"]  # fmt: skip
    own = [f"data.path={data}", f"data.image_size={spec['image_size']}", f"data.support_size={spec['support_size']}",
           f"stage.mode={spec['mode']}", f"stage.init_from={trained.path}", f"run.dir={folder}",
           f"run.device={device}", f"optim.steps={steps}"]  # fmt: skip
    return configs.load(None, [*SETTINGS, *kept, *own, *overrides])


def _all_shots(data: DataSet) -> Mapping[int, list[tuple[int, int]]]:
    shots: dict[int, list[tuple[int, int]]] = {}
    for i, record in enumerate(data.split("support")):
        for j, label in enumerate(record.labels.tolist()):
            if not record.crowd[j]:
                shots.setdefault(label, []).append((i, j))
    return shots
