#!/usr/bin/env bash
# From nothing to a trained, evaluated model in minutes: environment, corpus, shards, training on two ranks of this host
# (all GPUs where there are any, else two CPU processes), evaluation on held-out clips with and without their audio,
# answers to three questions, and one table.
#
#   bash launch/quickstart.sh [FOLDER]        FOLDER (default runs/quickstart) keeps everything; a second call reuses it
#
# Ends with code 1 when the model does not clearly use what it hears.
set -euo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-runs/quickstart}

say() { printf '\n[quickstart %(%H:%M:%S)T] %s\n' -1 "$*" >&2; }

say "environment"
source launch/env.sh

slots=$("$MELLOW_PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
mkdir -p "$folder"
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > slots ? cores / slots : 1))}

ranks() { # run train.py on all slots of this host, which needs no ssh; DeepSpeed's own launch lines are left out
    bash launch/deepspeed/single_node.sh --num-per-host "$slots" \
        --config quickstart --save-dir "$folder/run" "$@" |
        { grep --line-buffered -v '\[launch.py\|\[runner.py\|\[real_accelerator.py' || true; }
}

say "corpus: sounds made by formula, with questions and answers"
"$MELLOW_PYTHON" -m shards synthesize --out "$folder/corpus"

say "shards"
for split in train test; do
    "$MELLOW_PYTHON" -m shards build --json "$folder/corpus/$split.json" --audio-root "$folder/corpus" \
        --out "$folder/shards/$split"
done

say "training on $slots ranks"
ranks --deepspeed_config ds_configs/zero2.json --data.shards "$folder/shards/train"

checkpoint=$(find "$folder/run/checkpoints" -maxdepth 1 -name 'step-*' | sort | tail -n 1)
if [ ! -f "$folder/run/evaluation/$(basename "$checkpoint")/results.json" ]; then
    say "evaluation on held-out clips, with their audio and with silence"
    ranks --mode evaluate_checkpoint --checkpoint_path "$checkpoint" --data.eval_shards "$folder/shards/test" \
        >/dev/null # the table, which comes again at the end
fi

say "answers to three questions about held-out clips"
"$MELLOW_PYTHON" -m mellow_ds.cli.main generate --checkpoint "$checkpoint" --max-new-tokens 32 \
    --examples "$folder/corpus/test.json" --audio-root "$folder/corpus" --num-examples 3

say "result"
"$MELLOW_PYTHON" -m mellow_ds.cli.main report "$folder/run" --require-hearing
if [[ "$MELLOW_PYTHON" == "$PWD/.venv/"* ]]; then say "for commands of your own: source .venv/bin/activate"; fi
