#!/usr/bin/env bash
# Every measurement that needs a GPU, unattended and within ten minutes:
#
#     bash bench/gpu.sh [DIR]          JSON, tables and logs go to DIR, else $OUT, else bench/out/gpu
#
# One CUDA device of 40 GB or more, torch 2.11 or later. Models are noise in published shapes and
# pairs are synthetic, so nothing is downloaded. TRL, where it can be imported, is measured too.
# Written for a GPU, and so far not run on one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-${OUT:-bench/out/gpu}}
mkdir -p "$out"
failed=0

# measure SECONDS NAME [FLAG…]: one file of bench/, with at most so much time
measure() {
    local limit=$1 name=$2
    shift 2
    echo "== $name (at most $limit s)"
    if timeout "$limit" "${PYTHON:-python}" "bench/$name.py" "$@" --device cuda --out "$out/$name.json" \
        >"$out/$name.md" 2>"$out/$name.log"; then
        cat "$out/$name.md"
    else
        echo "$name failed or ran out of time:"
        tail -n 20 "$out/$name.log"
        failed=1
    fi
}

noise=(--shape llama-3.2-1b --dtype bf16)
measure 200 utilisation --lengths 4096,16384
measure 240 pairs_per_second "${noise[@]}" --mix ultrafeedback --pairs 96 --batch 32 --micro 8 \
    --max_len 2048 --repeat 1 --only "dpo; ins_dpo; TRL dpo, reference precomputed; TRL dpo, bf16 weights"
measure 80 generation "${noise[@]}" --mix hh --repeat 2 --batches 1,64
measure 75 step_memory "${noise[@]}" --layers 4 --width 2048 --vocabularies 32768,262144 --lengths 4096
exit "$failed"
