#!/usr/bin/env bash
# torchrun on this host, as one of several that each start it by hand, the first with NODE_RANK=0.
#
#   NODE_RANK=0 launch/ssh/torchrun_node.sh --nodes 2 --num-per-host 4 --master node1 --config mellow --data.shards SHARDS
#   NODE_RANK=1 launch/ssh/torchrun_node.sh --nodes 2 --num-per-host 4 --master node1 --config mellow --data.shards SHARDS
#
#   --nodes N                 hosts of the run (default: 1)
#   --node-rank N             which of them this is, 0 being the one where the ranks meet (default: NODE_RANK)
#   --master HOST[:PORT]      that host, as the others reach it, and a port of it that is free (default port: 29500)
#   --num-per-host N          processes on this host (default: 1)
#   --config NAME             the run configuration: a recipe, or a YAML file
#   --deepspeed_config FILE   the engine JSON
#   --env-file FILE           what is sourced first (default: launch/env.sh)
#   --dry-run                 print the command, start nothing
#   --help                    print this
#
# Anything else goes to train.py. Nothing travels: what the environment of a host needs is set on that host. Ctrl-C and
# SIGTERM reach the ranks of this host, and by their agreement all. Ends with the exit code of train.py.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"
rank=${NODE_RANK:-}
read_arguments nodes node-rank master num-per-host -- "$@"
rank=${NODE_RANK:-$rank}

if [[ -n "${MELLOW_HOST_RANKS:-}" ]]; then # from torchrun.sh and pdsh.sh: a list with a place a host
    rank=${rank:-${RANK:-0}}
    IFS=, read -r -a all_ranks <<<"$MELLOW_HOST_RANKS"
    IFS=';' read -r -a all_devices <<<"${MELLOW_HOST_DEVICES:-};"
    NODES=${#all_ranks[@]} NUM_PER_HOST=${all_ranks[$rank]}
    MASTER=${MASTER:-${MASTER_ADDR:-}:${MASTER_PORT:-}}
    unset CUDA_VISIBLE_DEVICES
    if [[ -n "${all_devices[$rank]:-}" ]]; then export CUDA_VISIBLE_DEVICES=${all_devices[$rank]}; fi
fi
NODES=${NODES:-1}
if ((NODES > 1)); then
    [[ -n "$rank" ]] || fail "which host this is, is not given: set NODE_RANK, or add --node-rank N"
    [[ -n "$MASTER" ]] || fail "where the ranks meet is not given: add --master HOST, the host with NODE_RANK=0"
fi
rank=${rank:-0} MASTER=${MASTER:-127.0.0.1}
if [[ ! "$rank" =~ ^[0-9]{1,6}$ ]] || ((rank >= NODES)); then
    fail "the node rank is '$rank'; of $NODES hosts it is one of 0 to $((NODES - 1))"
fi
port=29500
if [[ "$MASTER" == *:* ]]; then port=${MASTER##*:}; fi
[[ "$MASTER" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?$ ]] || fail "--master is '$MASTER'; it must be HOST or HOST:PORT"
use_environment
# of the launcher above; torchrun gives its ranks their own
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT NODE_RANK MELLOW_HOST_RANKS MELLOW_HOST_DEVICES
command=(
    "$MELLOW_PYTHON" -m mellow_ds.launcher.torchrun "--nnodes=$NODES" "--node-rank=$rank"
    "--nproc-per-node=${NUM_PER_HOST:-1}" "--master-addr=${MASTER%%:*}" "--master-port=$port"
    "$TRAIN_SCRIPT" "${TRAIN_ARGUMENTS[@]}"
)
if [[ -n "$DRY_RUN" ]]; then
    show_run "${command[@]}"
    exit
fi
exec "${command[@]}"
