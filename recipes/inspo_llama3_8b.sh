#!/usr/bin/env bash
# InSPO, Llama-3-8B-Instruct on UltraFeedback (paper: section 5.1, appendix D.1), one node of 8 GPUs.
# The defaults of train.py are D.1: lr 5e-7, batch 128, 3 epochs, warm-up 10%, cosine, max_len 4096.
# LOSS: ins_dpo (default), ins_ipo, ins_rdpo, ins_orpo, ins_simpo; or dpo, … for the baselines.
# Data is cleaned as in D.2; MIN_MARGIN=1 and GUARD=meta-llama/Llama-Guard-3-8B add its other two rules.
set -euo pipefail
LOSS=${LOSS:-ins_dpo}
torchrun --nproc-per-node "${GPUS:-8}" train.py --loss "$LOSS" \
    --model "${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}" \
    --data "${DATA:-HuggingFaceH4/ultrafeedback_binarized}" --eval_pairs 1000 \
    --dedup --max_answer 2048 --min_answer 32 ${MIN_MARGIN:+--min_margin "$MIN_MARGIN"} \
    ${GUARD:+--guard "$GUARD"} \
    --checkpoint_activations --out "runs/llama3-8b-$LOSS" "$@"
