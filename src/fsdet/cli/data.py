# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet data demo datasets/demo
fsdet data check my/data.yaml --deep
fsdet data shots my/data.yaml --shots 1,5 --seed 0 --out shots.json
fsdet data convert my/data.yaml out/ --to coco"""

import argparse
from pathlib import Path

from fsdet.cli._arguments import count, numbers
from fsdet.command import typed


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """demo OUT | check DATA | shots DATA --out FILE | convert DATA OUT --to FORMAT"""
    actions = parser.add_subparsers(dest="action", required=True, metavar="demo|check|shots|convert")
    demo = actions.add_parser("demo", help="draw the demo set: 80 base and 16 novel classes")
    demo.add_argument("out", type=Path, metavar="OUT")
    demo.add_argument("--seed", type=int, default=0, metavar="N")
    check = actions.add_parser("check", help="damage, sizes, copies, leaks, thin classes; exit 2 when unfit")
    check.add_argument("data", type=Path, metavar="DATA", help="data YAML, COCO json, or a folder")
    check.add_argument("--deep", action="store_true", help="decode every image, which alone finds truncated ones")
    check.add_argument("--shots", type=count, default=10, metavar="K", help="instances wanted of each class (10)")
    shots = actions.add_parser("shots", help="draw K-shot sets into a file for data.shots")
    shots.add_argument("data", type=Path, metavar="DATA")
    shots.add_argument("--shots", type=numbers, default=[1, 3, 5, 10], metavar="1,3,5")
    shots.add_argument("--seed", type=int, default=0, metavar="N")
    shots.add_argument("--split", default="support", metavar="NAME", help="where to draw from (support)")
    shots.add_argument("--out", type=Path, required=True, metavar="FILE")
    convert = actions.add_parser("convert", help="write a data set in another format")
    convert.add_argument("data", type=Path, metavar="DATA")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--to", choices=("coco", "yolo", "voc"), required=True)
    convert.add_argument("--link", action="store_true", help="hard-link images instead of copying them")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Do it, and print what came of it."""
    return {"demo": _demo, "check": _check, "shots": _shots, "convert": _convert}[args.action](args)


def _demo(args: argparse.Namespace) -> int:
    from fsdet.data.synthetic import SIZES, draw_demo
    from fsdet.progress import Progress

    with Progress(sum(SIZES.values()), "draw", unit="picture") as bar:
        path = draw_demo(args.out, seed=args.seed, progress=lambda done, _: bar.update(done - bar.count))
    print(path)
    return 0


def _check(args: argparse.Namespace) -> int:
    from fsdet.data import sources
    from fsdet.data.check import check

    report = check(sources.load(args.data), deep=args.deep, k=args.shots)
    print(report)
    return 0 if report.ok else 2


def _shots(args: argparse.Namespace) -> int:
    from fsdet.data import sources
    from fsdet.data.shots import ShotFile

    drawn = ShotFile.draw(sources.load(args.data), args.shots, args.seed, args.split)
    drawn.save(args.out)
    ks = ", ".join(map(str, drawn.ks))
    print(f"{args.out}: {ks} shots of {len(drawn.shots)} classes, seed {drawn.seed}, sha256 {drawn.sha256[:12]}")
    command = f"fsdet train configs/stage_3.yaml data.shots={args.out}"
    print(f"next: {typed(command)}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from fsdet.data import sources
    from fsdet.data.convert import convert

    data = sources.load(args.data)
    lost = convert(data, args.out, args.to, link=args.link)
    print(f"{data}\n{args.out / 'data.yaml'}: {args.to}")
    if len(lost):
        print(lost)
    return 0
