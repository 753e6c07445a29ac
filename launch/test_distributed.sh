#!/usr/bin/env bash
# Checks the collectives that training uses between N ranks of this host, or N on each host of a hostfile: right values,
# latency, bandwidth by size, and one line that says what it comes to.
#
#   bash launch/test_distributed.sh N [HOSTFILE] [options of mellow-ds launch] [-- options of the check]
#
#   bash launch/test_distributed.sh 2
#   bash launch/test_distributed.sh 4 hosts --interface eth0
#   bash launch/test_distributed.sh 4 hosts -- --backend gloo --max-megabytes 64
#
# Among the options of mellow-ds launch: --interface, --include, --exclude, --ssh-config, --master-port; --env-file
# (default launch/env.sh, which every host sources first); --dry-run prints what would run. Of the check: --backend nccl
# or gloo, --max-megabytes N, --only-values, --timeout SECONDS.
#
# Exit codes: 0 all is right, 1 wrong values or a rank that did not come to a collective, 2 a mistake in what was given.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

HOSTFILE="" NUM_PER_HOST=${1:---help} DRY_RUN="" ENV_FILE=$MELLOW_ROOT/launch/env.sh
case "$NUM_PER_HOST" in
-h | --help)
    usage
    exit 0
    ;;
esac
[[ "$NUM_PER_HOST" =~ ^[1-9][0-9]{0,5}$ ]] || fail "the number of ranks is '$NUM_PER_HOST'; it must be a number above 0"
shift
if (($#)) && [[ "$1" != -* ]]; then
    HOSTFILE=$1
    shift
    [[ -f "$HOSTFILE" ]] || fail "the hostfile $HOSTFILE is not there: write a line a host, such as \`node1 slots=4\`"
fi
options=()
while (($#)) && [[ "$1" != -- ]]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --dry-run) DRY_RUN=1 ;;
    --env-file)
        (($# > 1)) || fail "--env-file has no value"
        ENV_FILE=$2
        shift
        ;;
    --env-file=*) ENV_FILE=${1#*=} ;;
    *) options+=("$1") ;;
    esac
    shift
done
if (($#)); then shift; fi
[[ -f "$ENV_FILE" ]] || fail "--env-file $ENV_FILE is not there"
use_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # ranks share the cores of a host
python=$MELLOW_PYTHON
if [[ -n "$HOSTFILE" ]]; then
    options+=(--env-file "$ENV_FILE")
    python=python # that of the environment file, on every host
fi
launch_with_mellow "${options[@]}" -- "$python" -m mellow_ds.preflight.collectives "$@"
