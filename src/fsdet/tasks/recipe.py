# SPDX-License-Identifier: AGPL-3.0-or-later
"""`stage.recipe`: how stage 3 trains. `auto` chooses by what can be measured before it, and says so with the reason.

near: classes that registration finds again (tasks/rehearsal.py); the file's values, with the backbone at half speed.
far: classes unlike the base's; everything moves twice as fast and half as long again, and more of the images are the
shots' own, whose surroundings are as new as they are. How large base objects are says nothing of such classes, so shots
are pasted at their own size (docs/notebook.md).
far_long: the same with more than FEW shots a class, which take twice that time to be learnt; more of the images are
pasted.
A run's config.yaml holds the file's values and the name of the recipe, so that a resumed run, and one whose settings
are compared with it, mean the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fsdet import config as configs
from fsdet.config import Config
from fsdet.data.sources import DataSet
from fsdet.data.store import ImageStore
from fsdet.engine.checkpoint import in_run
from fsdet.errors import ConfigError, explain
from fsdet.tasks.batches import training_records
from fsdet.tasks.loading import load_trained
from fsdet.tasks.rehearsal import Pick, rehearse

CARRIES_OVER = 0.25  # AP50 of the rehearsal; seen: .41 to .79 on drawings, .00 to .02 on cards after chess
NEAR_BACKBONE = 0.5  # LR of the backbone as a share of the others'
FAR_LR, FAR_LENGTH, LONG = 2.0, 1.5, 3.0  # factors on the file's values
FEW = 5  # shots a class
FAR_MIX = {"paste": 0.35, "whole": 0.4, "pastes": 3, "match_size": 0.0}
LONG_MIX = {**FAR_MIX, "paste": 0.5, "whole": 0.3}
OWN_MIX = "with data.augment.paste, whole, pastes and match_size of its own"
WORDS = {"near": "the backbone moves at half speed", "far": f"everything moves, faster and longer, {OWN_MIX}",
         "far_long": f"everything moves, faster, and longer still for more than {FEW} shots a class, "
                     f"{OWN_MIX}"}  # fmt: skip


def settled(config: Config, data: DataSet, shots: Mapping[int, Sequence[Pick]], split: str, *,
            resume: bool) -> tuple[Config, str]:  # fmt: skip
    """The config with a recipe in place of `auto`, and a sentence that says which and why.

    A resumed run keeps what it chose at its start.
    Raises:
        ConfigError: a recipe in another stage than 3, or without a stage before; stage 3 without base images, untold.
    """
    _keep_base(config)
    stage = config.stage
    if stage.recipe == "given":
        return config, ""
    if stage.name != "finetune" or not stage.init_from:
        got = f"stage '{stage.name}', stage.init_from {stage.init_from}"
        raise ConfigError(explain("stage 3 and a checkpoint of the stage before", got, f"stage.recipe={stage.recipe}",
                                  "set stage.recipe=given, or train stage 3"))  # fmt: skip
    if stage.recipe != "auto":
        return config, ""
    if resume:
        return _named(config, configs.load(Path(config.run.dir) / "config.yaml").stage.recipe), ""
    canvases = ImageStore(training_records(data, config), config.data.image_size)
    store = ImageStore(data.split(split), config.data.image_size)
    ap50 = rehearse(load_trained(in_run(stage.init_from)), canvases, shots, store, config.run.seed)
    many = sum(map(len, shots.values())) > FEW * len(shots)
    name = "near" if ap50 >= CARRIES_OVER else "far_long" if many else "far"
    return _named(config, name), (
        f"recipe {name}: registration alone finds copies of the shots with AP50 {ap50:.3f}, "
        f"{'at least' if name == 'near' else 'less than'} {CARRIES_OVER}: {WORDS[name]}"
    )


def applied(config: Config) -> Config:
    """The values that a run trains by: those of the file, changed as the recipe says; itself without a recipe."""
    change = {"near": _near, "far": lambda c: _far(c, FAR_LENGTH, FAR_MIX),
              "far_long": lambda c: _far(c, LONG, LONG_MIX)}  # fmt: skip
    recipe = config.stage.recipe
    return config.model_copy(update=change[recipe](config)) if recipe in change else config


def _near(config: Config) -> dict:
    scale = {"backbone": NEAR_BACKBONE, **config.optim.lr_scale}
    return {"optim": config.optim.model_copy(update={"lr_scale": scale})}


def _far(config: Config, length: float, mix: Mapping[str, float]) -> dict:
    optim = config.optim
    faster = {"lr": FAR_LR * optim.lr, "muon_lr": FAR_LR * optim.muon_lr}
    if optim.steps:
        longer: dict = {"steps": round(length * optim.steps)}
    else:
        longer = {"epochs": length * (optim.epochs or 1)}
    augment = config.data.augment.model_copy(update=mix)
    return {"optim": optim.model_copy(update={**faster, **longer}),
            "data": config.data.model_copy(update={"augment": augment})}  # fmt: skip


def _named(config: Config, recipe: str) -> Config:
    return config.model_copy(update={"stage": config.stage.model_copy(update={"recipe": recipe})})


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
