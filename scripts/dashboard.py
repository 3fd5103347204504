#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The W&B workspace of these runs as code: what people watch, in the order in which they look.

    python scripts/dashboard.py                                # print sections, panels and keys; needs nothing
    python scripts/dashboard.py --entity ME --project fsdet --check      # build it offline, send nothing
    python scripts/dashboard.py --entity ME --project fsdet --save       # build and save it; needs a key

--check and --save need the extra: pip install -e ".[dashboard]"
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

STEP, EPOCH = "train_step/global_step", "epoch"
LOSSES = ("bbox", "cls", "dfl", "supcon", "cpe", "triplet")
OUTCOMES = ("committed", "amp_backoff", "bad_input", "bad_loss", "bad_grad", "no_grad")
GROUPS = ("backbone", "neck", "head", "support")
FULL, HALF, THIRD = 24, 12, 8  # panel widths in the workspace's grid of 24 columns
HIGH = 8


@dataclass(frozen=True)
class Panel:
    """Curves over `x`, or pictures when `x` is empty; regex: every key that it matches is a curve."""

    title: str
    keys: tuple[str, ...] = ()
    x: str = STEP
    regex: str = ""
    log: bool = False
    width: int = THIRD


def _losses(prefix: str, suffix: str) -> tuple[str, ...]:
    return tuple(f"train_step/{prefix}{name}{suffix}" for name in LOSSES)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Is it learning?": (
        Panel("base classes, AP50 and AP", ("val/base/AP50", "val/base/AP"), EPOCH),
        Panel("the same by prototypes", ("val/base_by_prototype/AP50", "val/base_by_prototype/AP"), EPOCH),
        Panel("what picks best.pt", ("val/fitness",), EPOCH),
        Panel("total loss", ("train_step/total_loss",), log=True, width=HALF),
        Panel("losses, raw", _losses("", "_loss"), log=True, width=HALF),
        Panel("losses as they are weighed", _losses("weighted/", ""), log=True, width=HALF),
        Panel("losses, means of epochs", x=EPOCH, regex=r"epoch/train/.*", width=HALF),
    ),
    "Is the step sound?": (
        Panel("gradient norm before clipping (L2, unscaled)", ("train_step/grad_norm",), log=True),
        Panel("gradient norm after clipping", ("train_step/grad_l2_postclip",)),
        Panel("before / after (above 100 is a red flag)", ("train_step/clip_ratio",), log=True),
        Panel("steps not taken", tuple(f"health/{name}_total" for name in OUTCOMES[1:])),
        Panel("steps taken", ("health/committed_total",)),
        Panel("loss scale (fp16)", ("train_step/loss_scale",), log=True),
        Panel("learning rates", regex=r"train_step/lr/.*", width=FULL),
    ),
    "Which loss asks for what?": (
        Panel("gradient norm at the head's inputs", tuple(f"probe/{n}/norm" for n in LOSSES), log=True, width=HALF),
        Panel("cosine with the total", tuple(f"probe/{n}/cosine" for n in LOSSES), width=HALF),
    ),
    "What does it see?": (
        Panel("validation images, boxes switch on and off", ("media/validation",), x="", width=FULL),
        Panel("sheets", ("media/episodes",), x="", width=FULL),
    ),
}


def describe() -> str:
    """The workspace in words."""
    lines = []
    for section, panels in SECTIONS.items():
        lines.append(section)
        for panel in panels:
            over = f" over {panel.x}" if panel.x else ""
            lines.append(f"  {panel.title}{over}: {', '.join(panel.keys) or panel.regex}")
    return "\n".join(lines)


def build(entity: str, project: str):
    """A wandb_workspaces Workspace; nothing is sent before its save()."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    def made(panel: Panel, x: int, y: int):
        layout = panels.Layout(x=x, y=y, w=panel.width, h=HIGH)
        if not panel.x:
            return panels.MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=3, layout=layout)
        curves = {"metric_regex": panel.regex} if panel.regex else {"y": list(panel.keys)}
        return panels.LinePlot(title=panel.title, x=panel.x, log_y=panel.log or None, layout=layout, **curves)

    sections = []
    for name, wanted in SECTIONS.items():
        placed = [made(panel, *place) for panel, place in zip(wanted, places(wanted), strict=True)]
        sections.append(workspaces.Section(name=name, panels=placed, is_open=True))
    settings = workspaces.WorkspaceSettings(x_axis=STEP, remove_legends_from_panels=False)
    return workspaces.Workspace(entity=entity, project=project, name="fsdet", sections=sections, settings=settings)


def places(panels: Sequence[Panel]) -> list[tuple[int, int]]:
    """(x, y) of each panel, filled row by row."""
    out, x, y = [], 0, 0
    for panel in panels:
        if x + panel.width > FULL:
            x, y = 0, y + HIGH
        out.append((x, y))
        x += panel.width
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", metavar="E", default="", help="W&B user or team")
    parser.add_argument("--project", metavar="P", default="fsdet")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="build it and print what would be sent")
    what.add_argument("--save", action="store_true", help="save it at W&B")
    args = parser.parse_args(argv)
    if not (args.check or args.save):
        print(describe())
        return 0
    if not args.entity:
        parser.error("expected --entity beside --check and --save: your W&B user or team")
    try:
        workspace = build(args.entity, args.project)
    except ImportError as error:
        print(f'error: {error.name} is not installed. Next: pip install -e ".[dashboard]"', file=sys.stderr)
        return 2
    if args.check:
        print(json.dumps(workspace._to_model().model_dump(mode="json", by_alias=True), indent=1))
        return 0
    print(workspace.save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
