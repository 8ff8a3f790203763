#!/usr/bin/env bash
# InSPO, Llama-3-8B-Instruct, on several nodes of 8 GPUs under Slurm: sbatch recipes/slurm.sh
# One torchrun per node; they meet at the first one. --resume is harmless at the first start, and lets
# the job be queued again: five minutes before its end Slurm sends SIGTERM, and the run saves.
# OUT must be on a file system that all nodes see; so must the hub's cache, or each node downloads.
#SBATCH --job-name=nanopo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HOST:29400" --rdzv-id "$SLURM_JOB_ID" \
    train.py --loss "${LOSS:-ins_dpo}" \
    --model "${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}" \
    --data "${DATA:-HuggingFaceH4/ultrafeedback_binarized}" --eval_pairs 1000 \
    --dedup --max_answer 2048 --min_answer 32 ${MIN_MARGIN:+--min_margin "$MIN_MARGIN"} \
    ${GUARD:+--guard "$GUARD"} \
    --shard_group 8 --out "${OUT:-runs/llama3-8b-slurm}" --resume "$@"
