#!/usr/bin/env bash
# InSPO, Mistral-7B-Instruct-v0.2 on UltraFeedback (paper: section 5.1, appendix D.1), 8 GPUs.
set -euo pipefail
LOSS=${LOSS:-ins_dpo}
torchrun --nproc-per-node "${GPUS:-8}" train.py --loss "$LOSS" \
    --model "${MODEL:-mistralai/Mistral-7B-Instruct-v0.2}" \
    --data "${DATA:-HuggingFaceH4/ultrafeedback_binarized}" --eval_pairs 1000 \
    --checkpoint_activations --out "runs/mistral-7b-$LOSS" "$@"
