# Sourced by the scripts: sets ROOT and PY, and on first use makes .venv with everything in it.
#   FSDET_PYTHON=/path/to/python   use this interpreter as it is and install nothing
# The second start is free: a stamp holds the hash of pyproject.toml and constraints.txt.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

# The package sets these as well; they are here for every other tool that a script starts.
export YOLO_OFFLINE="${YOLO_OFFLINE:-true}" YOLO_AUTOINSTALL="${YOLO_AUTOINSTALL:-false}"
export YOLO_CONFIG_DIR="${YOLO_CONFIG_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/fsdet}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"

_fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
_say() { printf '%s\n' "$*" >&2; }

_good_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_find_python() {
    local name
    for name in python3.12 python3.11 python3.13 python3.14 python3 python; do
        if command -v "$name" >/dev/null 2>&1 && _good_python "$name"; then command -v "$name"; return 0; fi
    done
    return 1
}

_make_venv() {
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c '' >/dev/null 2>&1 && return 0
    local python
    if python="$(_find_python)"; then
        _say "making .venv with $python"
        "$python" -m venv --clear "$VENV" || _fail "$VENV: could not be made; see above"
    elif command -v uv >/dev/null 2>&1; then
        _say "no Python >= 3.11 found: uv fetches one"
        uv venv --clear --seed --python 3.11 "$VENV" || _fail "uv could not provide Python 3.11; see above"
    else
        _fail "expected Python >= 3.11 with venv, found none. Next: install it (Debian: apt install python3-venv)" \
            "or set FSDET_PYTHON"
    fi
}

# uv where there is one, else uv from pip, else pip itself
_install() {
    local uv=""
    if command -v uv >/dev/null 2>&1; then uv="$(command -v uv)"; fi
    if [ -z "$uv" ] && { [ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install -q uv >/dev/null 2>&1; }; then
        uv="$VENV/bin/uv"
    fi
    if [ -n "$uv" ] && "$uv" pip install -q --python "$VENV/bin/python" "$@"; then return 0; fi
    [ -z "$uv" ] || _say "uv did not manage; trying pip"
    "$VENV/bin/python" -m pip install -q "$@"
}

# Bare servers lack libGL: the headless build of the same version goes over the other, whose metadata stays,
# so that ultralytics finds the requirement it names.
_mend_opencv() {
    "$VENV/bin/python" -c 'import cv2' >/dev/null 2>&1 && return 0
    local version
    version="$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("opencv-python"))')" || return 1
    _say "OpenCV wants libGL, which is not here: taking opencv-python-headless $version"
    _install --no-deps --force-reinstall "opencv-python-headless==$version" || return 1
    "$VENV/bin/python" -c 'import cv2'
}

_check_torch() {
    "$VENV/bin/python" - <<'PY' || _fail "torch and torchvision do not fit each other (torchvision.ops.nms fails)." \
        "Next: install a matching pair, such as the versions in constraints.txt, from one index"
import torch, torchvision
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]])
assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]
PY
}

if [ -n "${FSDET_PYTHON:-}" ]; then
    PY="$FSDET_PYTHON"
    "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || _fail "FSDET_PYTHON=$PY: expected Python >= 3.11"
    export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"
else
    PY="$VENV/bin/python"
    _stamp="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum) $ROOT"
    if [ ! -x "$PY" ] || [ "$(cat "$VENV/.fsdet-stamp" 2>/dev/null)" != "$_stamp" ]; then
        _begun=$SECONDS
        _make_venv
        _say "installing into .venv (first use; some 6 GB with the GPU build of torch)"
        (cd "$ROOT" && _install -c constraints.txt -e ".[test]") || _fail "the installation failed; see above"
        _mend_opencv || _fail "OpenCV cannot be imported. Next: install libGL (Debian: apt install libgl1)"
        _check_torch
        printf '%s' "$_stamp" > "$VENV/.fsdet-stamp"
        _say "installed in $((SECONDS - _begun)) s"
    fi
fi

# From another folder: go to the checkout, and leave a note where the user stands, for the paths among the arguments.
_enter_root() {
    [ "$PWD" = "$ROOT" ] || export FSDET_STOOD="$PWD"
    cd "$ROOT"
}

# One stage with everything that it needs: run_stage STAGE ARGUMENTS...
run_stage() {
    _enter_root
    exec "$PY" "$ROOT/scripts/run_stage.py" "$@"
}
