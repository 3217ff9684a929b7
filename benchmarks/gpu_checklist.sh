#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, CUDA tests, kernel and end-to-end benchmarks.
#
#   benchmarks/gpu_checklist.sh [FOLDER]        the JSON goes to FOLDER, or to benchmarks/results
#
# The machine has torch >= 2.11 with CUDA, nvcc 13, cmake, ninja, pybind11, scikit-build-core, pytest; no network is needed.
# A step that fails does not stop the ones after it; the exit status says whether all of them succeeded.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
site=$(mktemp -d)
mkdir -p "$results"
failed=()

step() {
  local name=$1
  shift
  echo "== $name"
  timeout 300 "$@" || failed+=("$name")
}

device=$(python3 -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-'))") || exit 1
GAFEXT_CUDA=ON step build python3 -m pip install -q --no-build-isolation --no-deps --no-index --target "$site" .
export PYTHONPATH=$site
step info python3 -m gafext info
step tests python3 -m pytest tests/test_build.py tests/test_flash_attention.py tests/test_cross_view_attention.py tests/test_geglu.py tests/test_bench.py
step kernels python3 -m gafext bench --device cuda --dtype float16 --json "$results/kernels-$device.json"
step pipeline python3 benchmarks/full_size.py --device cuda --dtype float16 --steps 20 --rounds 3 \
  --backend auto sdpa --json "$results/full-size-$device.json"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
