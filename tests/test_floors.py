# SPDX-License-Identifier: AGPL-3.0-or-later
"""Imports point down, awkward dependencies have one door each, and nothing unsafe is called: read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "fsdet"
FLOORS = {
    "cli": 5,
    "tasks": 4,
    "engine": 3, "detect": 3, "evaluation": 3,
    "objective": 2, "bank": 2, "pictures": 2,
    "data": 1, "models": 1, "losses": 1, "assign": 1, "registered": 1, "bankfile": 1, "pairs": 1,
    "types": 0, "errors": 0, "boxes": 0, "command": 0, "config": 0, "schema": 0, "yaml_strict": 0, "progress": 0,
    "files": 0, "floats": 0, "names": 0, "peers": 0, "written": 0,
}  # fmt: skip
DOORS = {
    "ultralytics": ("models/backbone.py", "assign.py"),
    "wandb": ("engine/runlog.py",),
    "tqdm": ("progress.py",),
    "yaml": ("yaml_strict.py", "data/datayaml.py", "data/synthetic.py"),
    "faster_coco_eval": ("evaluation/",),
    "pycocotools": (),
    "pytorch_metric_learning": (),
    "cv2": ("data/", "pictures", "tasks/use.py", "detect/"),
    "matplotlib": ("pictures", "evaluation/"),
    "tensorboard": ("engine/runlog.py",),
    "safetensors": ("bankfile.py", "models/", "detect/"),
    "timm": ("models/vit.py",),
    "onnx": ("detect/",),
    "onnxruntime": ("detect/",),
}
FORBIDDEN = set("eval exec os.system pickle.load pickle.loads yaml.load yaml.unsafe_load yaml.full_load".split())
FORBIDDEN |= {"torch.nan_to_num", ".nan_to_num", "nan_to_num"}
FILES = sorted(SRC.rglob("*.py"))


def part(path: Path) -> str:
    """The package or top-level module a file belongs to: data/coco.py is `data`."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, nested ones too; `from fsdet import tasks` is fsdet.tasks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"fsdet.{a.name}" for a in node.names] if node.module == "fsdet" else [node.module]
            yield from ((node.lineno, name) for name in names)


def called(node: ast.Call) -> str:
    """`torch.load` of torch.load(...), `print` of print(...); a method of a value is `.name`."""
    function = node.func
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return f".{function.attr}" if isinstance(function, ast.Attribute) else ""


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def upward(source: str, where: str, own: str) -> list[str]:
    """Imports of a text that belongs to part `own` which do not point down."""
    found = []
    for line, name in imports(ast.parse(source)):
        target = name.split(".")[1] if name.startswith("fsdet.") else own
        if target in FLOORS and target != own and FLOORS[target] >= FLOORS[own] > 0:
            found.append(f"{where}:{line}: {own} (floor {FLOORS[own]}) imports {target} (floor {FLOORS[target]})")
        elif target in FLOORS and FLOORS[target] > FLOORS[own]:
            found.append(f"{where}:{line}: {own} (floor 0) imports {target}")
    return found


def test_the_map_names_every_part_of_the_tree():
    parts = {part(path) for path in FILES} - {"__init__", "__main__"}
    assert parts <= set(FLOORS), f"give these a floor: {sorted(parts - set(FLOORS))}"


def test_imports_point_down():
    problems = []
    for path in FILES:
        if part(path) in FLOORS:
            problems += upward(path.read_text(encoding="utf-8"), str(path.relative_to(SRC)), part(path))
    report(problems)


@pytest.mark.parametrize(
    ("own", "line", "refused"),
    [
        ("losses", "from fsdet.engine.step import StepController", True),
        ("losses", "import fsdet.models.heads", True),
        ("data", "def f():\n    from fsdet import tasks", True),
        ("errors", "from fsdet.types import Episode", False),
        ("errors", "from fsdet.losses import dfl", True),
        ("engine", "from fsdet.detect import predictor", True),
        ("engine", "from fsdet.types import Task", False),
        ("tasks", "from fsdet.tasks import initial", False),
    ],
)
def test_the_rule_itself_sees_an_upward_import(own, line, refused):
    assert bool(upward(line, "x.py", own)) is refused


def test_awkward_dependencies_have_one_door():
    problems = []
    for path, tree in trees():
        place = path.relative_to(SRC).as_posix()
        for line, name in imports(tree):
            doors = DOORS.get(name.split(".")[0])
            if doors is not None and not place.startswith(doors):
                problems.append(f"{place}:{line}: imports {name}; its doors are {', '.join(doors) or 'tests only'}")
    report(problems)


def test_nothing_unsafe_is_called_and_no_library_code_prints():
    problems = []
    for path, tree in trees():
        place = path.relative_to(SRC).as_posix()
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = called(node)
            if name in FORBIDDEN or (name == "print" and not place.startswith("cli/")):
                problems.append(f"{place}:{node.lineno}: calls {name}")
            safe = [k for k in node.keywords if k.arg == "weights_only" and getattr(k.value, "value", None) is True]
            if name == "torch.load" and not safe:
                problems.append(f"{place}:{node.lineno}: torch.load without weights_only=True")
            if name in ("subprocess.run", "subprocess.Popen") and any(k.arg == "shell" for k in node.keywords):
                problems.append(f"{place}:{node.lineno}: a shell")
    report(problems)


def test_no_handler_swallows_every_exception():
    broad = [
        f"{path.relative_to(SRC)}:{node.lineno}: catches {ast.unparse(node.type) if node.type else 'everything'}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]
    report(broad)


def test_every_file_says_its_licence_and_its_purpose():
    problems = []
    for path, tree in trees():
        if not path.stat().st_size:  # an empty __init__.py
            continue
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        if first != "# SPDX-License-Identifier: AGPL-3.0-or-later":
            problems.append(f"{path.relative_to(SRC)}: no SPDX line")
        if not ast.get_docstring(tree):
            problems.append(f"{path.relative_to(SRC)}: no docstring")
    report(problems)
