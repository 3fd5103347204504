# SPDX-License-Identifier: AGPL-3.0-or-later
"""Files of others run nothing and reach nothing outside the data root; the package asks for no network and no HOME."""

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dataset_files import coco, data_yaml
from fsdet import config
from fsdet.bank import PrototypeBank
from fsdet.cli.main import VERBS
from fsdet.data import sources
from fsdet.engine import checkpoint
from fsdet.errors import UserError
from fsdet.models.backbone import read_weights
from fsdet.tasks import incident, study
from fsdet.tasks.loading import load_trained

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
RUNS_CODE = {"eval", "exec", "compile", "__import__", "execfile"}
UNPICKLES = {"pickle", "cPickle", "_pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
YAML_LOADS = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}


def unsafe(source: str) -> Iterator[str]:
    """`line: what` of every call that could run what a file holds; a method named eval is none."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.partition(".")[0]
            if root in UNPICKLES - {"pickle"}:
                yield f"{node.lineno}: imports {name}"
        if isinstance(node, ast.ImportFrom) and (node.module in UNPICKLES or node.module == "yaml"):
            yield f"{node.lineno}: imports from {node.module}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            if node.attr not in ("UnpicklingError", "PicklingError"):
                yield f"{node.lineno}: pickle.{node.attr}"
        if isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {what}" for what in _unsafe_call(node))


def _unsafe_call(node: ast.Call) -> Iterator[str]:
    name, owner = "", ""
    if isinstance(node.func, ast.Name):
        name = node.func.id
        if name in RUNS_CODE:
            yield name
    elif isinstance(node.func, ast.Attribute):
        name, owner = node.func.attr, ast.unparse(node.func.value)
    given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
    if given.get("weights_only", True) is not True:
        yield "weights_only that is not True"
    if (owner, name) == ("torch", "load") and given.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if owner == "yaml" and name in YAML_LOADS:
        yield f"yaml.{name}"
    if given.get("allow_pickle") or given.get("shell") or (owner == "os" and name in ("system", "popen")):
        yield ast.unparse(node.func)


def test_no_call_can_run_what_a_file_holds():
    found = [f"{path.relative_to(ROOT)}:{what}" for path in CODE for what in unsafe(path.read_text(encoding="utf-8"))]
    assert found == []


SLIPS = """torch.load(f)
torch.load(f, weights_only=False)
load(f, weights_only=flag)
eval(text)
exec(text)
yaml.load(text, yaml.Loader)
yaml.unsafe_load(text)
pickle.load(f)
pickle.Unpickler(f)
from pickle import loads
from yaml import load
import dill
import marshal
np.load(f, allow_pickle=True)
os.system('ls')
subprocess.run('ls', shell=True)
__import__(name)""".splitlines()
HONEST = """model.eval()
torch.load(f, weights_only=True)
error = pickle.UnpicklingError
yaml.safe_dump(x)
yaml.SafeLoader(x)
torch.compile(model)""".splitlines()


@pytest.mark.parametrize("line", SLIPS)
def test_the_rule_sees_every_slip(line):
    assert list(unsafe(line))


@pytest.mark.parametrize("line", HONEST)
def test_the_rule_lets_honest_lines_be(line):
    assert not list(unsafe(line))


class Payload:
    """Pickles as a call of `function` with a path that the call would make."""

    def __init__(self, function, *given):
        self.call = function, given

    def __reduce__(self):
        return self.call


def payloads(mark: Path) -> dict[str, object]:
    touch = f"touch {mark}"
    return {
        "os.system": Payload(os.system, touch),
        "mkdir": Payload(os.mkdir, str(mark)),
        "eval": Payload(eval, f"__import__('os').mkdir({str(mark)!r})"),
        "exec": Payload(exec, f"import os; os.mkdir({str(mark)!r})"),
        "subprocess": Payload(subprocess.Popen, ["touch", str(mark)]),
        "open": Payload(open, str(mark), "w"),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "nested": Payload(OrderedDict, Payload(os.mkdir, str(mark))),
        "jit": Payload(torch.jit.load, str(mark)),
        "load": Payload(torch.load, str(mark)),
    }


def written(kind: str, payload: object, path: Path) -> Path:
    """A file in one of the forms that torch has read over the years, or in pickle's own."""
    state = {"model": payload, "ema": {}, "optimizer": {}, "step": 1, "spec": {"task": "fewshot", "model": payload}}
    if kind == "zip":
        torch.save(state, path)
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:  # a record of another name within the archive, as torch's own reader would find it
        whole = io.BytesIO()
        torch.save(state, whole)
        with zipfile.ZipFile(path, "w") as out, zipfile.ZipFile(whole) as given:
            for entry in given.infolist():
                out.writestr(entry.filename, given.read(entry))
            out.writestr("archive/constants.pkl", pickle.dumps(payload, protocol=2))
    return path


READERS = {"checkpoint": checkpoint.load, "detector": load_trained, "weights": read_weights, "bank": PrototypeBank.load}


@pytest.mark.filterwarnings("ignore:.*TorchScript archive:UserWarning")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "repacked"])
def test_no_reader_of_tensors_runs_a_payload(tmp_path, reader, kind):
    mark = tmp_path / "owned"
    for name, payload in payloads(mark).items():
        path = written(kind, payload, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=rf"{name}\.pt"):
            READERS[reader](path)
        assert not mark.exists(), name


def test_neither_does_the_reader_of_incidents(tmp_path):
    mark = tmp_path / "owned"
    facts = {"outcome": "bad_loss", "step": 1, "epoch": 1, "culprit": "x", "image_ids": []}
    (tmp_path / "report.json").write_text(json.dumps(facts))
    for payload in payloads(mark).values():
        torch.save([payload], tmp_path / "batch.pt")
        with pytest.raises(UserError, match="incident"):
            incident._read(tmp_path)
        assert not mark.exists()


def hostile(mark: Path, secret: Path) -> dict[str, str]:
    """YAML texts that ask for code, for files elsewhere, or for memory without end."""
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    return {
        "apply": f"train: !!python/object/apply:os.mkdir ['{mark}']",
        "new": f"train: !!python/object/new:os.mkdir ['{mark}']",
        "eval": f"train: !!python/object/apply:eval [\"__import__('os').mkdir('{mark}')\"]",
        "name": "train: !!python/name:os.system",
        "module": "train: !!python/module:os",
        "tuple": "train: !!python/tuple [a, b]",
        "own tag": "train: !include /etc/passwd",
        "binary": "train: !!binary aGVsbG8=",
        "bomb": bomb + "train: *a39",
        "circle": "train: &a [*a]",
        "deep": "train: " + "[" * 300 + "]" * 300,
        "above": f"train: ../{secret.name}/boxes.json",
        "far above": "train: ../../../../../../etc",
        "absolute": f"train: {secret}/boxes.json",
        "images elsewhere": f"train: {{path: own/boxes.json, images: {secret}}}",
        "key": "trian: own/boxes.json",
    }


CASES = list(hostile(Path("x"), Path("y")))


@pytest.fixture
def place(tmp_path):
    """A data root with a set of its own, and a neighbour that it may not read."""
    coco(tmp_path / "root/own")
    coco(tmp_path / "secret")
    return tmp_path / "root"


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_data_yaml_runs_nothing_and_opens_nothing_outside(place, case):
    """In a process of its own, whose every opening of a file is heard."""
    mark, secret = place / "owned", place.parent / "secret"
    file = place / "data.yaml"
    file.write_text(hostile(mark, secret)[case])
    with Opened(secret) as seen, pytest.raises(UserError):
        sources.load(file)
    assert seen == [] and not mark.exists()


@pytest.mark.parametrize("link", ["own/a.jpg", "own/boxes.json"])
def test_a_link_out_of_the_root_is_not_followed(place, link):
    secret, target = place.parent / "secret", place / link
    target.unlink()
    target.symlink_to(secret / target.name)
    data_yaml(place, train="own/boxes.json")
    with Opened(secret) as seen:
        try:
            found = [record.path.name for record in sources.load(place).split("train")]
        except UserError:
            found = []
    assert seen == [] and "a.jpg" not in found


def test_the_listener_hears_what_is_opened(place):
    with Opened(place) as seen:
        sources.load(place / "own/boxes.json")
    assert any(name.endswith("boxes.json") for name in seen)


@pytest.mark.parametrize(
    "case", ["apply", "new", "eval", "name", "module", "tuple", "own tag", "bomb", "circle", "deep"]
)
@pytest.mark.parametrize("reader", [config.load, study.read_plan])
def test_a_hostile_configuration_or_study_runs_nothing(place, case, reader):
    mark = place / "owned"
    file = place / "config.yaml"
    file.write_text(hostile(mark, place)[case].replace("train:", "run:"))
    with pytest.raises(UserError, match=r"config\.yaml"):
        reader(file)
    assert not mark.exists()


HEARD: list[tuple[Path, list[str]]] = []
sys.addaudithook(lambda event, args: _hear(args[0]) if event == "open" and HEARD else None)


def _hear(name: object) -> None:
    if isinstance(name, (str, bytes, os.PathLike)):
        real = os.path.realpath(os.fsdecode(name))
        for folder, seen in HEARD:
            if real.startswith(f"{folder}{os.sep}"):
                seen.append(real)


class Opened:
    """Within, the list of files below a folder that are opened, links resolved. Hooks cannot be taken back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder.resolve(), []

    def __enter__(self) -> list[str]:
        HEARD.append((self.folder, self.seen))
        return self.seen

    def __exit__(self, *exc: object) -> None:
        HEARD.pop()


SPY = """
import contextlib, io, os, sys
seen, home = [], os.environ["HOME"]
def hear(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        seen.append(event)
    if event == "open" and str(args[0]).startswith(home) and args[2] & (os.O_WRONLY | os.O_RDWR):
        seen.append(args[0])
    if event in ("os.mkdir", "os.rename", "os.remove") and str(args[0]).startswith(home):
        seen.append(f"{event} {args[0]}")
sys.addaudithook(hear)
import fsdet
from fsdet.cli.main import VERBS, main
for words in ([verb, "--help"] for verb in VERBS):
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(words) == 0 and "usage" in told.getvalue(), words
assert "torch" not in sys.modules and "ultralytics" not in sys.modules
print(seen)
"""


def without_settings(home: Path) -> dict[str, str]:
    """The environment of somebody whose HOME is empty."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "XDG_", "WANDB_", "MPL"))}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT / "src")}


def test_importing_and_asking_for_help_opens_no_socket_and_writes_nothing_at_home(tmp_path):
    done = subprocess.run([sys.executable, "-c", SPY], env=without_settings(tmp_path), capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == [] and len(VERBS) > 10


EVERYTHING = """
import importlib, pkgutil, sys
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event in
                 ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") else None)
import fsdet
for module in pkgutil.walk_packages(fsdet.__path__, "fsdet."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(seen)
"""


@pytest.mark.slow
def test_importing_every_module_opens_no_socket_and_leaves_home_alone_but_for_the_cache(tmp_path):
    done = subprocess.run([sys.executable, "-c", EVERYTHING], env=without_settings(tmp_path), capture_output=True,
                          text=True, timeout=110)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")} <= {".cache/fsdet"}
