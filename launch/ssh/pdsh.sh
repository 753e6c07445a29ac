#!/usr/bin/env bash
# Several hosts by pdsh alone, without DeepSpeed's runner: on each, torchrun_node.sh with the host's place in the list as its
# node rank, which pdsh itself fills in.
#
#   launch/ssh/pdsh.sh --hostfile hosts --config mellow --data.shards SHARDS --save-dir runs/mine
#
#   --hostfile FILE           the hosts, a line each: name slots=N (launch/deepspeed/hostfile.example)
#   --config NAME             the run configuration: a recipe, or a YAML file
#   --deepspeed_config FILE   the engine JSON
#   --num-per-host N          processes a host (default: its slots)
#   --include node1:0,1@node2 only these hosts, after a `:` these slots
#   --exclude node2           all but these
#   --env-file FILE           what every host sources first (default: launch/env.sh)
#   --dry-run                 print the command and the variables that travel, start nothing
#   --help                    print this
#
# Anything else goes to train.py. The ranks meet on the first host, at MELLOW_PORT (default 29500). What travels shows in the
# command lines of the hosts. The login shell of the hosts has to be of the Bourne kind. Ends with the exit code of train.py.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"
# shellcheck source=launch/watched.sh
source "$MELLOW_ROOT/launch/watched.sh"
# shellcheck source=launch/over_pdsh.sh
source "$MELLOW_ROOT/launch/over_pdsh.sh"
read_arguments hostfile num-per-host include exclude -- "$@"
[[ -n "$HOSTFILE" ]] || fail "no hostfile is given: add --hostfile FILE, or start on this host with single_node.sh"
use_environment
make_plan
join_plan_of_hosts
name_pdsh_hosts

port=${MELLOW_PORT:-29500}
remote=$(on_host env NODE_RANK=NODE-RANK MELLOW_HOST_RANKS="$MELLOW_HOST_RANKS" MELLOW_HOST_DEVICES="$MELLOW_HOST_DEVICES" \
    bash "$MELLOW_ROOT/launch/ssh/torchrun_node.sh" --env-file "$ENV_FILE" --master "$PLAN_MASTER:$port" "${TRAIN_ARGUMENTS[@]}")
remote=${remote//%/%%}
remote=${remote/NODE_RANK=NODE-RANK/NODE_RANK=%n} # pdsh fills in the place of the host
command=(pdsh -S -f 1024 -w "$PDSH_HOSTS" "$remote")
if [[ -n "$DRY_RUN" ]]; then
    show_run "${command[@]}"
    exit
fi
reach_pdsh_hosts
tie_pdsh

# torchrun of this run is known by its host's place and by where the ranks meet; it passes signals on to them
torchrun="[m]ellow_ds.launcher.torchrun .*--node-rank=%n .*--master-addr=$PLAN_MASTER --master-port=$port "
refuse_neighbour "$port" "$torchrun"
# shellcheck disable=SC2329  # called by run_watched
signal_ranks() {
    local first=""
    if [[ "$1" == KILL ]]; then first="pkill -KILL -P \"\$(pgrep -d, -f '$torchrun')\"; "; fi # or ranks would outlive it
    on_hosts "${first}pkill -$1 -f '$torchrun'"
}

run_watched signal_ranks "${command[@]}"
exit "$CODE"
