#!/bin/bash
# Megatron-LM over two nodes of eight GPUs, tensor-parallel sums compressed between the nodes, exact inside each.
#
#   sbatch examples/slurm_two_nodes.sh /path/to/Megatron-LM/pretrain_gpt.py --tensor-model-parallel-size 16 ...
#
# Without Slurm, run on node 0 and on node 1, with N = 0 and 1:
#
#   torchrun --nnodes 2 --node-rank N --nproc-per-node 8 --master-addr HOST_OF_NODE_0 --master-port 29500 \
#     -m flashcomm_megatron pretrain_gpt.py ... --flash-comm-bits 4
#
# Ranks find out by themselves which of them share a machine; --flash-comm-algorithm two-step ignores it.
#
# You should see one line of the first rank that begins with "flash-comm: 4-bit auto" at the first forward, and one at the
# end that says how many bytes it sent. No line: the flag did not reach the script.
#SBATCH --job-name=flash-comm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch $0 SCRIPT [its arguments]" >&2
  exit 2
fi
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${GPUS_PER_NODE:-8}" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:${PORT:-29500}" \
  -m flashcomm_megatron "$@" --flash-comm-bits "${BITS:-4}"
