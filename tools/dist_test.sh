#!/usr/bin/env bash
# Test a checkpoint on GPUS processes, on GPUs or, where there are none, on the CPU:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# Several machines: as tools/dist_train.sh.
set -eu
[ $# -ge 3 ] || { echo "error: usage: $0 CONFIG CHECKPOINT GPUS [options of tools/test.py]" >&2; exit 2; }
config=$1 checkpoint=$2 gpus=$3
shift 3
[[ $gpus =~ ^([1-9][0-9]*|gpu|cpu|auto)$ ]] || { echo "error: GPUS=$gpus is not a number of processes" >&2; exit 2; }
exec python -m torch.distributed.run --nproc_per_node="$gpus" --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
