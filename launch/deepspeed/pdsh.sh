#!/usr/bin/env bash
# Several hosts with DeepSpeed's launcher, which reaches them by pdsh.
#
#   launch/deepspeed/pdsh.sh --hostfile hosts --config mellow --data.shards SHARDS --save-dir runs/mine
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
# Anything else goes to train.py. The ranks meet on the first host, at MELLOW_PORT (default 29500). What a host's own
# environment file sets stands above what travels; what MELLOW_SEND names stands above both, and shows in the command
# lines of the hosts. The login shell of the hosts has to be bash. Ends with the exit code of train.py.
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
make_plan --for-deepspeed

port=${MELLOW_PORT:-29500}
name_pdsh_hosts
drop_from_runner
command=(
    env "${DROPPED[@]}" "$MELLOW_PYTHON" -m deepspeed.launcher.runner --launcher pdsh --force_multi --no_ssh_check
    --venv_script "$ENV_FILE" --master_addr "$PLAN_MASTER" --master_port "$port"
)
run=(--include "$PLAN_INCLUDE" "$TRAIN_SCRIPT" "${PLAN_DEEPSPEED_WORDS[@]}")
if [[ -n "$DRY_RUN" ]]; then
    show_run "${command[@]}" --hostfile "$HOSTFILE" "${run[@]}"
    exit
fi
reach_pdsh_hosts
tie_pdsh
printf '%s' "$PLAN_HOSTFILE" >"$MELLOW_TEMPORARY/hosts"
printf '%s' "$PLAN_DEEPSPEED_ENV" >"$MELLOW_TEMPORARY/variables"
export DS_ENV_FILE=$MELLOW_TEMPORARY/variables

# The ranks of a host are what its `launch` has started; that of this run is known by where its ranks meet.
launch="[d]eepspeed.launcher.launch .*--node_rank=%n --master_addr=$PLAN_MASTER --master_port=$port "
refuse_neighbour "$port" "$launch"
# shellcheck disable=SC2329  # called by run_watched
signal_ranks() { on_hosts "pkill -$1 -P \"\$(pgrep -d, -f '$launch')\""; }

run_watched signal_ranks "${command[@]}" --hostfile "$MELLOW_TEMPORARY/hosts" "${run[@]}"
doubt_pdsh
exit "$CODE"
