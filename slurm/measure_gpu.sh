#!/usr/bin/env bash
# Tests and measures Rocket on one GPU, in under 8 minutes, and writes to the directory OUT. It
# needs no dataset and no network. On a machine without sbatch it runs at once.
#
#   slurm/measure_gpu.sh OUT [--only=STAGE,…] [--nanogpt=CLONE]     prints the id of the job
#
# tests/gpu.py does the work and prints a table; docs/gpu.md explains the table.
#
#SBATCH --job-name=measure
#SBATCH --time=00:15:00
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --open-mode=append
set -euo pipefail

script=measure_gpu here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=${ROCKET_ROOT:-${SLURM_SUBMIT_DIR:-}}/slurm # $0 is Slurm's copy
[ -f "$here/common.sh" ] || { echo "measure_gpu.sh: submit from the repository or set ROCKET_ROOT" >&2; exit 1; }
. "$here/common.sh"

if [ -z "${SLURM_JOB_ID:-}" ] && command -v sbatch >/dev/null; then
    submit "$0" "$@"
    exit
fi
exec "$python" "$ROCKET_ROOT/tests/gpu.py" "$@"
