# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet bank list my.bank
fsdet bank merge a.bank b.bank --out both.bank
fsdet bank remove my.bank cup fork"""

import argparse
from pathlib import Path


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """list BANK | merge BANK BANK... --out BANK | remove BANK CLASS... [--out BANK]"""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|merge|remove")
    listing = actions.add_parser("list", help="classes, their instances and thresholds")
    listing.add_argument("bank", type=Path, metavar="BANK")
    merge = actions.add_parser("merge", help="classes of several banks; instances of a shared class are kept together")
    merge.add_argument("banks", nargs="+", type=Path, metavar="BANK")
    merge.add_argument("--out", type=Path, required=True, metavar="BANK")
    remove = actions.add_parser("remove", help="take classes out")
    remove.add_argument("bank", type=Path, metavar="BANK")
    remove.add_argument("names", nargs="+", metavar="CLASS")
    remove.add_argument("--out", type=Path, metavar="BANK", help="default: the same file")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Do it, and print what the resulting bank holds."""
    from fsdet.bank import PrototypeBank
    from fsdet.files import refuse_foreign

    if getattr(args, "out", None):
        refuse_foreign(args.out, "a bank", PrototypeBank.is_bank)
    if args.action == "merge":
        bank = PrototypeBank.load(args.banks[0])
        for path in args.banks[1:]:
            bank = bank.merge(PrototypeBank.load(path))
        path = bank.save(args.out)
    else:
        path, bank = args.bank, PrototypeBank.load(args.bank)
        if args.action == "remove":
            for name in args.names:
                bank = bank.remove(name)
            path = bank.save(args.out or args.bank)
    print(f"{path}: {len(bank.names)} classes, weights {bank.model_sha256[:12]}")
    for line in bank.describe():
        print(f"  {line}")
    return 0
