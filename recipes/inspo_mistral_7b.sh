#!/usr/bin/env bash
# InSPO, Mistral-7B-Instruct-v0.2 on UltraFeedback (paper: section 5.1, appendix D.1), 8 GPUs.
# Data is cleaned as in D.2; MIN_MARGIN=1 and GUARD=meta-llama/Llama-Guard-3-8B add its other two rules.
set -euo pipefail
LOSS=${LOSS:-ins_dpo}
torchrun --nproc-per-node "${GPUS:-8}" train.py --loss "$LOSS" \
    --model "${MODEL:-mistralai/Mistral-7B-Instruct-v0.2}" \
    --data "${DATA:-HuggingFaceH4/ultrafeedback_binarized}" --eval_pairs 1000 \
    --dedup --max_answer 2048 --min_answer 32 ${MIN_MARGIN:+--min_margin "$MIN_MARGIN"} \
    ${GUARD:+--guard "$GUARD"} \
    --checkpoint_activations --out "runs/mistral-7b-$LOSS" "$@"
