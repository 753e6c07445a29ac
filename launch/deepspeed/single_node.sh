#!/usr/bin/env bash
# All GPUs of this host (two CPU processes: --num-per-host 2) with DeepSpeed's launcher; needs no ssh.
#
#   launch/deepspeed/single_node.sh --config mellow --data.shards SHARDS --save-dir runs/mine
#
#   --config NAME             the run configuration: a recipe, or a YAML file
#   --deepspeed_config FILE   the engine JSON
#   --num-per-host N          processes (default: the GPUs that this shell sees, or 1)
#   --include localhost:0,2   only these GPUs
#   --exclude localhost:1     all GPUs but these
#   --env-file FILE           what is sourced first (default: launch/env.sh)
#   --dry-run                 print the command and its variables, start nothing
#   --help                    print this
#
# Anything else goes to train.py. The ranks meet at MELLOW_PORT (default: a free port). Ends with the exit code of train.py.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"
# shellcheck source=launch/watched.sh
source "$MELLOW_ROOT/launch/watched.sh"
read_arguments num-per-host include exclude -- "$@"
use_environment

# DeepSpeed's filters and its choice of GPUs want numbers below the slots of a hostfile; CUDA_VISIBLE_DEVICES is a filter.
MELLOW_TEMPORARY=$(mktemp -d)
trap 'rm -rf "$MELLOW_TEMPORARY"' EXIT
number=${NUM_PER_HOST:-}
if [[ -n "${CUDA_VISIBLE_DEVICES:-}" && -z "$INCLUDE$EXCLUDE" ]]; then
    [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]] ||
        fail "CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES', and DeepSpeed's launcher takes numbers only: start with" \
            "launch/ssh/single_node.sh"
    INCLUDE=localhost:$CUDA_VISIBLE_DEVICES
    slots=$(($(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sort -n | tail -n 1) + 1))
else
    gpus=(/proc/driver/nvidia/gpus/*)
    if [[ ! -e "${gpus[0]}" ]]; then gpus=(none); fi
    slots=${#gpus[@]}
    if [[ -n "$number" ]] && ((number > slots)); then slots=$number; fi
fi
HOSTFILE=$MELLOW_TEMPORARY/hosts
printf 'localhost slots=%s\n' "$slots" >"$HOSTFILE"
make_plan --for-deepspeed

port=${MELLOW_PORT:-$("$MELLOW_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
command=(
    "$MELLOW_PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --no_ssh_check --master_addr 127.0.0.1
    --master_port "$port" --include "$PLAN_INCLUDE" "$TRAIN_SCRIPT" "${TRAIN_ARGUMENTS[@]}"
)
if [[ -n "$DRY_RUN" ]]; then
    show_run "${command[@]}"
    exit
fi
# the runner starts one `launch`, and that starts the ranks
# shellcheck disable=SC2329  # called by run_watched
signal_ranks() { pkill "-$1" -P "$(pgrep -d, -P "$_child")" 2>/dev/null; }
run_watched signal_ranks "${command[@]}"
exit "$CODE"
