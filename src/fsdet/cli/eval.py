# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet eval checkpoints/stage2/best.pt --shots 1,5 --seeds 3 --json results.json
fsdet eval checkpoints/stage2/best.pt --shot-file shots/seed0.json --shots 5
fsdet eval checkpoints/stage2/best.pt --scoring reduce=best,background=true
fsdet eval --table checkpoints/stage2/results.json checkpoints/stage3/results.json --per-class
fsdet eval --study scripts/bench/fewshot.yaml"""

import argparse
from pathlib import Path

from fsdet.cli._arguments import add_device, count, existing, numbers
from fsdet.errors import UserError, explain
from fsdet.files import is_json_with, refuse_foreign

SHOTS_ONLY = ("shots", "seeds", "shot_file", "bank", "setting", "metric", "scoring", "per_class")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CHECKPOINT with options, --table FILE..., or --study FILE"""
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", metavar="D", help="data YAML; default: the one the checkpoint was trained on")
    parser.add_argument("--shots", type=numbers, metavar="1,3,5", help="support instances a class")
    parser.add_argument("--seeds", type=count, metavar="N", help="draws of the support per number of shots")
    parser.add_argument("--shot-file", type=Path, metavar="FILE", help="a file of fsdet data shots instead of draws")
    parser.add_argument("--bank", type=Path, metavar="BANK", help="registered prototypes instead of draws")
    parser.add_argument("--setting", choices=("gfsod", "fsod"), help="all classes, or novel classes only")
    parser.add_argument("--metric", choices=("coco", "voc07"))
    parser.add_argument("--split", default="test", metavar="NAME", help="split of the data YAML to look at (test)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write results.json here, and pictures beside it")
    parser.add_argument("--scoring", metavar="SWITCH=VALUE,...", help="how registered classes are scored: reduce=mean|"
                        "best|lse, compete=true|false, background=off|subtract|compete, objectness=true|false, "
                        "calibration=0..1; rescore=true: what was found, of any class, is looked at again")  # fmt: skip
    add_device(parser)
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print finished results.json files")
    parser.add_argument("--per-class", action="store_true", help="also AP50 of each novel class")
    parser.add_argument("--study", type=Path, metavar="FILE", help="methods x trainings x K x draws; resumable")
    args = parser.parse_args(argv)
    if sum(way is not None for way in (args.checkpoint, args.table, args.study)) != 1:
        parser.error("expected CHECKPOINT, --table FILE... or --study FILE")
    if args.scoring and not args.checkpoint:
        parser.error("expected CHECKPOINT beside --scoring; a study file has `scoring:` of a method")
    if args.shot_file and (args.seeds or args.bank or not args.checkpoint):
        parser.error("expected CHECKPOINT, and neither --seeds nor --bank, beside --shot-file: it is one draw")
    if args.per_class and args.study:
        parser.error("expected CHECKPOINT or --table beside --per-class")
    if not args.checkpoint and (idle := _idle(args, parser)):
        what = "--table, which prints what is written" if args.table else "--study, whose file says the rest"
        parser.error(f"expected CHECKPOINT beside {', '.join(idle)}, got {what}")
    if args.bank and (args.shots or args.seeds):
        parser.error("expected neither --shots nor --seeds beside --bank: it holds the shots it was made from")
    return args


def _idle(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The options that mean nothing without a checkpoint and are given all the same."""
    used = {"checkpoint", "table", "per_class", "study"} | ({"device"} if args.study else set())
    given = (name for name, value in vars(args).items() if name not in used and value != parser.get_default(name))
    return [f"--{name.replace('_', '-')}" for name in given]


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    from fsdet.evaluation.summary import read_results

    if args.table:
        _show([read_results(path) for path in args.table], [_label(path) for path in args.table], args.per_class)
        return 0
    if args.study:
        from fsdet.tasks import study

        print(study.run(existing(args.study, "a study file", "scripts/bench/fewshot.yaml is one"), args.device))
        return 0
    existing(args.checkpoint, "a checkpoint", "train one: ./train_stage_2.sh")
    from fsdet.tasks import judge

    task = judge.other_task(args.checkpoint)
    return _by_split(args, task) if task else _by_shots(args)


def _by_split(args: argparse.Namespace, task: str) -> int:
    """A checkpoint of another task than few-shot detection: figures of one split."""
    from fsdet.tasks import judge

    given = [f"--{name.replace('_', '-')}" for name in SHOTS_ONLY if getattr(args, name)]
    if given:
        told = f"a checkpoint of task '{task}', which a split alone judges"
        raise UserError(explain("a few-shot detector", told, ", ".join(given), "leave the flags out"))
    if args.json:
        _refuse(args.json, "task", "metrics")
    print(judge.table(judge.judge_checkpoint(args.checkpoint, data=args.data, split=args.split, device=args.device,
                                             json_out=args.json)))  # fmt: skip
    return 0


def _by_shots(args: argparse.Namespace) -> int:
    from fsdet.detect.scoring import DEFAULT, Scoring
    from fsdet.tasks import protocol

    if args.shot_file:
        existing(args.shot_file, "a shot file", "draw one: fsdet data shots")
    scoring = Scoring.parse(args.scoring) if args.scoring else DEFAULT
    if args.json:
        _refuse(args.json, "setting", "shots")
    results = protocol.evaluate_checkpoint(
        args.checkpoint,
        data=args.data,
        shots=args.shots,
        seeds=args.seeds,
        bank=args.bank,
        json_out=args.json,
        setting=args.setting,
        metric=args.metric,
        split=args.split,
        device=args.device,
        scoring=scoring,
        shot_file=args.shot_file,
    )
    _show([results], [_label(args.checkpoint)], args.per_class)
    return 0


def _refuse(out: Path, *keys: str) -> None:
    from fsdet.pictures import refuse_other_pictures

    refuse_foreign(out, "a results.json", is_json_with(*keys))
    refuse_other_pictures(out.parent)


def _show(results: list[dict], labels: list[str], per_class: bool) -> None:
    from fsdet.evaluation.summary import per_class_table, table

    print(table(results, labels))
    if per_class:
        print(f"\n{per_class_table(results, labels)}")


def _label(path: Path) -> str:
    """A file stands for its run in a table: checkpoints/stage2/best.pt is `stage2`."""
    return path.parent.name if path.stem in ("results", "best", "last") and path.parent.name else path.stem
