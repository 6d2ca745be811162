#!/usr/bin/env bash
# Test a checkpoint on nodes of slurm, and wait for it:
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS as for tools/slurm_train.sh; GPUS=0 is for nodes without GPUs,
# where NTASKS (1) is the number of processes.
set -eu
[ $# -ge 4 ] || { echo "error: usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]" >&2; exit 2; }
partition=$1 name=$2 config=$3 checkpoint=$4
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
if [ "$gpus" -eq 0 ]; then
    resources=(--ntasks="${NTASKS:-1}")
else
    per_node=$((gpus < per_node ? gpus : per_node))
    resources=(--ntasks="$gpus" --ntasks-per-node="$per_node" --gres="gpu:$per_node")
fi
# shellcheck disable=SC2086
exec srun --partition="$partition" --job-name="$name" "${resources[@]}" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} python -u "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher slurm "${@:5}"
