# What the scripts here share: the repository, the lab's settings, Python, and how they submit
# themselves. Sourced by them, on the login node and in jobs; never run. The caller sets `script`.

ROCKET_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROCKET_ROOT # jobs find the repository by it, and a run's snapshot of the code its paths

case ${1:-} in
    '' | -h | --help) # the comment at the top of the script
        awk 'NR > 1 { if (!/^#( |$)/) exit; print substr($0, 3) }' "$0"
        [ $# -gt 0 ] && exit 0 || exit 1
        ;;
esac

say() { printf 'slurm/%s.sh: %s\n' "$script" "$*" >&2; }
fail() { say "$*"; exit 1; }

if [ -f "$ROCKET_ROOT/slurm/site.sh" ]; then
    set +eu # module and conda were not written for these
    . "$ROCKET_ROOT/slurm/site.sh"
    set -eu
fi

# As make does: an active environment, else the one that it has built. Some systems have no `python`.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$ROCKET_ROOT/.venv/bin/python" ]; then
    PATH=$ROCKET_ROOT/.venv/bin:$PATH
fi
python=$(command -v python || command -v python3) || fail "there is no Python on the PATH"

# submit [sbatch flags] SCRIPT [arguments]: prints the job's id. AFTER=ID in the environment makes
# it wait until that job has succeeded, and vanish if it fails.
submit() {
    local id
    # shellcheck disable=SC2086 # two flags or none
    id=$(
        flags=${AFTER:+--dependency=afterok:$AFTER --kill-on-invalid-dep=yes}
        unset AFTER
        sbatch --parsable $flags "$@"
    ) || return
    id=${id%%;*} # ID;CLUSTER where there are several clusters
    say "job $id${AFTER:+, after $AFTER}"
    echo "$id"
}
