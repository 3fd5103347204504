# SPDX-License-Identifier: AGPL-3.0-or-later
"""The documents say what is there: commands parse, keys, flags, files and names exist. Nothing is run."""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import fsdet
from fsdet import config, yaml_strict
from fsdet.cli._arguments import split_overrides
from fsdet.cli.main import VERBS, Parser
from fsdet.data.datayaml import KEYS

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src/fsdet"
PAGES = ("README.md", "CHANGELOG.md", "docs/data.md", "docs/flags.md", "docs/museum.md", "docs/notebook.md",
         "docs/results.md", "docs/tree.md", "checkpoints/README.md")  # fmt: skip
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SHELL_STAGES = {"train_stage_1.sh": 1, "train_stage_2.sh": 2, "train_stage_3.sh": 3}
SHELL_TASKS = {"train_classifier.sh": "classifier", "train_maskrcnn.sh": "maskrcnn"}
# commands without a parser of ours
PLAIN = {"grep", "wc", "tail", "python3", "dashboard.sh", "test.sh", "test_gradient_fix.sh"}


@pytest.fixture(scope="module")
def train():
    """scripts/train.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("train")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def command_lines(text: str) -> Iterator[list[str]]:
    """Every command of a page's shell blocks as words; the parts of a pipe are commands of their own."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("NPROC=2 "), comments=True)
            cuts = [i for i, word in enumerate(words) if word == "|"]
            for start, stop in zip([0, *(i + 1 for i in cuts)], [*cuts, len(words)], strict=True):
                if words[start:stop]:
                    yield words[start:stop]


def parse_fsdet(words: list[str]) -> argparse.Namespace:
    """The arguments of `fsdet VERB ...`; a wrong flag ends in SystemExit."""
    assert words[0] in VERBS, f"no verb {words[0]}"
    module = importlib.import_module(f"fsdet.cli.{words[0]}")
    return module.parse(Parser(prog=f"fsdet {words[0]}"), words[1:])


def check_command(words: list[str], train) -> None:
    """Raise or fail unless a command line would be understood."""
    if words[0] == "torchrun":
        words = words[words.index("-m") - 1 :]
    name = Path(words[0]).name
    if words[0].startswith("./"):
        assert (ROOT / words[0]).is_file(), words[0]
    if name == "torchrun":  # starts what follows -m
        assert words[1:3] == ["--standalone", "--nproc_per_node"] and words[4] == "-m"
        words = words[5:]
    if words[0] == "fsdet" or words[1:3] == ["-m", "fsdet"]:
        args = parse_fsdet(words[1 if words[0] == "fsdet" else 3 :])
        check_config(getattr(args, "config", None), getattr(args, "overrides", []), None)
    elif name in SHELL_TASKS:
        request = importlib.import_module("run_task").requested(SHELL_TASKS[name], words[1:])
        assert config.load(request.config, request.overrides).task == SHELL_TASKS[name]
    elif name in SHELL_STAGES or words[:2] == ["python", "scripts/train.py"]:
        rest, overrides = split_overrides(train.dashed(words[1 if name in SHELL_STAGES else 2 :]))
        args = train.parser(name).parse_args(rest)
        check_config(args.config, overrides, SHELL_STAGES.get(name, args.stage))
    else:
        assert name in PLAIN, f"{name}: not a command that this test knows"
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).is_file(), word


def check_config(path: str | Path | None, overrides: list[str], stage: int | None) -> None:
    """Overrides fit the configuration that they are said to change."""
    shipped = ROOT / path if path else ROOT / f"configs/demo/stage_{stage}.yaml"
    config.load(shipped if shipped.is_file() else None, overrides)


COMMANDS = [(page, words) for page in PAGES for words in command_lines(TEXT[page])]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p}: {' '.join(w)[:70]}" for p, w in COMMANDS])
def test_every_command_line_is_understood(page, words, train):
    check_command(words, train)


@pytest.mark.parametrize(
    "line",
    ["fsdet predict a.pt --suport s --source x --out y", "fsdet train configs/demo/stage_1.yaml optim.lrr=1",
     "fsdet fly", "./train_stage_2.sh configs/stage_9.yaml", "./scripts/nothing.sh", "./train_stage_2.sh --n_wai 3"],
)  # fmt: skip
def test_the_check_itself_sees_a_slip(line, train):
    with pytest.raises((AssertionError, SystemExit, config.ConfigError)):
        check_command(shlex.split(line), train)


def test_verbs_named_in_running_text_exist():
    named = {v for text in TEXT.values() for v in re.findall(r"`fsdet ([a-z]+)", text)}
    assert named <= set(VERBS) and set(VERBS) <= named | {c[1][1] for c in COMMANDS if c[1][0] == "fsdet"}


def test_keys_named_in_running_text_exist():
    known, sections = config.keys(), set(config.Config.model_fields)
    for page, text in TEXT.items():
        for words in re.findall(r"`([a-z]\w*\.[^`]*)`", text):
            for word in words.split():
                key = word.partition("=")[0]
                if key.partition(".")[0] in sections and not key.endswith((".yaml", ".json", ".md")):
                    near = [k for k in known if k == key or key.startswith(f"{k}.") or k.startswith(f"{key}.")]
                    assert near, f"{page}: {key}"


def test_files_named_in_running_text_exist():
    named = re.compile(r"`\.?/?((?:src|scripts|configs|tests|docs|\.ci)/[\w./*-]+|\w+\.(?:toml|txt|sh))`")
    for page, text in TEXT.items():
        for path in named.findall(text):
            if path != "classes.txt":
                assert list(ROOT.glob(path)), f"{page}: {path}"
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).is_file(), f"{page}: {link}"


def tree_paths() -> list[str]:
    """Paths of the tree in docs/tree.md: two spaces of indentation a level, names that end in / open a folder."""
    [tree] = blocks(TEXT["docs/tree.md"], "text")
    found, open_folders = [], [""]
    for line in tree.splitlines():
        level, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert len(line.split()) > 1, f"{name}: a line says what the file is"
        del open_folders[level + 1 :]
        found.append(open_folders[level] + name)
        open_folders.append(open_folders[level] + name)
    return found


def test_the_tree_names_what_exists_once():
    paths = tree_paths()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(paths) == len(set(paths))


def test_every_source_file_has_its_line_in_the_tree():
    listed = tree_paths()
    whole = {p for p in listed if p.endswith("/") and not any(q != p and q.startswith(p) for q in listed)}
    files = [p.relative_to(ROOT).as_posix() for p in SRC.rglob("*.py") if not p.name.startswith("__")]
    assert [p for p in files if p not in listed and not p.startswith(tuple(whole))] == []


def table(text: str, head: str) -> dict[str, str]:
    """{first cell: second cell} of the table under the line `head`, back ticks taken off."""
    rows = re.search(re.escape(head) + r"\n\|[-|]+\n((?:\|.*\n)+)", text)[1].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row[1].strip("`") for row in cells}


def test_every_section_of_the_configuration_is_told():
    told = table(TEXT["README.md"], "| section | what it decides |")
    assert [name.strip("`") for name in told] == list(config.Config.model_fields)


def test_every_flag_is_told_with_the_key_that_it_sets(train):
    told = {
        train.dashed([flag.strip("`")])[0]: key for flag, key in table(TEXT["docs/flags.md"], "| flag | key |").items()
    }
    assert told == {**train.KEYS, **train.SWITCHES}
    own = {flag for action in train.parser("x")._actions for flag in action.option_strings if flag.startswith("--")}
    words = {train.dashed([word])[0] for word in re.findall(r"`(--[\w-]+)", TEXT["docs/flags.md"])}
    assert own - {"--help"} <= words <= own


def test_every_key_of_a_data_yaml_is_told():
    told = {name for cell in table(TEXT["docs/data.md"], "| key | meaning |") for name in re.findall(r"`(\w+)`", cell)}
    assert told == set(KEYS)


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_example_data_yamls_hold_known_keys(page):
    for block in blocks(TEXT[page], "yaml"):
        document = yaml_strict.parse(block, page)
        assert document.problems == [] and set(document.value) <= set(KEYS)


def test_example_python_parses_and_imports_names_that_exist():
    for block in blocks(TEXT["README.md"], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "fsdet":
                assert all(hasattr(fsdet, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("fsdet"):
                source = (ROOT / "src" / f"{node.module.replace('.', '/')}.py").read_text(encoding="utf-8")
                top = {getattr(n, "name", "") for n in ast.parse(source).body}
                top |= {a.name for n in ast.parse(source).body if isinstance(n, ast.ImportFrom) for a in n.names}
                assert {alias.name for alias in node.names} <= top, node.module


def test_every_test_that_the_museum_names_exists():
    source, named = "", 0
    for path, name in re.findall(r"`([\w/]+\.py)`|`(test_\w+)`", TEXT["docs/museum.md"]):
        if path:
            source = (ROOT / "tests" / path).read_text(encoding="utf-8")
        else:
            assert f"def {name}(" in source, name
            named += 1
    assert named > 40


def test_results_have_their_place():
    parts = re.split(r"<!-- /?results:demo -->", TEXT["README.md"])
    assert len(parts) == 3 and parts[1].strip()


def test_no_page_names_a_machine_path_or_a_package_host():
    for page, text in TEXT.items():
        assert not re.search(r"/(?:work|home|tmp|root)/|index-url|pypi\.org/|\bhttps?://(?!arxiv|doi)", text), page
