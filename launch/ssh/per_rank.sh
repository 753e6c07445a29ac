#!/usr/bin/env bash
# One rank, with its place set by hand; every rank of the run is started so, each on its host.
#
#   RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29500 launch/ssh/per_rank.sh --config mellow --data.shards SHARDS
#
#   RANK                      which rank this is, 0 to WORLD_SIZE - 1
#   WORLD_SIZE                ranks of the run
#   LOCAL_RANK                its place among the ranks of its host, which picks the GPU
#   MASTER_ADDR, MASTER_PORT  the host of rank 0, as all reach it, and a port of it that is free
#   --config NAME             the run configuration: a recipe, or a YAML file
#   --deepspeed_config FILE   the engine JSON
#   --env-file FILE           what is sourced first (default: launch/env.sh)
#   --dry-run                 print the command, start nothing
#   --help                    print this
#
# Anything else goes to train.py. Nobody watches the ranks: one that fails ends the others when they next wait for it. Ends
# with the exit code of train.py.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"
read_arguments -- "$@"
for name in RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT; do
    [[ -n "${!name:-}" ]] || fail "$name is not set: a rank that is started by hand needs RANK, WORLD_SIZE, LOCAL_RANK," \
        "MASTER_ADDR and MASTER_PORT"
    [[ $name == MASTER_ADDR || "${!name}" =~ ^[0-9]{1,6}$ ]] || fail "$name is '${!name}', not a number"
done
((RANK < WORLD_SIZE)) || fail "RANK is $RANK; of $WORLD_SIZE ranks it is one of 0 to $((WORLD_SIZE - 1))"
export RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
use_environment
command=("$MELLOW_PYTHON" "$TRAIN_SCRIPT" "${TRAIN_ARGUMENTS[@]}")
if [[ -n "$DRY_RUN" ]]; then
    show_run env RANK="$RANK" WORLD_SIZE="$WORLD_SIZE" LOCAL_RANK="$LOCAL_RANK" MASTER_ADDR="$MASTER_ADDR" \
        MASTER_PORT="$MASTER_PORT" "${command[@]}"
    exit
fi
exec "${command[@]}"
