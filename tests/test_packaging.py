# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is shipped: light import, environment switches, pins that agree, scripts that parse, a licence."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SHELL = [ROOT / "train_stage_2.sh", ROOT / ".ci/run", *sorted((ROOT / "scripts").glob("*.sh"))]


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter with nothing in its environment but the path and `environment`."""
    clean = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT / "src"),
        "HOME": os.environ.get("HOME", "/"),
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_importing_the_package_sets_the_switches_and_loads_nothing_heavy():
    code = (
        "import json, os, sys, fsdet, fsdet.cli.main\n"
        "print(json.dumps([{k: os.environ.get(k) for k in fsdet.SWITCHES}, sorted(set(sys.modules) & "
        "{'torch', 'ultralytics', 'numpy', 'cv2', 'pydantic', 'wandb', 'matplotlib'})]))"
    )
    switches, heavy = json.loads(python(code, XDG_CACHE_HOME="/somewhere"))
    assert heavy == []
    assert switches == {
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "YOLO_CONFIG_DIR": "/somewhere/fsdet",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
    }


def test_a_switch_that_the_user_has_set_is_left_alone():
    assert python("import os, fsdet; print(os.environ['OMP_WAIT_POLICY'])", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


@pytest.mark.slow
def test_importing_ultralytics_through_us_reaches_nobody_and_touches_nothing(tmp_path):
    code = (
        "import json, os, socket, sys\n"
        "asked = []\n"
        "socket.getaddrinfo = lambda *a, **k: asked.append(a[0]) or (_ for _ in ()).throw(OSError('no network'))\n"
        "socket.socket.connect = lambda self, a: asked.append(str(a)) or (_ for _ in ()).throw(OSError('no network'))\n"
        "import PIL.Image; opened = PIL.Image.open\n"
        "import fsdet.models.backbone\n"
        "assert 'ultralytics' in sys.modules\n"
        "print(json.dumps([asked, PIL.Image.open is opened]))"
    )
    home = tmp_path / "home"
    home.mkdir()
    asked, same_open = json.loads(python(code, HOME=str(home), XDG_CACHE_HOME=str(tmp_path / "cache")).splitlines()[-1])
    assert asked == [] and same_open, "names looked up, or PIL.Image.open replaced (a corrupt image would start pip)"
    assert list(home.iterdir()) == []


def test_constraints_are_exact_cover_every_dependency_and_lie_in_its_range():
    pins = constraints()
    wanted = [*PROJECT["project"]["dependencies"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += [line for line in extra if not line.startswith("fsdet")]
    for requirement in wanted:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        assert name in pins, f"constraints.txt lacks {name}"
        numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (pins[name], least)]
        assert numbers[0] >= numbers[1], requirement
    assert pins["opencv-python"] == pins["opencv-python-headless"]
    assert all(re.fullmatch(r"\d[\w.]*", pin) for pin in pins.values())


def test_what_runs_here_is_what_was_tried():
    pins = constraints()
    for name in ("torch", "torchvision", "ultralytics", "pydantic", "faster-coco-eval"):
        assert version(name).partition("+")[0] == pins[name], name


def test_no_shipped_text_names_a_package_host():
    for path in (ROOT / "constraints.txt", ROOT / "pyproject.toml", *SHELL):
        assert not re.search(r"https?://|file:/|index-url", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("path", [*SHELL, ROOT / "scripts/_env.sh"], ids=lambda p: p.name)
def test_shell_scripts_parse_and_are_executable_unless_sourced(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, timeout=10).returncode == 0
    assert os.access(path, os.X_OK) is (not path.name.startswith("_"))


def test_the_licence_is_whole_and_named_everywhere():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (
        "GNU AFFERO GENERAL PUBLIC LICENSE" in text and "13. Remote Network Interaction" in text and len(text) > 30_000
    )
    assert PROJECT["project"]["license"] == "AGPL-3.0-or-later"
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("[st]*/**/*.py")}
    assert [path for path, text in texts.items() if text and "AGPL-3.0-or-later" not in text[:200]] == []


def test_the_command_is_installed_under_its_name():
    assert PROJECT["project"]["scripts"] == {"fsdet": "fsdet.cli.main:main"}
