#!/usr/bin/env bash
# Creates an environment with everything the project needs. Called by `make`; safe to call again.
#
#   tools/setup.sh                       .venv, the onedl packages and today's torch (requirements.txt)
#   STACK=upstream tools/setup.sh        .venv-upstream, OpenMMLab's own packages and torch 2.1 (requirements-upstream.txt)
#   VENV=folder PYTHON=python3.12 tools/setup.sh        another folder, another Python
#
# mmcv ships no wheel with its C++ operators, so they are compiled once (about 3 minutes on 2 cores, 3 GB of memory)
# into a wheel in a user cache folder named after package, torch and Python version. Later environments install that
# wheel in under a minute. FORCE_CUDA=1 builds the CUDA operators as well.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(uname -s)" = Linux ] || echo "Note: only Linux is tested." >&2

stack=${STACK:-onedl}
case $stack in
  onedl) requirements=requirements.txt VENV=${VENV:-.venv} mmcv=onedl-mmcv pythons="3.11 3.12 3.13" ;;
  upstream) requirements=requirements-upstream.txt VENV=${VENV:-.venv-upstream} mmcv=mmcv pythons="3.10 3.11" ;;
  *) echo "STACK=$stack: choose onedl or upstream." >&2; exit 1 ;;
esac

fits() {  # fits PYTHON VERSIONS: it runs and is of one of them
  local found
  found=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) && [[ " $2 " = *" $found "* ]]
}
if [ -z "${PYTHON:-}" ]; then
  for version in $pythons; do
    for PYTHON in "python$version" python3 python "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      fits "$PYTHON" "$version" && break 2
    done
  done
fi
fits "$PYTHON" "$pythons" || {
  echo "Python ${pythons// / or } is needed, but $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=/path/to/python." >&2
  exit 1
}
export CXX=${CXX:-g++}
command -v $CXX >/dev/null || { echo "A C++ compiler ($CXX) is needed to build mmcv's operators." >&2; exit 1; }

pin() { grep -E "^$1==" $requirements; }
version() { pin "$1" | cut -d= -f3; }
tag() { "$1" -c 'import sys; print("cp%d%d" % sys.version_info[:2])'; }

[ -x "$VENV/bin/pip" ] || "$PYTHON" -m venv "$VENV"  # pip comes last: a set-up that was stopped is begun anew
python=$VENV/bin/python
[ "$(tag "$python")" = "$(tag "$PYTHON")" ] || {
  echo "$VENV is of $("$python" --version), not $("$PYTHON" --version): delete it, or set VENV=another folder." >&2
  exit 1
}
kind=cpu
[ "${FORCE_CUDA:-0}" = 1 ] && kind=cuda
name="${mmcv/-/_}-$(version "$mmcv")-torch$(version torch)-$(tag "$python")-$kind"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/gdrq_mm/wheels"
log=$VENV/mmcv-build.log

if [ -n "$(ls "$cache/$name"/*.whl 2>/dev/null)" ]; then
  echo "Setting up $VENV: about 1 minute (mmcv's operators are already compiled: $cache/$name)."
else
  echo "Setting up $VENV: the first time compiles mmcv's operators, 4 to 7 minutes on 2 cores in all. Later set-ups take 1 minute."
fi

"$python" -m pip install --quiet "$(pin uv)"
uv() { "$VENV/bin/uv" pip install --quiet --python "$python" "$@"; }

echo "[1/4] torch and build tools"
uv "$(pin torch)" "$(pin torchvision)" "$(pin numpy)" "$(pin setuptools)" "$(pin wheel)" "$(pin packaging)" "$(pin ninja)" \
  "$(pin psutil)" "$(pin pip)"

if [ -z "$(ls "$cache/$name"/*.whl 2>/dev/null)" ]; then
  echo "[2/4] compiling mmcv's operators (about 3 minutes; the log is $log)"
  mkdir -p "$cache"
  build=$(mktemp -d "$cache/.build-XXXXXX")
  headers=$(mktemp -d)
  trap 'rm -rf "$build" "$headers"' EXIT
  # A file of mmcv takes 1 to 3 seconds where torch's headers (400 MB) are compiled before, else 8. The compiler reads
  # them as text where this failed or where its options are not those of the header.
  options="-g0 -O2 -pthread"
  torch=$("$python" -W ignore -c 'import torch.utils.cpp_extension as c; print(c.include_paths()[0])' 2>/dev/null)
  # torch before 2.7 is built with the older names of the standard library
  abi=$("$python" -c 'import torch; print("" if torch._C._GLIBCXX_USE_CXX11_ABI else "-D_GLIBCXX_USE_CXX11_ABI=0")')
  echo '#include <torch/types.h>' >"$headers/torch.h"
  $CXX $options $abi -fPIC -std=c++17 "-I$torch" "-I$torch/torch/csrc/api/include" -x c++-header "$headers/torch.h" \
    >"$log" 2>&1 || true
  MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PATH="$(realpath "$VENV/bin"):$PATH" \
    CFLAGS="$options -include $headers/torch.h -Winvalid-pch" \
    "$python" -m pip wheel --verbose --no-build-isolation --no-deps --no-cache-dir -w "$build" \
    "$(pin "$mmcv")" >>"$log" 2>&1 || {
    echo "mmcv's operators did not compile; from $log:" >&2
    { grep -E '(error|Error): ' "$log" || cat "$log"; } | tail -n 20 >&2
    exit 1
  }
  grep -q '\[-Winvalid-pch\]' "$log" && echo "Note: compiled headers were not used, $log says why."
  # A rename is atomic: another set-up sees the whole wheel or none.
  mv -T "$build" "$cache/$name" 2>/dev/null || [ -n "$(ls "$cache/$name"/*.whl)" ]
else
  echo "[2/4] mmcv's operators from the cache"
fi

echo "[3/4] the other requirements"
uv "$cache/$name"/*.whl
uv -r $requirements
uv --no-deps --no-build-isolation -e .
echo "[4/4] the project's own kernels for this CPU (20 seconds the first time)"
# Where they cannot be compiled this says so, and torch code runs in their place.
"$python" -c 'from gdrq_mm.core.kernels.native import description; print("kernels:", description())' || true
"$python" -m compileall -q "$VENV/lib" >/dev/null 2>&1 || true
touch "$VENV/.ready"
