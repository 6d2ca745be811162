#!/usr/bin/env bash
# Train as a slurm job:
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS (account, time, ...) say what the job asks for; GPUS=0 is for
# nodes without GPUs, where NTASKS (1) is the number of processes.
# It submits a batch job, as slurm requeues no other kind; the output goes to WORK_DIR/slurm-NUMBER.out. Training goes on from
# the newest checkpoint of WORK_DIR if there is one. Before slurm takes the nodes away (preemption with a grace time, or the
# time limit) training saves a checkpoint, and the job is requeued and goes on. In a job (salloc, sbatch) it starts right there.
set -eu
[ $# -ge 4 ] || { echo "error: usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]" >&2; exit 2; }
partition=$1 name=$2 config=$3 work_dir=$4
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8} cpus=${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-5}}
if [ -z "${SLURM_JOB_ID:-}" ] && ! command -v sbatch > /dev/null; then
    echo 'error: there is no sbatch: run this on a machine of the cluster' >&2
    exit 2
fi
mkdir -p "$work_dir"

quoted() { printf " '%s'" "${@//\'/\'\\\'\'}"; }  # for any shell: sbatch runs what it wraps by /bin/sh

if [ -z "${SLURM_JOB_ID:-}" ]; then
    tools=$(cd "$(dirname "$0")" && pwd)
    if [ "$gpus" -eq 0 ]; then
        resources=(--ntasks="${NTASKS:-1}")
    else
        per_node=$((gpus < per_node ? gpus : per_node))
        resources=(--ntasks="$gpus" --ntasks-per-node="$per_node" --gres="gpu:$per_node")
    fi
    # shellcheck disable=SC2086
    exec sbatch --partition="$partition" --job-name="$name" "${resources[@]}" --cpus-per-task="$cpus" \
        --requeue --signal=USR1@120 --open-mode=append --output="$work_dir/slurm-%j.out" ${SRUN_ARGS:-} \
        --wrap="exec$(quoted "$tools/slurm_train.sh" "$@")"
fi

trap : USR1 TERM  # slurm may send them to this shell too; it has to outlive the training
touch "$work_dir/.started"
code=0
srun --cpus-per-task="$cpus" --kill-on-bad-exit=1 python -u "$(dirname "$0")/train.py" "$config" --launcher slurm \
    --work-dir "$work_dir" --resume "${@:5}" || code=$?
# The exit code tells nothing: srun may kill the second process that stops. A job that is preempted while its processes start
# has saved nothing, and has nothing to save. A cancelled job is not RUNNING any more.
[ "$code" -ne 0 ] || exit 0
job=$(scontrol show job --oneliner "$SLURM_JOB_ID") || exit "$code"
if [[ $job == *JobState=RUNNING* ]] &&
    { [ "$work_dir/stopped.pth" -nt "$work_dir/.started" ] || [[ $job == *PreemptTime=[0-9]* ]]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
