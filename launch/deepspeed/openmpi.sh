#!/usr/bin/env bash
# Several hosts with DeepSpeed's launcher, which starts them by OpenMPI's mpirun.
#
#   launch/deepspeed/openmpi.sh --hostfile hosts --config mellow --data.shards SHARDS --save-dir runs/mine
#
#   --hostfile FILE           the hosts, a line each: name slots=N (launch/deepspeed/hostfile.example)
#   --config NAME             the run configuration: a recipe, or a YAML file
#   --deepspeed_config FILE   the engine JSON
#   --num-per-host N          processes a host (default: its slots)
#   --include node1@node2     only these hosts; of their GPUs mpirun takes the first
#   --exclude node2           all but these
#   --env-file FILE           what every host sources first (default: launch/env.sh)
#   --dry-run                 print the command and the variables that travel, start nothing
#   --help                    print this
#
# Anything else goes to train.py. The ranks meet on the first host, at MELLOW_PORT (default 29500); MELLOW_INTERFACE is
# mpirun's too. What travels shows in the command lines of the hosts. OpenMPI stands at the same place on all hosts; as root
# it wants OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1. Ends with the exit code of train.py.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"
# shellcheck source=launch/watched.sh
source "$MELLOW_ROOT/launch/watched.sh"
read_arguments hostfile num-per-host include exclude -- "$@"
[[ -n "$HOSTFILE" ]] || fail "no hostfile is given: add --hostfile FILE, or start on this host with single_node.sh"
use_environment
make_plan --for-deepspeed
for place in "${!PLAN_HOSTS[@]}"; do
    [[ -z "${PLAN_DEVICES[place]}" ]] || fail "mpirun cannot choose single GPUs of ${PLAN_HOSTS[place]}: name whole hosts," \
        "or start with pdsh.sh"
done

port=${MELLOW_PORT:-29500}
ssh="-o BatchMode=yes -o ConnectTimeout=10 -o LogLevel=ERROR${MELLOW_SSH_CONFIG:+ -F $MELLOW_SSH_CONFIG}"
# ranks use their own threads; on one core each, as mpirun has it, loading would starve
mpirun=(--bind-to none --tag-output --mca plm_rsh_args "$ssh")
# a host that is lost is noticed after 12 s, not after eight minutes; later than the ranks, mpirun would wait for it for ever
for wait in time=4 intvl=4 probes=2; do mpirun+=(--mca "oob_tcp_keepalive_${wait%=*}" "${wait#*=}"); done
if [[ -n "${MELLOW_INTERFACE:-}" ]]; then
    mpirun+=(--mca oob_tcp_if_include "$MELLOW_INTERFACE" --mca btl_tcp_if_include "$MELLOW_INTERFACE")
fi
if [[ -n "$DRY_RUN" ]]; then
    hosts=$HOSTFILE
else
    command -v mpirun >/dev/null || fail "mpirun is not installed here: install OpenMPI (apt-get install openmpi-bin) on" \
        "all hosts, or start with launch/ssh/multi_node.sh"
    if [[ "$EUID" == 0 && -z "${OMPI_ALLOW_RUN_AS_ROOT:-}" ]]; then
        fail "mpirun does not start as root unless it is told to: set OMPI_ALLOW_RUN_AS_ROOT=1 and" \
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or start as another user"
    fi
    make_temporary
    put_tied mpirun env "PATH=$REAL_PATH" mpirun # by its name: a path would stand for --prefix
    hosts=$MELLOW_TEMPORARY/hosts
    for place in "${!PLAN_HOSTS[@]}"; do
        printf '%s slots=%s\n' "${PLAN_HOSTS[place]}" "${PLAN_RANKS[place]}"
    done >"$hosts"
fi
PLAN_EXPORTS+="export MASTER_ADDR=$PLAN_MASTER MASTER_PORT=$port;"
drop_from_runner
words=()
eval "words=($(on_host "$MELLOW_PYTHON" -u "$TRAIN_SCRIPT" "${TRAIN_ARGUMENTS[@]}"))"
command=(
    env "${DROPPED[@]}" "DS_ENV_FILE=/dev/null" "$MELLOW_PYTHON" -m deepspeed.launcher.runner --launcher openmpi --force_multi
    --no_ssh_check --master_addr "$PLAN_MASTER" --master_port "$port" --hostfile "$hosts"
    "--launcher_args=$(quoted "${mpirun[@]}")" --no_python "${words[@]}"
)
if [[ -n "$DRY_RUN" ]]; then
    show_run "${command[@]}"
    exit
fi
# mpirun gives ranks that it ends a second; the signals of the user pass through it
# shellcheck disable=SC2329  # called by run_watched
signal_ranks() {
    if [[ "$1" == KILL ]]; then pkill -TERM -P "$_child"; else pkill -USR1 -P "$_child"; fi
}
run_watched signal_ranks "${command[@]}"
if [[ "$CODE" == 85 && "$_signals" == INT ]]; then CODE=130; fi
if [[ "$CODE" == 179 ]]; then CODE=1; fi # mpirun's own (-77), after it has said which host it has lost
exit "$CODE"
