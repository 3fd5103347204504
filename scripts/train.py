#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Flags of older training scripts, as a thin table onto configuration keys; `key=value` works beside them.

    python scripts/train.py --stage 2 --epochs 100 --n_way 4 --n_query 4 --lr 1e-4 --checkpoint C

Without CONFIG it is configs/demo/stage_N.yaml, on the data that --data_root or data.path= names, else on the demo set.
`--n_way` and `--n-way` are the same flag.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from fsdet import config as configs  # noqa: E402
from fsdet import yaml_strict  # noqa: E402
from fsdet.cli._arguments import split_overrides  # noqa: E402
from fsdet.cli.main import Parser  # noqa: E402
from fsdet.cli.main import main as alone  # noqa: E402
from fsdet.errors import FsdetError, UserError, explain  # noqa: E402


def fsdet(words: Sequence[str]) -> int:
    """`fsdet words...` in this process; `train` in NPROC processes under torchrun where the environment has NPROC.

    Returns the exit code, of a signal that torchrun was handed 128 and its number.
    """
    count = os.environ.get("NPROC") or "1"
    if not count.isdecimal() or count == "0":
        raise UserError(explain("a number of processes", repr(count), "NPROC", "set NPROC=2, or unset it"))
    if words[0] != "train" or count == "1":
        return alone(words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, "-m", "fsdet"]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    running = subprocess.Popen([*command, *words], env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    handed: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        handed.append(number)
        running.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = running.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + handed[0] if handed and code else code


# flag: the key it sets to its value
KEYS = {
    "--epochs": "optim.epochs",
    "--lr": "optim.lr",
    "--min-lr": "optim.min_lr",
    "--weight-decay": "optim.weight_decay",
    "--gradient-clip-norm": "optim.clip_norm",
    "--gradient-accumulation": "optim.accumulate",
    "--warmup-epochs": "optim.warmup_epochs",
    "--head-lr-multiplier": "optim.lr_scale.head",
    "--bbox-weight": "loss.weights.bbox",
    "--cls-weight": "loss.weights.cls",
    "--dfl-weight": "loss.weights.dfl",
    "--supcon-weight": "loss.weights.supcon",
    "--cpe-weight": "loss.weights.cpe",
    "--triplet-weight": "loss.weights.triplet",
    "--n-way": "episode.ways",
    "--n-shot": "episode.shots",
    "--n-episodes": "episode.per_epoch",
    "--checkpoint": "stage.init_from",
    "--save-dir": "run.dir",
    "--checkpoint-dir": "run.dir",
    "--device": "run.device",
    "--seed": "run.seed",
    "--num-workers": "data.workers",
    "--wandb-name": "log.wandb.name",
    "--wandb-project": "log.wandb.project",
    "--wandb-entity": "log.wandb.entity",
}
# flag without a value: what it stands for
SWITCHES = {
    "--use-wandb": "log.wandb.mode=auto",
    "--mixed-precision": "run.precision=auto",
    "--debug": "log.debug=true",
}
# flag: why it changes nothing here
NO_EFFECT = {
    "--save-interval": "a checkpoint is saved after every epoch; save.every_steps and save.every_minutes add more",
    "--triplet-ratio": "triplets are mined among the boxes of each batch; --triplet-weight sets their weight",
    "--triplet-batch-size": "triplets are mined among the boxes of each batch; loss.pair_rows caps them",
}
DEMO = Path("datasets/demo")  # where the shipped configurations expect the demo set
PATHS = ("data.path", "data.shots", "model.weights", "classifier.weights", "maskrcnn.weights", "run.dir",
         "stage.init_from")  # keys whose value is a path  # fmt: skip
JOINED = "# written by scripts/train.py from --data_root and --val_data_root\n"
DEFAULT_TRIPLET = 0.2  # what --use_triplet means when no --triplet_weight is given


@dataclass
class Request:
    """What a command line asks for, in terms of `fsdet train`."""

    stage: int
    config: Path | None = None
    overrides: list[str] = field(default_factory=list)
    resume: str | None = None  # None: no; "": this run
    exist_ok: bool = False
    notes: list[str] = field(default_factory=list)


def parser(prog: str) -> argparse.ArgumentParser:
    """All flags, spelt with dashes."""
    out = Parser(prog=prog, description=__doc__)
    out.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file")
    out.add_argument("--config", dest="config_flag", metavar="CONFIG", help="the same as a flag")
    out.add_argument("--stage", type=int, choices=(1, 2, 3))
    for flag, key in KEYS.items():
        out.add_argument(flag, metavar="X", help=key)
    for flag, override in SWITCHES.items():
        out.add_argument(flag, action="store_true", help=override)
    for flag, why in NO_EFFECT.items():
        out.add_argument(flag, metavar="X", help=f"accepted, no effect: {why}")
    out.add_argument("--n-query", type=int, metavar="Q", help="queries a way: episode.queries = n_way x n_query")
    out.add_argument("--batch-size", type=int, metavar="B", help="images per step in stages 1 and 3: episode.queries")
    out.add_argument("--use-triplet", action="store_true", help="loss.weights.triplet, .2 unless --triplet-weight")
    out.add_argument("--data-root", type=Path, metavar="D", help="data YAML, or a folder in any known format")
    out.add_argument("--val-data-root", type=Path, metavar="D", help="validation images, when not part of --data-root")
    out.add_argument("--resume", nargs="?", const="", metavar="RUN", help="continue this run, or RUN")
    out.add_argument("--exist-ok", action="store_true", help="overwrite a run folder that has a checkpoint")
    return out


def dashed(argv: Sequence[str]) -> list[str]:
    """`--n_way=4` as `--n-way=4`."""
    return [_dashed(word) if word.startswith("--") else word for word in argv]


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def translate(argv: Sequence[str], stage: int | None = None, prog: str = "scripts/train.py") -> Request:
    """Flags and `key=value` words as one Request; a key given as `key=value` wins over a flag.

    Raises:
        UserError, SystemExit: a flag that does not fit.
    """
    rest, bare = split_overrides(dashed(argv))
    parse = parser(prog)
    args = parse.parse_args(rest)
    request = Request(args.stage or stage or 0, exist_ok=args.exist_ok, resume=args.resume)
    if request.stage == 0:
        parse.error("expected --stage 1, 2 or 3")
    chosen = args.config or args.config_flag
    if args.resume and args.resume.endswith((".yaml", ".yml")) and chosen is None:  # `--resume CONFIG`
        chosen, request.resume = args.resume, ""
    request.config = Path(from_here(chosen)) if chosen else None
    request.resume = request.resume and from_here(request.resume)
    for flag, key in KEYS.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None:
            request.overrides.append(f"{key}={value}")
    request.overrides += [text for flag, text in SWITCHES.items() if getattr(args, flag[2:].replace("-", "_"))]
    if args.use_triplet and args.triplet_weight is None:
        request.overrides.append(f"loss.weights.triplet={DEFAULT_TRIPLET}")
    _count_images(args, request)
    for flag, why in NO_EFFECT.items():
        if getattr(args, flag[2:].replace("-", "_")) is not None:
            request.notes.append(f"{flag} has no effect: {why}")
    if args.data_root or args.val_data_root:
        roots = (root and Path(from_here(str(root))) for root in (args.data_root, args.val_data_root))
        request.overrides.append(f"data.path={data_path(*roots)}")
    request.overrides = [_placed(text) for text in [*request.overrides, *bare]]
    _lower_min_lr(args, request)
    _tell_muon(args, request)
    return request


def _lower_min_lr(args: argparse.Namespace, request: Request) -> None:
    """Older scripts knew no lowest rate: under an --lr below the configuration's it becomes a hundredth of --lr."""
    source = request.config or default_config(request)
    told = [text for text in request.overrides if text.startswith("optim.min_lr=")]
    if args.lr is None or told or not source.is_file():
        return
    lowest = configs.load(source).optim.min_lr
    try:
        lr = float(args.lr)
    except ValueError:
        return  # the configuration says what is wrong with it
    if lr < lowest:
        request.overrides.append(f"optim.min_lr={lr / 100:g}")
        request.notes.append(f"optim.min_lr is {lowest:g} in {source.name}: lowered to {lr / 100:g} for --lr {args.lr}")


def _tell_muon(args: argparse.Namespace, request: Request) -> None:
    """Under Muon --lr leaves most of the network alone: kernels have a rate of their own."""
    source = request.config or default_config(request)
    named = any(text.startswith(("optim.name=", "optim.muon_lr=")) for text in request.overrides)
    if args.lr is None or named or not source.is_file():
        return
    optim = configs.load(source).optim
    if optim.name == "muon":
        request.notes.append(
            f"{source.name} trains with Muon: --lr is the rate of biases, norms and matrices, "
            f"kernels keep optim.muon_lr={optim.muon_lr:g}; optim.name=adamw gives --lr its old meaning"
        )


def from_here(path: str, made: bool = False) -> str:
    """A path as the user means it, who stood in $FSDET_STOOD when a shell script went to the checkout.

    What exists where the user stood wins, then what exists in the checkout; what is nowhere is meant where they stood,
    and so is what will be `made`: an older run of the checkout is not what somebody elsewhere names.
    """
    stood = os.environ.get("FSDET_STOOD")
    if not stood or path in ("", "null") or path.startswith("~"):
        return path
    there = os.path.normpath(os.path.join(stood, path))
    return path if not made and not os.path.exists(there) and os.path.exists(path) else there


def _placed(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={from_here(value, made=key == 'run.dir')}" if key in PATHS else override


def default_config(request: Request) -> Path:
    """Without CONFIG it is the demo's, whatever data is named: it runs on any machine."""
    return ROOT / "configs" / "demo" / f"stage_{request.stage}.yaml"


def _count_images(args: argparse.Namespace, request: Request) -> None:
    """Images per step: n_way x n_query in stage 2, the batch size elsewhere."""
    if request.stage != 2:
        if args.batch_size is not None:
            request.overrides.append(f"episode.queries={args.batch_size}")
        return
    if args.n_query is not None:
        if args.n_way is None:
            raise UserError(explain("--n_way beside --n_query", "none", "flags", "episode.queries=16 sets the product"))
        request.overrides.append(f"episode.queries={_whole(args.n_way, '--n_way') * args.n_query}")
        if args.batch_size is not None:
            request.notes.append("--batch_size has no effect in stage 2: a step has n_way x n_query images")
    elif args.batch_size is not None:
        request.overrides.append(f"episode.queries={args.batch_size}")


def _whole(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(explain("a whole number", repr(text), flag, "such as 4")) from None


def data_path(train: Path | None, val: Path | None) -> Path:
    """What data.path is for --data_root and --val_data_root; two folders are joined by a small data YAML beside them.

    Raises:
        UserError: a path does not exist, only the validation data are given, or the YAML cannot be written.
    """
    if train is None:
        raise UserError(explain("--data_root beside --val_data_root", "none", "flags", "add --data_root"))
    for path in (train, val):
        if path is not None and not path.exists():
            raise UserError(explain("a data YAML or folder", "nothing there", str(path), "check the path"))
    if val is None or val.resolve() == train.resolve():
        return train
    from fsdet.data.report import Report
    from fsdet.data.sources import plan

    plans = {"train": plan(train, Report()), "val": plan(val, Report())}
    root = Path(os.path.commonpath([p.root.resolve() for p in plans.values()]))
    joined: dict = {"path": str(root)}
    for split, found in plans.items():
        joined[split] = [
            _source(s, found.root, root) for s in found.splits.get(split) or next(iter(found.splits.values()))
        ]
    beside = train.parent / "data.yaml"  # class lists often lie one folder up
    first = plans["train"]
    if not (first.base or first.names) and beside.is_file():
        first = plan(beside, Report())
    joined |= {key: list(value) for key in ("base", "novel", "names") if (value := getattr(first, key))}
    out = train.parent / f"{train.name}+{val.name}.yaml"
    _write_joined(out, JOINED + yaml_strict.dump(joined))
    return out


def _write_joined(out: Path, text: str) -> None:
    try:
        if out.exists() and not out.read_text(encoding="utf-8").startswith(JOINED):
            raise UserError(
                explain("a file that this script wrote, or none", "another one", str(out), "rename it, or use it as "
                        "--data_root")
            )  # fmt: skip
        out.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(explain("a data YAML to write", str(error), str(out), "write one by hand")) from error


def _source(source, home: Path, root: Path) -> dict:
    """One source of a data YAML, its paths moved from `home` to `root`."""

    def move(path: str) -> str:
        return os.path.relpath(home.resolve() / path, root)

    out = {"path": move(source.path)}
    if source.images:
        out["images"] = move(source.images)
    if source.names:
        out["names"] = list(source.names)
    return out


def guarded(run: Callable[[], int]) -> int:
    """Run what prepares a training; a slip of the user becomes a message and its exit code."""
    try:
        return run()
    except FsdetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else 2


def demo_missing(config: configs.Config) -> bool:
    """Whether a configuration wants the demo set and it has not been drawn."""
    path = Path(config.data.path)
    return path.parent == DEMO and not path.exists()


def train(argv: Sequence[str]) -> int:
    """Translate and hand over to `fsdet train`; draws the demo set when it is wanted and missing."""
    from fsdet.engine.checkpoint import in_run  # not for --help, which needs no torch

    request = translate(argv)
    config = request.config or default_config(request)
    settings = configs.load(config, request.overrides)
    init = settings.stage.init_from and in_run(settings.stage.init_from)
    if init and not init.exists() and not any(t.startswith("stage.init_from=") for t in request.overrides):
        request.notes.append(f"{init} is missing and no --checkpoint is given: starting from scratch")
        request.overrides += ["stage.init_from=", "stage.freeze_norm=false"]
    for note in request.notes:
        print(f"note: {note}")
    print("fsdet train", os.path.relpath(config), *request.overrides, flush=True)
    if demo_missing(settings) and (code := fsdet(["data", "demo", str(DEMO)])):
        return code
    resume = [] if request.resume is None else [f"--resume={request.resume}" if request.resume else "--resume"]
    return fsdet(["train", str(config), *resume, *["--exist-ok"] * request.exist_ok, *request.overrides])


if __name__ == "__main__":
    sys.exit(guarded(lambda: train(sys.argv[1:])))
