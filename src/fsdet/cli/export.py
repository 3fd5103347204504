# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet export checkpoints/stage2/best.pt --bank my.bank --out model.onnx
fsdet export checkpoints/stage2/best.pt --prototypes input --out model.onnx --images photos/
fsdet predict --onnx model.onnx photos/ --out predictions
The file takes images and gives boxes and scores; what they mean is in its metadata. Its answers are compared with
PyTorch's on real images: exit code 1 when they differ. Needs the extra `export`."""

import argparse
from pathlib import Path

from fsdet.cli._arguments import existing
from fsdet.command import typed


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CHECKPOINT --out FILE [--bank BANK] [--prototypes frozen|input] [--format F] [--images DIR]"""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="model.onnx, say")
    parser.add_argument("--bank", type=Path, metavar="BANK", help="registered classes; without, the detector's own")
    parser.add_argument("--prototypes", choices=("frozen", "input"), default="frozen", help="those of the bank in the "
                        "graph, or any number of them as its second input (frozen)")  # fmt: skip
    parser.add_argument("--format", choices=("onnx", "torchscript", "exported"), default="onnx", help="exported: a "
                        "program of torch.export (onnx)")  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="IMAGE|DIR", help="what to compare on (default: the split test "
                        "of the data it was trained on)")  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Write the file and its parity report; 1 when it says something else than PyTorch."""
    existing(args.checkpoint, "a checkpoint", "train one: ./train_stage_2.sh")
    for path, what in ((args.bank, "a bank"), (args.images, "an image or a folder of images")):
        if path is not None:
            existing(path, what, "check the path")
    from fsdet.tasks import export

    parity = export.export(args.checkpoint, out=args.out, bank=args.bank, form=args.format,
                           prototypes=args.prototypes, images=args.images)  # fmt: skip
    print(f"{args.out}: {args.format}, {args.out.stat().st_size / 1e6:.1f} MB; {parity.describe()}")
    print(f"{export.report_path(args.out)}: the same as numbers")
    if not parity.ok:
        print(f"{args.out} is no stand-in for the checkpoint: do not ship it")
        return 1
    if args.format == "onnx":
        known = [args.bank] if args.prototypes == "input" and args.bank else []
        line = f"fsdet predict --onnx {{}} IMAGES{' --bank {}' if known else ''} --out predictions"
        print(f"next: {typed(line, args.out, *known)}")
    return 0
