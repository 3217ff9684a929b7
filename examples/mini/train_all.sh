#!/usr/bin/env bash
# Trains all of the built-in model in one time box; run again, it goes on where it was stopped.
# train_all.sh [--device cuda|cpu] [--rung gpu|cpu|sharp] [--budget-minutes 18] [--out mini] [--seed 0] [--start MODEL]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
device=cuda rung= budget=18 out=mini seed=0 start=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2 ;;
        --rung) rung=$2 ;;
        --budget-minutes) budget=$2 ;;
        --out) out=$2 ;;
        --seed) seed=$2 ;;
        --start) start=(--start "$2") ;;
        *) echo "train_all.sh: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done
if [ -z "$rung" ]; then
    case $device in cuda*) rung=gpu ;; *) rung=cpu ;; esac
fi
python=${PYTHON:-python3}

# Shares of the time box; what is left over goes into loading, measuring and saving.
train() {
    stage=$1 minutes=$("$python" -c "print($budget * $2)")
    shift 2
    echo "== $stage: $minutes minutes"
    "$python" "$here/train_$stage.py" --rung "$rung" --device "$device" --out "$out" --seed "$seed" \
        --minutes "$minutes" "${start[@]}" "$@"
}
often=(--checkpoint-every 60 --measure-every 180)
train vae 0.20 "${often[@]}"
train head_detector 0.05 "${often[@]}"
train head_fitter 0.09 "${often[@]}"
train image_encoder 0.06 "${often[@]}"
train unet 0.40
train upsampler 0.08 "${often[@]}"
train vae 0.06 --decoder-only "${often[@]}" # what the whole model generates is there only now
du -sh "$out/model"
