#!/usr/bin/env bash
# Trains CONFIG with every combination of the given values. Each combination is a task of a job
# array and has its own run directory.
#
#   slurm/sweep.sh CONFIG optimizer.learning_rate=1e-4,3e-4 train.seed=1,2 [--section.key=value …]
#
# The directories are named after the values: out/run-learning_rate_1e-4-seed_1 and so on. The
# script prints them, and then the id of the array.
set -euo pipefail

script=sweep here=$(dirname "$0")
. "$here/common.sh"

config=$1 fixed=() combinations=('') names=('')
shift
for argument; do
    [[ $argument != -* ]] || { fixed+=("$argument"); continue; }
    [[ $argument == *.*=* && $argument != *[[:space:]]* ]] ||
        fail "$argument: what varies reads section.key=value,value and holds no spaces"
    key=${argument%%=*} more=() more_names=()
    IFS=, read -ra values <<<"${argument#*=}"
    for i in "${!combinations[@]}"; do
        for value in "${values[@]}"; do
            more+=("${combinations[i]} --$key=$value")
            more_names+=("${names[i]}-${key##*.}_${value//[^A-Za-z0-9._+-]/_}")
        done
    done
    combinations=("${more[@]}") names=("${more_names[@]}")
done

base=$("$python" "$ROCKET_ROOT/config.py" "$config" "${fixed[@]}")
[[ $base != *[[:space:]]* ]] || fail "$base: a sweep's train.out_dir holds no spaces"
tasks=()
for i in "${!combinations[@]}"; do
    tasks+=("${combinations[i]# } --train.out_dir=$base${names[i]}")
    read -ra overrides <<<"${tasks[i]}"
    "$python" "$ROCKET_ROOT/config.py" "$config" "${fixed[@]}" "${overrides[@]}" # finds mistakes
done
submit --array=0-$((${#tasks[@]} - 1)) --job-name=sweep \
    "$here/train.sh" "$config" "${fixed[@]}" -- "${tasks[@]}"
