#!/usr/bin/env bash
# Pretrain a GPT on GPUs with Megatron-LM's own pretrain_gpt.py, its tensor-parallel traffic compressed by one flag.
#
#   examples/pretrain_gpt.sh MEGATRON_LM [pretrain_gpt.py's options ...]      MEGATRON_LM: a checkout of Megatron-LM
#
# What follows the checkout is handed to pretrain_gpt.py after the options below, so it wins. In the environment:
#   BITS=4        width of activations; empty: train exactly, to compare      TP=8     GPUs, all of them one TP group
#   DATA=PREFIX   text made by Megatron's preprocess_data.py and the files VOCAB, MERGES; unset: Megatron's mock data
#   OUT=FOLDER    checkpoints and TensorBoard, default runs/BITS              CPU=1    no GPUs: give a small model
#   DRY_RUN=1     print the command and run nothing
#
# You should see, on rank 0, a line that begins with "flash-comm: 4-bit auto" at the first forward, losses that follow those
# of BITS= within a percent, and at the end "flash-comm: compressed ... of ... collectives".
set -euo pipefail

CHECKOUT=${1:-${MEGATRON_LM:-}}
[ $# -gt 0 ] && shift
if [ ! -f "$CHECKOUT/pretrain_gpt.py" ]; then
    echo "pretrain_gpt.sh: '$CHECKOUT' holds no pretrain_gpt.py: give the path of a Megatron-LM checkout." >&2
    exit 2
fi
BITS=${BITS-4}
TP=${TP:-8}
OUT=${OUT:-runs/${BITS:-exact}}

MODEL=(
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
)
PARALLEL=(--tensor-model-parallel-size "$TP" --sequence-parallel --use-distributed-optimizer)
TRAINING=(
    --bf16 --micro-batch-size 4 --global-batch-size 64 --train-iters 20000 --optimizer adam --adam-beta2 0.95
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 500 --weight-decay 0.1 --clip-grad 1.0
)
if [ -n "${DATA:-}" ]; then
    TEXT=(--data-path "$DATA" --tokenizer-type GPT2BPETokenizer --vocab-file "$VOCAB" --merge-file "$MERGES"
        --split 990,8,2)
else
    TEXT=(--mock-data --tokenizer-type NullTokenizer --vocab-size 50257)
fi
OUTPUT=(
    --save "$OUT" --load "$OUT" --save-interval 1000 --eval-interval 500 --eval-iters 20
    --log-interval 20 --log-throughput --tensorboard-dir "$OUT/tensorboard"
)
COMPRESSION=()
if [ -n "$BITS" ]; then
    COMPRESSION=(--flash-comm-bits "$BITS") # the one flag
fi

COMMAND=(
    torchrun --nproc-per-node "$TP" -m flashcomm_megatron ${CPU:+--cpu} "$CHECKOUT/pretrain_gpt.py"
    "${MODEL[@]}" "${PARALLEL[@]}" "${TRAINING[@]}" "${TEXT[@]}" "${OUTPUT[@]}" "${COMPRESSION[@]}" "$@"
)
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron wants the order of communication and computation kept
mkdir -p "$OUT"
exec "${COMMAND[@]}"
