# SPDX-License-Identifier: AGPL-3.0-or-later
"""Few-shot studies on three small sets of real photographs: chess boards, playing cards, fruits.

    python scripts/bench/real.py ROOT OUT                       # every study: OUT/<study>/run.sh and what it reads
    python scripts/bench/real.py ROOT OUT --study chess --steps 400 --shots 1,5 --draws 3
    OUT/chess/run.sh                                            # all of it, resumable; ends in the table

ROOT holds chess/ (YOLO), cards/ and fruits/ (VOC) as they are published; nothing in it is changed or copied. Sized for
two CPU cores.

    study         base                     novel
    chess         12 chess pieces          6 cards and 3 fruits
    photos        6 cards and 3 fruits     6 white chess pieces; black ones are look-alikes without a label
    chess-inside  8 chess pieces           knights and queens of both colours, which base images show without labels
    cards-inside  4 cards                  queen and ten

`bishop`, a slip of three boxes in chess, is a class of no study. Cards and fruits have no split val, so in `photos` and
`cards-inside` best.pt is picked by training images; `fsdet train` says so.
"""

import argparse
import os
import shlex
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fsdet.errors import DataError, FsdetError, explain

REPOSITORY = Path(__file__).resolve().parents[2]
PIECES = ("bishop", "king", "knight", "pawn", "queen", "rook")
BLACK, WHITE = (tuple(f"{colour}-{piece}" for piece in PIECES) for colour in ("black", "white"))
CARDS = ("ace", "jack", "king", "nine", "queen", "ten")
FRUITS = ("apple", "banana", "orange")


@dataclass(frozen=True)
class Study:
    """Which classes and sources; the sources are paths below ROOT. val: () where the data have none."""

    base: tuple[str, ...]
    novel: tuple[str, ...]
    train: tuple[str, ...]
    support: tuple[str, ...]
    test: tuple[str, ...]
    val: tuple[str, ...] = ()

    @property
    def ways(self) -> int:
        """Of an episode: half of the base classes."""
        return max(2, len(self.base) // 2)


_CHESS, _CARDS, _FRUITS = "chess/{}/images", "cards/{}", "fruits/{}"
_LEFT_OUT = tuple(f"{colour}-{piece}" for colour in ("black", "white") for piece in ("knight", "queen"))
STUDIES: Mapping[str, Study] = {
    "chess": Study(BLACK + WHITE, CARDS + FRUITS, (_CHESS.format("train"),),
                   (_CARDS.format("train"), _FRUITS.format("train")),
                   (_CHESS.format("test"), _CARDS.format("test"), _FRUITS.format("test")), (_CHESS.format("valid"),)),
    "photos": Study(CARDS + FRUITS, WHITE, (_CARDS.format("train"), _FRUITS.format("train")),
                    (_CHESS.format("train"),),
                    (_CARDS.format("test"), _FRUITS.format("test"), _CHESS.format("test"), _CHESS.format("valid"))),
    "chess-inside": Study(tuple(n for n in BLACK + WHITE if n not in _LEFT_OUT), _LEFT_OUT, (_CHESS.format("train"),),
                          (_CHESS.format("train"),), (_CHESS.format("test"),), (_CHESS.format("valid"),)),
    "cards-inside": Study(("ace", "jack", "king", "nine"), ("queen", "ten"), (_CARDS.format("train"),),
                          (_CARDS.format("train"),), (_CARDS.format("test"),)),
}  # fmt: skip


def data_yaml(study: Study, root: Path) -> dict:
    """A data YAML as a dict. Raises DataError when ROOT lacks a source."""
    splits = {name: list(getattr(study, name)) for name in ("train", "val", "test", "support")}
    missing = sorted({path for paths in splits.values() for path in paths if not (root / path).is_dir()})
    if missing:
        raise DataError(explain("the folders chess, cards and fruits as they are published", f"no {', '.join(missing)}",
                                str(root), "name the folder that holds the three"))  # fmt: skip
    return {"path": str(root.resolve()), **{name: paths for name, paths in splits.items() if paths},
            "base": list(study.base), "novel": list(study.novel)}  # fmt: skip


def stage_files(study: Study, home: Path, args: argparse.Namespace) -> dict[str, dict]:
    """{file name: configuration} of the three stages; they extend the demo's."""
    shared = {"image_size": args.size, "support_size": args.support_size, "base_images": args.base_images,
              "path": str(home / "data.yaml")}  # fmt: skip
    own = {
        1: {"optim": {"steps": args.steps}},
        2: {"optim": {"steps": args.episodes}, "episode": {"ways": study.ways, "shots": [1, 5]}},
        3: {"optim": {"steps": args.tuning}},
    }
    evaluation = {"shots": args.shots, "seeds": args.draws}
    return {f"stage_{n}.yaml": {"extends": os.path.relpath(REPOSITORY / f"configs/demo/stage_{n}.yaml", home),
                                "run": {"threads": args.threads}, "data": shared, "eval": evaluation, **keys}
            for n, keys in own.items()}  # fmt: skip


def study_files(home: Path, args: argparse.Namespace) -> dict[str, dict]:
    """study.yaml: registration and stage 3. table.yaml: the same and the rivals', for the end."""
    checkpoints = [str(home / f"stage2-{t}/best.pt") for t in range(args.trainings)]
    methods = {"registration": {"checkpoints": checkpoints},
               "stage 3": {"checkpoints": checkpoints, "config": str(home / "stage_3.yaml")}}  # fmt: skip
    rivals = {f"Ultralytics, {what}": {"results": [str(home / "rival" / file)]} for what, file in
              (("fully fine-tuned", "finetune.json"), ("head only", "finetune_head.json"))}  # fmt: skip
    head = {"data": str(home / "data.yaml"), "out": str(home / "study"), "shots": args.shots, "seeds": args.draws}
    return {"study.yaml": {**head, "methods": methods}, "table.yaml": {**head, "methods": {**methods, **rivals}}}


def commands(home: Path, args: argparse.Namespace) -> list[list[str]]:
    """Every command of a study in order; python is the one of scripts/_env.sh."""
    python, shots = "$PY", ",".join(map(str, args.shots))
    lines = []
    for t in range(args.trainings):
        words = [f"run.seed={t}"]
        one, two = home / f"stage1-{t}", home / f"stage2-{t}"
        lines.append(["./scripts/train_stage_1.sh", str(home / "stage_1.yaml"), f"run.dir={one}", *words])
        lines.append(["./train_stage_2.sh", str(home / "stage_2.yaml"), f"run.dir={two}",
                      f"stage.init_from={one}/best.pt", *words])  # fmt: skip
    lines.append([python, "-m", "fsdet", "eval", "--study", str(home / "study.yaml")])
    rival = [python, "scripts/bench/rival.py"]
    there = [str(home / "data.yaml"), str(home / "rival"), "--size", str(args.size), "--threads", str(args.threads)]
    lines.append([*rival, "base", *there, "--images", str(16 * args.steps)])
    grid = ["--shots", shots, "--seeds", str(args.draws), "--epochs", args.epochs, "--lrs", args.lrs]
    lines += [[*rival, "finetune", *there, *grid, *depth] for depth in ([], ["--head-only"])]
    return [*lines, [python, "-m", "fsdet", "eval", "--study", str(home / "table.yaml")]]


def script(home: Path, args: argparse.Namespace) -> str:
    """run.sh: the commands from the repository's root."""
    rows = [" ".join('"$PY"' if word == "$PY" else shlex.quote(word) for word in line) for line in commands(home, args)]
    head = ["#!/usr/bin/env bash", "# Written by scripts/bench/real.py. What is there already is not made again.",
            "set -euo pipefail", f"cd {shlex.quote(str(REPOSITORY))}", "source scripts/_env.sh"]  # fmt: skip
    return "\n".join([*head, *rows, ""])


def write(name: str, root: Path, out: Path, args: argparse.Namespace) -> Path:
    """OUT/<study>/ with data.yaml, stage_1 to 3, study.yaml, table.yaml and run.sh; returns run.sh."""
    study, home = STUDIES[name], (out / name).resolve()
    documents = {"data.yaml": data_yaml(study, root), **stage_files(study, home, args), **study_files(home, args)}
    home.mkdir(parents=True, exist_ok=True)
    for file, document in documents.items():
        (home / file).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    path = home / "run.sh"
    path.write_text(script(home, args), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--study", choices=tuple(STUDIES), action="append", help="one of them; all by default")
    parser.add_argument("--size", type=int, default=224, help="px (224)")
    parser.add_argument("--support-size", type=int, default=128, help="px of a support window (128)")
    parser.add_argument("--steps", type=int, default=850, help="of 16 images, stage 1 and the rival's base (850)")
    parser.add_argument("--episodes", type=int, default=250, help="of stage 2 (250)")
    parser.add_argument("--tuning", type=int, default=300, help="steps of stage 3 (300)")
    parser.add_argument("--shots", type=lambda s: [int(v) for v in s.split(",")], default=[1, 3, 5, 10])
    parser.add_argument("--draws", type=int, default=3, help="of each number of shots (3)")
    parser.add_argument("--trainings", type=int, default=1, help="of stages 1 and 2, with seeds 0, 1, ... (1)")
    parser.add_argument("--epochs", default="30,60,120", help="the rivals' grid")
    parser.add_argument("--lrs", default="1e-2,3e-3", help="the rivals' grid")
    parser.add_argument("--base-images", choices=("all", "no_novel"), default="all", help="as data.base_images")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        for name in args.study or STUDIES:
            print(write(name, args.root, args.out, args))
    except FsdetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
