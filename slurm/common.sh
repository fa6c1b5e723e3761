# The scripts of this folder source this file, on the login node and in jobs. It finds the
# repository, the lab's settings and Python, and defines `submit`. The caller sets `script`.

ROCKET_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROCKET_ROOT # for jobs, and for a run's own copy of the code, which takes its paths from it

case ${1:-} in
    '' | -h | --help) # prints the comment at the top of the script
        awk 'NR > 1 { if (!/^#( |$)/) exit; print substr($0, 3) }' "$0"
        [ $# -gt 0 ] && exit 0 || exit 1
        ;;
esac

say() { printf 'slurm/%s.sh: %s\n' "$script" "$*" >&2; }
fail() { say "$*"; exit 1; }

if [ -f "$ROCKET_ROOT/slurm/site.sh" ]; then
    set +eu # module and conda fail under set -eu
    . "$ROCKET_ROOT/slurm/site.sh"
    set -eu
fi

# Like make, use an active environment, else the one that make has built. Some systems have no
# `python`, only `python3`.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$ROCKET_ROOT/.venv/bin/python" ]; then
    PATH=$ROCKET_ROOT/.venv/bin:$PATH
fi
python=$(command -v python || command -v python3) || fail "there is no Python on the PATH"

# submit [sbatch flags] SCRIPT [arguments]: submits a job and prints its id. With AFTER=ID in the
# environment, the job waits until job ID has succeeded, and is cancelled if job ID fails.
submit() {
    local id
    # shellcheck disable=SC2086 # two flags or none
    id=$(
        flags=${AFTER:+--dependency=afterok:$AFTER --kill-on-invalid-dep=yes}
        unset AFTER
        sbatch --parsable $flags "$@"
    ) || return
    id=${id%%;*} # sbatch prints ID;CLUSTER if there are several clusters
    say "job $id${AFTER:+, after $AFTER}"
    echo "$id"
}
