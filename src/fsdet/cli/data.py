# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet data demo datasets/demo
fsdet data demo datasets/documents --task classifier
fsdet data demo datasets/flights --video
fsdet data check my/data.yaml --deep
fsdet data shots my/data.yaml --k 1 2 3 5 10 30 --seeds 10 --out shots/
fsdet data shots my/data.yaml --from vocsplit/ --k 1 2 3 5 10 --seeds 30 --out shots/
fsdet data convert my/data.yaml out/ --to coco"""

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from fsdet.cli._arguments import count, existing, numbers
from fsdet.command import typed
from fsdet.errors import UserError, counted, explain
from fsdet.files import is_json_with, readable, refuse_foreign, write_durably

if TYPE_CHECKING:
    from fsdet.data.shots import ShotFile
    from fsdet.data.sources import DataSet

LIST_HEAD = "# faults found by fsdet data check"


DEMOS = {  # task: the module that draws its demo set, and its function
    "fewshot": ("fsdet.data.synthetic", "draw_demo"),
    "maskrcnn": ("fsdet.data.drawn_instances", "draw_instances"),
    "classifier": ("fsdet.data.documents", "draw_documents"),
    "video": ("fsdet.data.drawn_flights", "draw_flights"),
}
TASKS = tuple(DEMOS)[:3]


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """demo OUT | check DATA | shots DATA --out OUT | convert DATA OUT --to FORMAT"""
    actions = parser.add_subparsers(dest="action", required=True, metavar="demo|check|shots|convert")
    demo = actions.add_parser("demo", help="draw a demo set: 80 base and 16 novel classes, or one for another task")
    demo.add_argument("out", type=Path, metavar="OUT")
    demo.add_argument("--task", choices=TASKS, default="fewshot", help="classifier: genuine and forged pages; "
                      "maskrcnn: objects with masks")  # fmt: skip
    demo.add_argument("--video", action="store_true", help="flights over an object, and photographs of it (RefDet)")
    demo.add_argument("--seed", type=int, default=0, metavar="N")
    check = actions.add_parser("check", help="damage, sizes, copies, leaks, thin classes; exit 2 when unfit")
    check.add_argument("data", type=Path, metavar="DATA", help="data YAML, COCO json, or a folder")
    check.add_argument("--task", choices=TASKS, default="fewshot", help="classifier: a folder for each class")
    check.add_argument("--deep", action="store_true", help="decode every image, which alone finds truncated ones")
    check.add_argument("--shots", type=count, default=10, metavar="K", help="instances wanted of each class (10)")
    check.add_argument(
        "--policy", choices=("drop", "fail"), default="drop", help="whether faulty labels make a data set unfit (drop)"
    )
    check.add_argument("--list", type=Path, metavar="FILE", help="write every fault, file:line, one a line")
    _shots_arguments(actions.add_parser("shots", help="draw K-shot sets, or read published ones, for data.shots"))
    convert = actions.add_parser("convert", help="write a data set in another format")
    convert.add_argument("data", type=Path, metavar="DATA")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--to", choices=("coco", "yolo", "voc"), required=True)
    convert.add_argument("--link", action="store_true", help="hard-link images instead of copying them")
    return parser.parse_args(argv)


def _shots_arguments(shots: argparse.ArgumentParser) -> None:
    shots.add_argument("data", type=Path, metavar="DATA")
    ks = shots.add_mutually_exclusive_group()
    ks.add_argument("--k", type=numbers, nargs="+", metavar="K", help="numbers of shots (1 3 5 10)")
    ks.add_argument("--shots", type=numbers, metavar="1,3,5", help="the same with commas")
    seeds = shots.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, metavar="S", help="one draw into the file OUT (0)")
    seeds.add_argument("--seeds", type=count, metavar="N", help="draws 0 to N-1 into the folder OUT: seed0.json, ...")
    shots.add_argument(
        "--unit", choices=("instance", "image"), help="K instances (default), or one in each of K images"
    )
    shots.add_argument("--from", type=Path, dest="published", metavar="FOLDER", help="published lists instead of draws")
    shots.add_argument("--split", metavar="NAME", help="where the shots are (support; with --from else train)")
    shots.add_argument("--out", type=Path, required=True, metavar="OUT")


def run(args: argparse.Namespace) -> int:
    """Do it, and print what came of it."""
    return {"demo": _demo, "check": _check, "shots": _shots, "convert": _convert}[args.action](args)


def _demo(args: argparse.Namespace) -> int:
    from fsdet.progress import Progress

    if args.video and args.task != "fewshot":
        raise UserError(explain("--video without --task", f"--task {args.task}", "data demo", "leave one of them out"))
    name, draw = DEMOS["video" if args.video else args.task]
    module = importlib.import_module(name)
    with Progress(sum(module.SIZES.values()), "draw", unit="picture") as bar:
        path = getattr(module, draw)(args.out, seed=args.seed, progress=lambda done, _: bar.update(done - bar.count))
    print(path)
    return 0


def _check(args: argparse.Namespace) -> int:
    from fsdet.data import sources
    from fsdet.data.check import check
    from fsdet.data.folders import load_folders

    if args.list is not None:
        existing(args.list.parent, "a folder for the list", "make it, or name another file")
        refuse_foreign(args.list, "a list of faults", _is_list)
    data = load_folders(args.data) if args.task == "classifier" else sources.load(args.data)
    report = check(data, deep=args.deep, k=args.shots, policy=args.policy)
    if args.list is not None:
        rows = [LIST_HEAD, *report.places, *report.errors]
        write_durably(args.list, "".join(f"{readable(row)}\n" for row in rows).encode())
    print(report)
    if args.list is not None:
        print(f"{args.list}: {counted(len(report.places) + len(report.errors), 'place')}")
    return 0 if report.ok else 2


def _is_list(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(LIST_HEAD)) == LIST_HEAD.encode()


def _shots(args: argparse.Namespace) -> int:
    from fsdet.data import sources

    seeds = [args.seed] if args.seeds is None else list(range(args.seeds))
    paths = [args.out] if args.seeds is None else [args.out / f"seed{seed}.json" for seed in seeds]
    _free(args.out, folder=args.seeds is not None)
    for path in paths:
        refuse_foreign(path, "a shot file", is_json_with("sampler", "seed"))
    ks = args.shots or [k for group in args.k or [] for k in group]
    data = sources.load(args.data)
    drawn = _drawn(args, data, ks, seeds)
    for file, path in zip(drawn, paths, strict=True):
        file.save(path)
        shots = f"{', '.join(map(str, file.ks))} shot{'s' * (file.ks != (1,))}"
        shown = f"{shots} ({file.unit}) of {counted(len(file.classes), 'class', 'es')}"
        print(f"{path}: {shown}, seed {file.seed}, sha256 {file.sha256[:12]}")
    if data.novel:  # without, the shots are of base classes, which stage 3 takes from train
        command = "fsdet train configs/stage_3.yaml data.path={} data.shots={} episode.shots={}"
        print(f"next: {typed(command, args.data, paths[0], max(drawn[0].ks))}")
    else:
        print("the data set has no novel classes: these are shots of all its classes")
    return 0


def _drawn(args: argparse.Namespace, data: "DataSet", ks: list[int], seeds: list[int]) -> list["ShotFile"]:
    from fsdet.data.published import read_published
    from fsdet.data.shots import ShotFile

    if args.published is None:
        split, unit = args.split or "support", args.unit or "instance"
        return [ShotFile.draw(data, ks or [1, 3, 5, 10], seed, split, unit=unit) for seed in seeds]
    drawn = read_published(data, args.published, seeds, ks or None, args.split)
    if args.unit not in (None, drawn[0].unit):
        told = f"{drawn[0].sampler} lists, which count the unit '{drawn[0].unit}'"
        raise UserError(explain(f"lists of the unit '{args.unit}'", told, str(args.published), "leave --unit out"))
    return drawn


def _free(out: Path, folder: bool) -> None:
    """Refuse an OUT of the other kind before anything is drawn."""
    if folder and out.exists() and not out.is_dir():
        raise UserError(explain("a folder, for --seeds", "a file", str(out), "name a folder, or use --seed for one"))
    if not folder and out.is_dir():
        raise UserError(explain("a file, for one draw", "a folder", str(out), "name a file, or use --seeds"))


def _convert(args: argparse.Namespace) -> int:
    from fsdet.data import sources
    from fsdet.data.convert import convert

    data = sources.load(args.data, shapes=True)
    lost = convert(data, args.out, args.to, link=args.link)
    print(f"{data}\n{args.out / 'data.yaml'}: {args.to}")
    if len(lost):
        print(lost)
    return 0
