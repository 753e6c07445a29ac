#!/usr/bin/env bash
# The long forms of the tests that a suite has no time for, one after the other; the first failure ends it:
#
#   bash tests/soak.sh [SEED]
#
# A sample of each runs in the suite (tests/soak/test_soak_samples.py). Each prints its figures as a line of JSON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seed=${1:-0}
MELLOW_EXTRAS="test" source launch/env.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$MELLOW_ROOT

run() {
    printf '[soak] %s\n' "$*" >&2
    "$MELLOW_PYTHON" "$@"
}

run tests/soak/mutations.py --rounds 10000 --seed "$seed"
run tests/soak/kill_and_resume.py --cycles 100 --seed "$seed"
run tests/soak/kill_during_save.py --kills 200 --seed "$seed"
run tests/soak/kill_runs.py --kills 24 --seed "$seed"
run tests/soak/preemption.py --rounds 50 --seed "$seed"
