#!/bin/bash
# One node's part of slurm.sbatch, run there by srun: start or join the job's Ray; on the head, run the study, then stop.
set -euo pipefail

# Ray opens its own folder to everybody, so the one around it is ours alone; on the node's own disk, and short, since
# the paths of sockets are limited. If somebody else has it, this ends here.
export RAY_TMPDIR="/tmp/bert-encoding-$SLURM_JOB_ID"
mkdir -m 700 "$RAY_TMPDIR"
trap 'rm -rf "$RAY_TMPDIR"' EXIT

export RAY_ADDRESS="$HEAD_ADDRESS"                  # what symmetric-run's own checks and study/run.py connect to
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300   # seconds until all nodes are there; Ray's 30 are few for a busy disk
export RAY_memory_monitor_refresh_ms=0              # it watches the whole node, where others work; Slurm watches the job
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
unset OMP_NUM_THREADS                               # every trial sets its own threads

# Ports are chosen free, since a node may be shared; what a trial gets is what Slurm gave. Data travel as paths: the
# object store, which counts against the job's memory, stays small.
options=(
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --min-worker-port=0 --max-worker-port=0 --object-store-memory=2000000000
    --include-dashboard=false --disable-usage-stats
)
# shellcheck disable=SC2016  # expanded by the inner shell
study='echo "$$" > "$DRIVER_PID"; exec python study/run.py --address "$RAY_ADDRESS" "$@"'
ray symmetric-run --address "$HEAD_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" "${options[@]}" -- \
    bash -c "$study" study "$@"
