#!/usr/bin/env bash
# Trains a ladder (tools/ladder.py) on Slurm: job arrays with a task per size. The first array trains
# the longest length of each size, and the others are branches of them.
#
#   slurm/ladder.sh CONFIG --hours=H --flops=F [--sizes=W,W,W …] [--section.key=value …]
#
# --hours are those of one task's resources, and --flops what training reaches on them per second.
# When all jobs are done, `python tools/ladder.py CONFIG --fit` with the same overrides fits the law.
# The same command again goes on where jobs have failed.
set -euo pipefail

script=ladder here=$(dirname "$0")
. "$here/common.sh"

listed=$("$python" "$ROCKET_ROOT/tools/ladder.py" "$@" --tasks --at-once=1)
mapfile -t sizes <<<"$listed" # those with the most lengths first: see aftercorr
read -ra lengths <<<"${sizes[0]}"
id=''
for i in "${!lengths[@]}"; do
    tasks=()
    for size in "${sizes[@]}"; do
        read -ra runs <<<"$size"
        ((i >= ${#runs[@]})) || tasks+=("${runs[i]}")
    done
    # a branch waits for the task of its own size in the first array
    after=${id:+--dependency=aftercorr:$id --kill-on-invalid-dep=yes}
    # shellcheck disable=SC2086 # two flags or none
    job=$(submit $after --array=0-$((${#tasks[@]} - 1)) --job-name=ladder \
        "$here/train.sh" -- "${tasks[@]}")
    id=${id:-$job}
done
echo "$job"
