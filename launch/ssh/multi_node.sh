#!/usr/bin/env bash
# Several hosts over ssh with `mellow-ds launch`, which checks them first, watches them, and leaves nothing behind. The
# one to take where nothing speaks for another.
#
#   launch/ssh/multi_node.sh --hostfile hosts --config mellow --data.shards SHARDS --save-dir runs/mine
#
#   --hostfile FILE           the hosts, a line each: name slots=N (launch/deepspeed/hostfile.example)
#   --config NAME             the run configuration: a recipe, or a YAML file
#   --deepspeed_config FILE   the engine JSON
#   --num-per-host N          processes a host (default: its slots)
#   --include node1:0,1@node2 only these hosts, after a `:` these slots
#   --exclude node2           all but these
#   --min-hosts N             after a lost host go on with those that are left, where they are N; from the newest checkpoint
#   --max-restarts N          how often (default: 3)
#   --env-file FILE           what every host sources first (default: launch/env.sh)
#   --dry-run                 print hosts, ranks, commands and the variables that travel, start nothing
#   --help                    print this
#
# Anything else goes to train.py. The ranks meet on the first host. Ends with the exit code of train.py.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"
read_arguments hostfile num-per-host include exclude min-hosts max-restarts -- "$@"
[[ -n "$HOSTFILE" ]] || fail "no hostfile is given: add --hostfile FILE, or start on this host with single_node.sh"
use_environment
more=()
if [[ -n "$MIN_HOSTS" ]]; then more+=(--min-hosts "$MIN_HOSTS"); fi
if [[ -n "$MAX_RESTARTS" ]]; then more+=(--max-restarts "$MAX_RESTARTS"); fi
launch_with_mellow --env-file "$ENV_FILE" "${more[@]}" -- "$TRAIN_SCRIPT" "${TRAIN_ARGUMENTS[@]}"
