#!/usr/bin/env bash
# Creates .venv with everything the project needs. Called by `make`; safe to call again.
#
# onedl-mmcv ships no wheel with its C++ operators, so they are compiled once (about 3 minutes on 2 cores, 3 GB
# of memory) into a wheel in a user cache folder named after package, torch and Python version. Later
# environments install that wheel in under a minute. FORCE_CUDA=1 builds the CUDA operators as well.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(uname -s)" = Linux ] || echo "Note: only Linux is tested." >&2

PYTHON=${PYTHON:-python3.11}
command -v "$PYTHON" >/dev/null || PYTHON=python3
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "Python 3.11 is needed, but $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
  exit 1
}
export CXX=${CXX:-g++}
command -v $CXX >/dev/null || { echo "A C++ compiler ($CXX) is needed to build mmcv's operators." >&2; exit 1; }

pin() { grep -E "^$1==" requirements.txt; }
version() { pin "$1" | cut -d= -f3; }

kind=cpu
[ "${FORCE_CUDA:-0}" = 1 ] && kind=cuda
name="onedl_mmcv-$(version onedl-mmcv)-torch$(version torch)-cp311-$kind"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/gdrq_mm/wheels"

if [ -n "$(ls "$cache/$name"/*.whl 2>/dev/null)" ]; then
  echo "Setting up .venv: about 1 minute (mmcv's operators are already compiled: $cache/$name)."
else
  echo "Setting up .venv: the first time compiles mmcv's operators, about 5 minutes on 2 cores. Later set-ups take 1 minute."
fi

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet "$(pin uv)"
uv() { .venv/bin/uv pip install --quiet --python .venv/bin/python "$@"; }

echo "[1/4] torch and build tools"
uv "$(pin torch)" "$(pin torchvision)" "$(pin setuptools)" "$(pin wheel)" "$(pin packaging)" "$(pin ninja)" "$(pin psutil)" "$(pin pip)"

if [ -z "$(ls "$cache/$name"/*.whl 2>/dev/null)" ]; then
  echo "[2/4] compiling mmcv's operators (about 3 minutes; the log is .venv/mmcv-build.log)"
  mkdir -p "$cache"
  build=$(mktemp -d "$cache/.build-XXXXXX")
  headers=$(mktemp -d)
  trap 'rm -rf "$build" "$headers"' EXIT
  # A file of mmcv takes 1 to 3 seconds where torch's headers (400 MB) are compiled before, else 8. The compiler reads
  # them as text where this failed or where its options are not those of the header.
  options="-g0 -O2 -pthread"
  torch=.venv/lib/python3.11/site-packages/torch/include
  echo '#include <torch/types.h>' >"$headers/torch.h"
  $CXX $options -fPIC -std=c++17 "-I$torch" "-I$torch/torch/csrc/api/include" -x c++-header "$headers/torch.h" \
    >.venv/mmcv-build.log 2>&1 || true
  MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PATH="$PWD/.venv/bin:$PATH" \
    CFLAGS="$options -include $headers/torch.h -Winvalid-pch" \
    .venv/bin/python -m pip wheel --verbose --no-build-isolation --no-deps --no-cache-dir -w "$build" \
    "$(pin onedl-mmcv)" >>.venv/mmcv-build.log 2>&1 || {
    echo "mmcv's operators did not compile; from .venv/mmcv-build.log:" >&2
    { grep -E '(error|Error): ' .venv/mmcv-build.log || cat .venv/mmcv-build.log; } | tail -n 20 >&2
    exit 1
  }
  grep -q '\[-Winvalid-pch\]' .venv/mmcv-build.log && echo "Note: compiled headers were not used, .venv/mmcv-build.log says why."
  # A rename is atomic: another set-up sees the whole wheel or none.
  mv -T "$build" "$cache/$name" 2>/dev/null || [ -n "$(ls "$cache/$name"/*.whl)" ]
else
  echo "[2/4] mmcv's operators from the cache"
fi

echo "[3/4] the other requirements"
uv "$cache/$name"/*.whl
uv -r requirements.txt
uv --no-deps --no-build-isolation -e .
echo "[4/4] the project's own kernels for this CPU (20 seconds the first time)"
# Where they cannot be compiled this says so, and torch code runs in their place.
.venv/bin/python -c 'from gdrq_mm.core.kernels.native import description; print("kernels:", description())' || true
.venv/bin/python -m compileall -q .venv/lib >/dev/null 2>&1 || true
touch .venv/.ready
