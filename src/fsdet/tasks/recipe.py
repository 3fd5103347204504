# SPDX-License-Identifier: AGPL-3.0-or-later
"""`stage.recipe: auto`: how stage 3 trains is chosen by what can be measured before it, and said with the reason.

The file's own values are for classes that registration finds again (tasks/rehearsal.py): the backbone moves at half
speed and most shots are pasted onto base images. Classes that it does not find are unlike the base's: everything moves
twice as fast and half as long again, and more of the images are the shots' own, whose surroundings are as new as they
are (docs/notebook.md).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fsdet import config as configs
from fsdet.config import Config
from fsdet.data.sources import DataSet
from fsdet.data.store import ImageStore
from fsdet.errors import ConfigError, explain
from fsdet.tasks.batches import training_records
from fsdet.tasks.loading import load_trained
from fsdet.tasks.rehearsal import Pick, rehearse

CARRIES_OVER = (
    0.25  # AP50 of the rehearsal; seen: .41 to .79 on drawings after drawings, .00 to .02 on cards after chess
)
NEAR_BACKBONE = 0.5  # LR of the backbone as a share of the others'
FAR_LR, FAR_STEPS = 2.0, 1.5  # factors on the file's values
FAR_MIX = {"paste": 0.35, "whole": 0.4}
CHOSEN = ("optim", "data")  # sections that a recipe changes


def settled(config: Config, data: DataSet, shots: Mapping[int, Sequence[Pick]], split: str, *,
            resume: bool) -> tuple[Config, str]:  # fmt: skip
    """The config with the recipe's values in place, and a sentence that says what was chosen and why.

    A resumed run keeps what it chose at its start.
    Raises:
        ConfigError: auto in another stage than 3, or without a stage before; stage 3 without base images, untold.
    """
    _keep_base(config)
    if config.stage.recipe != "auto":
        return config, ""
    if config.stage.name != "finetune" or not config.stage.init_from:
        got = f"stage '{config.stage.name}', stage.init_from {config.stage.init_from}"
        raise ConfigError(explain("stage 3 and a checkpoint of the stage before", got, "stage.recipe=auto",
                                  "set stage.recipe=given, or train stage 3"))  # fmt: skip
    if resume:
        before = configs.load(Path(config.run.dir) / "config.yaml")
        return _with(config, {section: getattr(before, section).model_dump() for section in CHOSEN}), ""
    canvases = ImageStore(training_records(data, config), config.data.image_size)
    store = ImageStore(data.split(split), config.data.image_size)
    ap50 = rehearse(load_trained(config.stage.init_from), canvases, shots, store, config.run.seed)
    found = f"recipe: registration alone finds copies of the shots with AP50 {ap50:.3f}"
    if ap50 >= CARRIES_OVER:
        change: dict = {"optim": {"lr_scale": {"backbone": NEAR_BACKBONE, **config.optim.lr_scale}}}
        return _with(config, change), f"{found}, at least {CARRIES_OVER}: the backbone moves at half speed"
    return _with(config, _far(config)), f"{found}, less than {CARRIES_OVER}: everything moves, faster and longer"


def _far(config: Config) -> dict:
    optim = config.optim
    length = {"steps": round(FAR_STEPS * optim.steps)} if optim.steps else {"epochs": FAR_STEPS * (optim.epochs or 1)}
    return {"optim": {"lr": FAR_LR * optim.lr, "muon_lr": FAR_LR * optim.muon_lr, **length},
            "data": {"augment": {**config.data.augment.model_dump(), **FAR_MIX}}}  # fmt: skip


def _with(config: Config, change: Mapping[str, Mapping]) -> Config:
    """`config` with some keys of some sections replaced, validated again."""
    plain = config.model_dump()
    for section, keys in change.items():
        plain[section].update(keys)
    return Config.model_validate(plain)


def _keep_base(config: Config) -> None:
    """Stage 3 on whole images of the shots alone forgets the base classes within a minute."""
    a = config.data.augment
    if config.stage.name != "finetune" or config.stage.forget:
        return
    if a.paste + a.whole > 1:
        raise ConfigError(explain("data.augment.paste + data.augment.whole of at most 1", f"{a.paste} + {a.whole}",
                                  "data.augment", "lower one of them"))  # fmt: skip
    if a.whole == 1:
        raise ConfigError(explain("base images, without which base classes are forgotten", "data.augment.whole 1",
                                  "data.augment", "lower it, or say stage.forget=true"))  # fmt: skip
