#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, CUDA tests, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu_checklist.sh [FOLDER]        the JSON and the log go to FOLDER, or to benchmarks/results
#
# The machine has torch >= 2.11 with CUDA, nvcc 13, cmake, ninja, pybind11, scikit-build-core, pytest; no network is needed.
# With diffusers and transformers the pipeline races theirs, and the tests that need them run.
# Every step has its own limit, and one that fails does not stop the ones after it, but for the build. Last comes a short
# table; the exit status is 1 if a step failed. CHECKLIST_SECONDS: of the whole, 575 by default.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
deadline=${CHECKLIST_SECONDS:-575}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
export PYTHONUNBUFFERED=1 PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
export PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/extras/compute-sanitizer  # where nvcc may be and CMake does not look
declare -A process begun
passed=() failed=()

# begin NAME SECONDS COMMAND...: start a step, within its limit and the time that is left.
begin() {
  local name=$1 limit=$2 left=$((deadline - SECONDS))
  shift 2
  ((limit < left)) || limit=$left
  begun[$name]=$SECONDS
  if ((limit < 1)); then
    echo "no time is left" >"$work/$name"
    false &
  else
    timeout -k 5 "$limit" "$@" >"$work/$name" 2>&1 &
  fi
  process[$name]=$!
}

# finish NAME: wait for a step and say how it ended; all that it printed goes to the log.
finish() {
  local name=$1 status=0 words
  wait "${process[$name]}" || status=$?
  case $status in
    0) words="ok    " ;;
    124 | 137) words="TIME  " ;;
    *) words="FAILED" ;;
  esac
  echo "$words $name, $((SECONDS - begun[$name])) s: $(tail -n 1 "$work/$name" | cut -c 1-150)"
  { echo "== $name, status $status"; cat "$work/$name"; } >>"$results/checklist.log"
  if ((status)); then
    failed+=("$name")
    tail -n 15 "$work/$name" | cut -c 1-200 | sed 's/^/    /'
    return 1
  fi
  passed+=("$name")
}

step() {
  begin "$@"
  finish "$1"
}

machine='import torch; g = torch.cuda.get_device_properties(0)
print(f"{g.major}{g.minor}", g.name.replace(" ", "-"))'
read -r capability device < <(python3 -c "$machine") || { echo "no GPU that PyTorch can use"; exit 1; }
: >"$results/checklist.log"

# Machine code for this card alone; a kernel with a target of its own (90a) keeps it.
GAFEXT_CUDA=ON CUDAARCHS="$capability-real" step build 150 \
  python3 -m pip install -q --no-build-isolation --no-deps --no-index --target "$work/site" . || exit 1
step info 30 python3 -m gafext info

pytest=(python3 -m pytest -vv -rf -p no:cacheprovider)
# Where Hopper's own kernel hangs, faults or is wrong, all that follows goes on without it, and is not lost with it.
if [ "$capability" = 90 ]; then
  step hopper 60 "${pytest[@]}" -k hopper tests/cuda/test_device.py || export GAFEXT_CUDA_ATTENTION=mma
fi

# Nothing is timed here, so these run side by side. Not what needs a compiler instead of a GPU: the emulator's tests
# (cuda_kernel), which take minutes. Every test's name goes to the log, for one that hangs takes the summary with it.
mapfile -t tests < <(grep -rlE '"cuda"|on_devices' --include='test_*.py' tests | grep -vE 'emulat|checklist|cuda/test_build|bench_gpu' | sort)
workers=$(python3 -c 'import xdist; print("-n4")' 2>/dev/null)
begin tests 100 "${pytest[@]}" ${workers:+"$workers"} -k "(cuda or gpu or test_device) and not cuda_kernel and not hopper" "${tests[@]}"
sanitizer=$(command -v compute-sanitizer)
checks=()
[ -n "$sanitizer" ] && checks=(memcheck racecheck)
for tool in "${checks[@]}"; do
  attention=${GAFEXT_CUDA_ATTENTION-}
  [ "$tool" = memcheck ] || attention=mma  # what racecheck makes of wgmma and TMA nobody has seen here
  GAFEXT_CUDA_ATTENTION=$attention PYTORCH_NO_CUDA_MEMORY_CACHING=1 begin "$tool" 95 \
    "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 python3 benchmarks/sanitize.py
done
for name in tests "${checks[@]}"; do finish "$name"; done
[ -n "$sanitizer" ] || echo "absent memcheck, racecheck: this machine has no compute-sanitizer"
# What `gafext doctor` says of such a card from the next commit on.
step card 20 python3 benchmarks/verify_card.py --passed "${passed[@]}" --failed "${failed[@]}" --json "$results/card-$device.json"

# In processes of their own: what one kernel breaks on the GPU, the others do not feel.
bench=(python3 -m gafext bench --device cuda --rounds 7 --cold)
others='from gafext import ops
print(*(f"--op {op}" for op in ops.__all__ if op not in ("flash_attention", "conv3x3", "linear")))'
read -ra others < <(python3 -c "$others")
step attention 125 "${bench[@]}" --dtype bfloat16 --op flash_attention --no-compile --seconds 90 \
  --json "$results/attention-bfloat16-$device.json"
step others 120 "${bench[@]}" --dtype bfloat16 "${others[@]}" --seconds 85 --compile-seconds 50 \
  --json "$results/others-bfloat16-$device.json"
# The shapes of Hopper's own kernel on the kernel for all cards: FASTER_ON_GPU in gafext/ops/flash_attention.py needs both.
GAFEXT_CUDA_ATTENTION=mma step attention-mma 45 "${bench[@]}" --dtype bfloat16 --op flash_attention --no-compile --seconds 25 \
  --json "$results/attention-mma-bfloat16-$device.json" --shape 1024x1024 --shape 4096x4096 --shape 1024x257
step unet 60 python3 benchmarks/full_size.py --device cuda --dtype bfloat16 --backend auto kernel sdpa --rounds 0 \
  --unet-rounds 11 --json "$results/unet-$device.json"
step float16 40 "${bench[@]}" --dtype float16 --no-compile --seconds 15 --json "$results/float16-$device.json" \
  --shape 8,8,1024x1024,64 --shape 8,8,4096x4096,64 --shape 4,10,256x257,64 --shape "2xV=4,(1024" --shape 4096,2560
# The whole pipeline, 50 steps and the upsampler, against what a user of diffusers writes; compiling takes most of it.
step pipeline 140 python3 benchmarks/bench_pipeline.py --device cuda --dtype bfloat16 --json "$results/pipeline-$device.json"
step lengths 40 "${bench[@]}" --dtype bfloat16 --suite lengths --seconds 25 --json "$results/lengths-$device.json"
step samplers 30 "${bench[@]}" --suite samplers --seconds 20 --json "$results/samplers-$device.json"

shopt -s nullglob
written=("$results"/{attention,others,float16,unet,pipeline,lengths,samplers}*"-$device.json")
[ ${#written[@]} -eq 0 ] || python3 benchmarks/summary.py "${written[@]}" | tee -a "$results/checklist.log"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "all steps succeeded in $SECONDS s"
