#!/usr/bin/env bash
# Samples from a trained model; the text goes to the job's output. It takes sample.py's arguments.
#
#   slurm/sample.sh out/RUN --prompt=TEXT [--num-samples=3 …]     prints the id of the job
#
#SBATCH --job-name=sample
#SBATCH --time=01:00:00
##SBATCH --gpus=1
set -euo pipefail

script=sample here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=${ROCKET_ROOT:-${SLURM_SUBMIT_DIR:-}}/slurm # $0 is Slurm's copy
[ -f "$here/common.sh" ] || { echo "sample.sh: submit from the repository or set ROCKET_ROOT" >&2; exit 1; }
. "$here/common.sh"

[ -n "${SLURM_JOB_ID:-}" ] || { submit "$0" "$@"; exit; }
exec "$python" "$ROCKET_ROOT/sample.py" "$@"
