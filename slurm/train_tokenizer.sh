#!/usr/bin/env bash
# Trains the tokenizer of CONFIG.
#
#   slurm/train_tokenizer.sh CONFIG [--section.key=value …]     prints the id of the job
#
#SBATCH --job-name=tokenizer
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=train_tokenizer here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=${ROCKET_ROOT:-${SLURM_SUBMIT_DIR:-}}/slurm # $0 is Slurm's copy
[ -f "$here/common.sh" ] || { echo "train_tokenizer.sh: submit from the repository or set ROCKET_ROOT" >&2; exit 1; }
. "$here/common.sh"

[ -n "${SLURM_JOB_ID:-}" ] || { submit "$0" "$@"; exit; }
exec "$python" "$ROCKET_ROOT/train_tokenizer.py" "$@"
