#!/usr/bin/env bash
# All GPUs of this host (two CPU processes: --num-per-host 2) with `mellow-ds launch`; needs no ssh.
#
#   launch/ssh/single_node.sh --config mellow --data.shards SHARDS --save-dir runs/mine
#
#   --config NAME             the run configuration: a recipe, or a YAML file
#   --deepspeed_config FILE   the engine JSON
#   --num-per-host N          processes (default: the GPUs that this shell sees, or 1)
#   --env-file FILE           what is sourced first (default: launch/env.sh)
#   --dry-run                 print the commands and the variables of the ranks, start nothing
#   --help                    print this
#
# Anything else goes to train.py. Ends with the exit code of train.py.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"
read_arguments num-per-host -- "$@"
use_environment
launch_with_mellow -- "$TRAIN_SCRIPT" "${TRAIN_ARGUMENTS[@]}"
