# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet bank list my.bank
fsdet bank merge a.bank b.bank --out both.bank
fsdet bank remove my.bank cup fork
fsdet bank rename my.bank cup mug
fsdet bank drop my.bank mug 2 5
fsdet bank outliers my.bank"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fsdet.cli._arguments import count
from fsdet.command import typed
from fsdet.errors import UserError, are, counted, explain, some

if TYPE_CHECKING:
    from fsdet.bank import PrototypeBank

DASHED = "one that starts with - goes with all behind it to the end of the line, after --"


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """list BANK | merge BANK BANK... --out BANK | remove BANK CLASS... | rename BANK CLASS NEW
    | drop BANK CLASS SHOT... | outliers BANK; remove, rename and drop take --out BANK, which --replace may replace"""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|merge|remove|rename|drop|outliers")
    listing = actions.add_parser("list", help="classes, their instances and thresholds")
    listing.add_argument("bank", type=Path, metavar="BANK")
    listing.add_argument("--shots", action="store_true", help="also the file that each shot is from")
    merge = actions.add_parser(
        "merge", help="classes of several banks; a shared class has the shots of all of them, each once"
    )
    merge.add_argument("banks", nargs="+", type=Path, metavar="BANK")
    merge.add_argument("--out", type=Path, required=True, metavar="BANK")
    remove = actions.add_parser("remove", help="take classes out")
    remove.add_argument("bank", type=Path, metavar="BANK")
    remove.add_argument("names", nargs="+", metavar="CLASS", help=DASHED)
    rename = actions.add_parser("rename", help="give a class another name")
    rename.add_argument("bank", type=Path, metavar="BANK")
    rename.add_argument("name", metavar="CLASS", help=DASHED)
    rename.add_argument("new", metavar="NEW")
    drop = actions.add_parser("drop", help="take single shots of a class out")
    drop.add_argument("bank", type=Path, metavar="BANK")
    drop.add_argument("name", metavar="CLASS", help=DASHED)
    drop.add_argument("shots", nargs="+", type=count, metavar="SHOT", help="numbers from 1, as outliers tells them")
    for changing in (remove, rename, drop):
        changing.add_argument("--out", type=Path, metavar="BANK", help="default: the same file")
    for writing in (merge, remove, rename, drop):
        writing.add_argument("--replace", action="store_true", help="let --out replace a bank that is there")
    outliers = actions.add_parser("outliers", help="shots that are far from the others of their class")
    outliers.add_argument("bank", type=Path, metavar="BANK")
    args = parser.parse_args(argv)
    if getattr(args, "replace", False) and not args.out:
        parser.error("expected --out beside --replace: without, the bank itself is changed")
    return args


def run(args: argparse.Namespace) -> int:
    """Do it, and print what the resulting bank holds."""
    from fsdet.bank import PrototypeBank, refuse_bank

    if getattr(args, "out", None) and not _is_itself(args):
        refuse_bank(args.out, args.replace)
    if args.action == "merge":
        bank = _merged([PrototypeBank.load(path) for path in args.banks], args.out)
        path = bank.save(args.out)
    else:
        path, bank = args.bank, PrototypeBank.load(args.bank)
        if args.action == "outliers":
            return _tell_outliers(path, bank)
        if args.action != "list":
            bank = _changed(bank, args)
            path = bank.save(args.out or args.bank)
    print(f"{path}: {counted(len(bank.names), 'class', 'es')}, weights {bank.model_sha256[:12]}")
    for line, files in zip(bank.describe(), bank.sources, strict=True):
        print(f"  {line}")
        if getattr(args, "shots", None) is True:
            print("\n".join(f"    {k}  {file or 'not known'}" for k, file in enumerate(files, 1)))
    return 0


def _merged(banks: "Sequence[PrototypeBank]", out: Path) -> "PrototypeBank":
    """The banks as one, for the file `out`; tells which shots more than one of them holds, of one class or of two."""
    bank = banks[0]
    for other in banks[1:]:
        merged = bank.merge(other)  # refuses before anything is told
        shared = bank.shared(other)
        again = {name: len(shots) for name, shots in shared.items()}
        if again:
            told = ", ".join(f"{name} {shots}" for name, shots in again.items())
            total = sum(again.values())
            print(f"{other.where}: {total} of its shots {are(total)} in the banks before it and kept once: {told}")
        _tell_of_two(bank, other, shared, out)
        bank = merged
    return bank


def _tell_of_two(bank: "PrototypeBank", other: "PrototypeBank", shared: Mapping[str, Collection[int]],
                 out: Path) -> None:  # fmt: skip
    """Tell which shots that `other` brings, `shared` ones left out, are of another class in `bank`."""
    new = {name: own.kept([k for k in range(len(own)) if k not in shared.get(name, ())])
           for name, own in other.classes.items()}  # fmt: skip
    both = [f"'{name}': {text}" for name, shots in new.items() for text in bank.of_another(name, shots)]
    if both:
        print(f"{other.where}: the same image and box as in another class of the banks before it: {some(both)}; "
              "the two will be taken for each other")  # fmt: skip
        print(f"  next: `{typed('fsdet bank drop {} CLASS SHOT', out)}` in the class that it does not show; "
              f"`{typed('fsdet bank list {} --shots', out)}` numbers them")  # fmt: skip


def _is_itself(args: argparse.Namespace) -> bool:
    """Whether --out is the bank that is changed."""
    return args.action != "merge" and args.out.resolve() == args.bank.resolve()


def _changed(bank: "PrototypeBank", args: argparse.Namespace) -> "PrototypeBank":
    """The bank after remove, rename or drop."""
    if args.action == "rename":
        return bank.rename(args.name, args.new)
    if args.action == "drop":
        return bank.drop(args.name, [shot - 1 for shot in args.shots])
    names = [bank.known_as(name) for name in args.names]
    if set(names) == set(bank.names):
        raise UserError(explain("a class that stays", f"all {len(bank.names)} of them", bank.where,
                                "name fewer, or delete the file"))  # fmt: skip
    for name in dict.fromkeys(names):
        bank = bank.remove(name)
    return bank


def _tell_outliers(path: Path, bank: "PrototypeBank") -> int:
    """A line for each shot that is far from the others of its class, and how to drop it."""
    from fsdet.detect.calibration import outliers

    classes = zip(bank.names, bank.instances, bank.sources, strict=True)
    found = [(name, row, files[row[0]]) for name, rows, files in classes for row in outliers(rows)]
    for name, (shot, likeness, usual), file in found:
        which = f"shot {shot + 1}" + (f" ({file})" if file else "")
        print(f"{name}: {which} is far from the others: cosine {likeness:.2f} to their mean, {usual:.2f} is usual")
        drop = "fsdet bank drop {} -- {} {}" if name.startswith("-") else "fsdet bank drop {} {} {}"
        print(f"  next, if it is not meant: {typed(drop, path, name, shot + 1)}")
    few = [name for name, rows in zip(bank.names, bank.instances, strict=True) if len(rows) < 3]
    if few:
        print(f"fewer than three shots tell nothing: {', '.join(few)}")
    if not found:
        print(f"{path}: no shot is far from the others of its class")
    return 0
