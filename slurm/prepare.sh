#!/usr/bin/env bash
# Tokenizes the sources of CONFIG and writes the dataset data.dir. An array of TASKS tasks does the
# work; then a job finishes the dataset.
#
#   [TASKS=8] slurm/prepare.sh CONFIG [--section.key=value …]     prints the id of the last job
#
#SBATCH --job-name=prepare
#SBATCH --time=04:00:00
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=prepare here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=${ROCKET_ROOT:-${SLURM_SUBMIT_DIR:-}}/slurm # $0 is Slurm's copy
[ -f "$here/common.sh" ] || { echo "prepare.sh: submit from the repository or set ROCKET_ROOT" >&2; exit 1; }
. "$here/common.sh"

if [ -z "${SLURM_JOB_ID:-}" ]; then
    array=$(submit --array=0-$((${TASKS:-8} - 1)) "$0" "$@")
    AFTER=$array submit "$0" "$@" # tokenizes what is missing, and publishes the dataset
    exit
fi

share=${SLURM_ARRAY_TASK_ID:+--task=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT}
exec "$python" "$ROCKET_ROOT/prepare.py" "$@" ${share:+"$share"}
