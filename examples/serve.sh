#!/usr/bin/env bash
# Serve a model with Megatron-LM's own text generation server, its tensor-parallel sums compressed by one flag.
#
#   examples/serve.sh MEGATRON_LM CONVERTED MODEL [the server's options ...]
#
# CONVERTED is what `python examples/convert_hf_llama.py --model MODEL --save CONVERTED` wrote, MODEL the Hugging Face
# directory. In the environment: BITS=8 (empty: exact), TP=2, PORT=5000, CPU=1 without a GPU, DRY_RUN=1 to print only.
#
# You should see "Running on ..." and, after the first request, one line that begins with "flash-comm:". Ask it with
#
#   curl -X PUT localhost:5000/api -H 'Content-Type: application/json' \
#     -d '{"prompts": ["Tim and Sue went to the"], "tokens_to_generate": 20, "top_k": 1}'
set -euo pipefail

if [ $# -lt 3 ] || [ ! -f "$1/tools/run_text_generation_server.py" ]; then
    echo "usage: serve.sh MEGATRON_LM CONVERTED MODEL [options]; MEGATRON_LM: a checkout with tools/run_text_generation_server.py" >&2
    exit 2
fi
CHECKOUT=$1 CONVERTED=$2 MODEL=$3
shift 3
BITS=${BITS-8}
COMPRESSION=()
if [ -n "$BITS" ]; then
    COMPRESSION=(--flash-comm-bits "$BITS") # the one flag
fi
COMMAND=(
    torchrun --nproc-per-node "${TP:-2}" -m flashcomm_megatron ${CPU:+--cpu} "$CHECKOUT/tools/run_text_generation_server.py"
    --tensor-model-parallel-size "${TP:-2}" --port "${PORT:-5000}" --micro-batch-size 1
    --load "$CONVERTED" --use-checkpoint-args --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL"
    --make-vocab-size-divisible-by 1 "${COMPRESSION[@]}" "$@"
)
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit
fi
export PYTHONPATH="$CHECKOUT${PYTHONPATH:+:$PYTHONPATH}"
exec "${COMMAND[@]}"
