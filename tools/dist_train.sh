#!/usr/bin/env bash
# Train on GPUS processes, on GPUs or, where there are none, on the CPU:
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Several machines: run it on each, with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR (the address of the first one) and PORT
# (one that is free there, 29500).
set -eu
[ $# -ge 2 ] || { echo "error: usage: $0 CONFIG GPUS [options of tools/train.py]" >&2; exit 2; }
config=$1 gpus=$2
shift 2
[[ $gpus =~ ^([1-9][0-9]*|gpu|cpu|auto)$ ]] || { echo "error: GPUS=$gpus is not a number of processes" >&2; exit 2; }
exec python -m torch.distributed.run --nproc_per_node="$gpus" --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
