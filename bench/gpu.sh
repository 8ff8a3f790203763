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

# measure SECONDS NAME COMMAND [FLAG…]: one command of bench/, with at most so much time
measure() {
    local limit=$1 name=$2 command=$3
    shift 3
    echo "== $name (at most $limit s)"
    if timeout "$limit" "${PYTHON:-python}" -m "bench.$command" "$@" --device cuda \
        --out "$out/$name.json" >"$out/$name.md" 2>"$out/$name.log"; then
        cat "$out/$name.md"
    else
        echo "$name failed or ran out of time:"
        tail -n 20 "$out/$name.log"
        failed=1
    fi
}

noise=(--shape llama-3.2-1b --dtype bf16)
measure 200 utilisation growth --fill --utilisation --only row_tokens --row_tokens 16384,4096 --rows 4 \
    --shape llama-3-8b --layers 0 --width 0 --vocab 0 --steps 5 --uncounted 2 --dtype bf16
measure 240 speed pairs_per_second "${noise[@]}" --mix ultrafeedback --pairs 96 --batch 32 --micro 8 \
    --max_len 2048 --repeat 1 --only "dpo; ins_dpo; TRL dpo, reference precomputed; TRL dpo, bf16 weights"
measure 80 generation generation "${noise[@]}" --mix hh --repeat 2 --batches 1,64
measure 75 memory growth "${noise[@]}" --fill --only vocab --vocab 32768,262144 --row_tokens 4096 \
    --layers 4 --width 2048 --steps 1
exit "$failed"
