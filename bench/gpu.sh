#!/usr/bin/env bash
# What a GPU can show of this project, unattended and within ten minutes, in order of worth:
#
#     bash bench/gpu.sh [DIR]          JSON, tables and logs go to DIR, else $OUT, else bench/out/gpu
#
# One CUDA device of 40 GB or more, torch 2.11 or later. Models are noise in published shapes and
# pairs are synthetic, so nothing is downloaded. TRL, where it can be imported, is measured too.
# Each part has a limit of its own and leaves its files whatever becomes of the others.
# Written for a GPU, and so far not run on one. MORE="--device cpu --shape small" tries it without.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-${OUT:-bench/out/gpu}}
mkdir -p "$out"
: >"$out/summary.txt"

# measure SECONDS NAME COMMAND [FLAG…]: one command of bench/, with at most so much time
measure() {
    local limit=$1 name=$2 command=$3 status=0
    shift 3
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "${PYTHON:-python}" -m "bench.$command" "$@" --device cuda ${MORE:-} \
        --out "$out/$name.json" >"$out/$name.md" 2>"$out/$name.log" || status=$?
    cat "$out/$name.md"
    case $status in
    0) status=ok ;;
    124 | 137) status="out of time" ;;
    *) status=failed ;;
    esac
    [ "$status" = ok ] || tail -n 20 "$out/$name.log"
    echo "$name: $status" >>"$out/summary.txt"
}

noise=(--shape llama-3.2-1b --dtype bf16)
pairs=(--mix ultrafeedback --batch 16 --max_len 2048 --repeat 1)
measure 100 plain defaults "${noise[@]}" --mix hh --pairs 16 --batch 4 --only plain
measure 150 resume defaults --shape small --dtype bf16 --mix hh --pairs 64 --only resume
measure 80 utilisation growth --fill --utilisation --only row_tokens --row_tokens 8192 --rows 4 \
    --shape llama-3-8b --layers 4 --width 0 --vocab 0 --steps 4 --dtype bf16
measure 90 trl pairs_per_second "${noise[@]}" "${pairs[@]}" --pairs 48 --micro 8 \
    --only "ins_dpo; TRL dpo, bf16 weights"
measure 45 offload pairs_per_second "${noise[@]}" "${pairs[@]}" --pairs 16 --only "ins_dpo, offload"
measure 75 recomputation pairs_per_second "${noise[@]}" "${pairs[@]}" --pairs 16 \
    --only "ins_dpo, half kept; ins_dpo, recomputed"
measure 50 generation generation "${noise[@]}" --mix hh --pairs 32 --repeat 1 --batches 16

echo "== summary"
cat "$out/summary.txt"
! grep -qv ': ok$' "$out/summary.txt"
