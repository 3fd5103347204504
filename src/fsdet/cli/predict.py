# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet predict checkpoints/stage2/best.pt --support support/ --source photos/ --out predictions
fsdet predict checkpoints/stage2/best.pt --bank my.bank --source flight.mp4 --out predictions
fsdet predict checkpoints/stage2/best.pt --bank my.bank --source 0 --frames 500 --out predictions
fsdet predict checkpoints/stage2/best.pt --refdet flights/ --out found
fsdet predict --onnx model.onnx photos/ --out predictions"""

import argparse
from pathlib import Path

from fsdet.cli._arguments import Once, add_device, count, existing
from fsdet.errors import UserError, explain


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CHECKPOINT (--support DIR | --bank BANK) --source S --out DIR, or --onnx FILE S, or CHECKPOINT --refdet DIR"""
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="with --onnx and without "
                        "--source it is the source")  # fmt: skip
    known = parser.add_mutually_exclusive_group()
    known.add_argument(
        "--support", action=Once, type=Path, metavar="DIR", help="support/<class>/*.jpg: the classes to find"
    )
    known.add_argument(
        "--bank", action=Once, type=Path, metavar="BANK", help="classes registered before; without, the base ones"
    )
    parser.add_argument("--source", action=Once, type=Path, metavar="IMAGE|DIR|PATTERN|VIDEO|CAMERA", help="a "
                        "number is a camera; Ctrl-C ends it")  # fmt: skip
    parser.add_argument("--refdet", type=Path, metavar="DIR", help="samples/<id>/ of photographs and a video: each "
                        "object is looked for in its video, and ST-IoU told")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="another folder than the source's")
    parser.add_argument("--conf", type=_share, metavar="P", help="least score of every class (default: what each "
                        "registered class proposed, .25 for the others)")  # fmt: skip
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="a file of fsdet export, run on the CPU")
    parser.add_argument("--txt", action="store_true", help="also OUT/labels/IMAGE.txt: class, box as shares, score")
    parser.add_argument("--frames", type=count, metavar="N", help="of a video or camera: the first N")
    parser.add_argument("--no-video", action="store_true", help="of a video or camera: no annotated copy")
    parser.add_argument("--rescore", action="store_true", help="look at what was found a second time, larger: surer, "
                        "and some 2.5 times the time")  # fmt: skip
    add_device(parser)
    args = parser.parse_args(argv)
    if args.refdet:
        if args.checkpoint is None or args.source or args.support or args.bank or args.onnx or args.frames or args.txt:
            parser.error("expected CHECKPOINT, --refdet and --out; --conf, --no-video, --rescore and --device may be "
                         "beside them")  # fmt: skip
        return args
    if args.onnx and args.source is None:
        args.checkpoint, args.source = None, args.checkpoint
    if args.source is None or (args.checkpoint is None and not args.onnx):
        parser.error("expected CHECKPOINT and --source, or --onnx FILE and a source")
    if args.onnx and args.rescore:
        parser.error("expected CHECKPOINT beside --rescore; an exported file looks once")
    if args.onnx and args.support:
        parser.error("expected --bank, or classes frozen into the file, beside --onnx")
    return args


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got '{text}'")
    return value


def run(args: argparse.Namespace) -> int:
    """Draw detections into --out; prints the summary."""
    if args.checkpoint is not None:
        existing(args.checkpoint, "a checkpoint", "train one: ./train_stage_2.sh")
    for path in (args.support, args.bank):
        if path is not None:
            existing(path, "the classes to find", "check --support or --bank")
    if args.refdet:
        from fsdet.tasks import refer

        existing(args.refdet, "a RefDet folder", "draw one with fsdet data demo DIR --video")
        print(refer.predict(args.checkpoint, folder=args.refdet, out=args.out, conf=args.conf, device=args.device,
                            film=not args.no_video, rescore=args.rescore))  # fmt: skip
        return 0
    print(_predict(args))
    return 0


def _predict(args: argparse.Namespace) -> str:
    from fsdet.data.video import is_video

    common = {key: getattr(args, key) for key in ("support", "bank", "out", "device", "onnx", "rescore")}
    camera = int(str(args.source)) if str(args.source).isdecimal() and not args.source.exists() else None
    if camera is not None or (is_video(args.source) and not args.source.is_dir()):
        from fsdet.tasks import watch

        wanted = watch.Wanted(args.conf, args.frames, not args.no_video, args.txt)
        source = args.source if camera is None else camera
        return watch.predict(args.checkpoint, source=source, wanted=wanted, **common)
    if args.frames or args.no_video:
        raise UserError(explain("a video or a camera", str(args.source), "--frames and --no-video", "leave them out"))
    from fsdet.tasks import use

    return use.predict(args.checkpoint, source=args.source, conf=args.conf, txt=args.txt, **common)
