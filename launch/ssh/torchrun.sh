#!/usr/bin/env bash
# torchrun on several hosts, started on each over ssh.
#
#   launch/ssh/torchrun.sh --hostfile hosts --config mellow --data.shards SHARDS --save-dir runs/mine
#
#   --hostfile FILE           the hosts, a line each: name slots=N (launch/deepspeed/hostfile.example)
#   --config NAME             the run configuration: a recipe, or a YAML file
#   --deepspeed_config FILE   the engine JSON
#   --num-per-host N          processes a host (default: its slots)
#   --include node1:0,1@node2 only these hosts, after a `:` these slots
#   --exclude node2           all but these
#   --env-file FILE           what every host sources first (default: launch/env.sh)
#   --dry-run                 print hosts, commands and the variables that travel, start nothing
#   --help                    print this
#
# Anything else goes to train.py. `mellow-ds launch` starts one process a host, torchrun_node.sh, which takes its node rank
# from it; so what is said of faults there holds here. The ranks meet on the first host. Ends with the exit code of train.py.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"
read_arguments hostfile num-per-host include exclude -- "$@"
[[ -n "$HOSTFILE" ]] || fail "no hostfile is given: add --hostfile FILE, or start on this host with single_node.sh"
use_environment
make_plan
join_plan_of_hosts
NUM_PER_HOST=1 # torchrun, that is
launch_with_mellow --env-file "$ENV_FILE" --log-dir "$PLAN_SAVE_DIR/logs" \
    --env "MELLOW_HOST_RANKS=$MELLOW_HOST_RANKS" "MELLOW_HOST_DEVICES=$MELLOW_HOST_DEVICES" -- \
    bash "$MELLOW_ROOT/launch/ssh/torchrun_node.sh" --env-file "$ENV_FILE" "${TRAIN_ARGUMENTS[@]}"
