#!/usr/bin/env bash
# IFSR, Llama-3-8B: the three stages. I: supervised, then instructed refinement (irft); II: preference
# optimisation with policy and reference conditioned; III: ask with a draft and the instruction.
# DATA: the paper's four are OpenAssistant/oasst1, HuggingFaceH4/ultrafeedback_binarized (default),
# stanfordnlp/SHP and Anthropic/hh-rlhf, each read by HALOs' rules (docs/data.md); commas join several.
# LOSS: ifsr_dpo (default), ifsr_kto, ifsr_cpo, ifsr_orpo, ifsr_simpo.
# The rate falls linearly to 0 without a warm-up, and there is no weight decay: the defaults of TRL.
set -euo pipefail
LOSS=${LOSS:-ifsr_dpo}
MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B}
DATA=${DATA:-HuggingFaceH4/ultrafeedback_binarized}
run() { torchrun --nproc-per-node "${GPUS:-8}" train.py --data "$DATA" \
    --schedule linear --warmup 0 --weight_decay 0 "$@"; }
run --loss sft --model "$MODEL" --lr 1e-6 --epochs 1 --out runs/ifsr-sft
run --loss irft --model runs/ifsr-sft/final --lr 1e-6 --epochs 1 --out runs/ifsr-irft
run --loss "$LOSS" --model runs/ifsr-irft/final --epochs 1 --out "runs/$LOSS"
python generate.py --model "runs/$LOSS/final" --limit 500 --mode refine \
    --data "${QUESTIONS:-HuggingFaceH4/ultrafeedback_binarized:test_prefs}" \
    --out "runs/$LOSS/refined.jsonl"
