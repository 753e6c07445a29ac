# shellcheck shell=bash
# Sourced by the launch scripts and by tests/run.sh: makes or finds the environment and puts it first.
#
#   MELLOW_EXTRAS="gguf" source launch/env.sh
#
# Leaves MELLOW_PYTHON (the interpreter), MELLOW_ROOT (this clone), and PATH, PYTHONPATH and VIRTUAL_ENV set for them, so
# that `python`, `deepspeed` and `torchrun` are those of the environment and `mellow_ds` is this clone's, installed or not.
# Ends the script that sources it when the set-up fails.

MELLOW_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck disable=SC2086
MELLOW_PYTHON=$(bash "$MELLOW_ROOT/launch/setup_env.sh" ${MELLOW_EXTRAS:-}) || exit $?
if [[ "$MELLOW_PYTHON" == "$MELLOW_ROOT/.venv/"* ]]; then
    export VIRTUAL_ENV=$MELLOW_ROOT/.venv
fi
export MELLOW_ROOT MELLOW_PYTHON
export PATH="${MELLOW_PYTHON%/*}:$PATH"
export PYTHONPATH="$MELLOW_ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONNOUSERSITE=1
# without bytecode every process compiles torch and DeepSpeed anew: 10 s of imports, and 4 with it
unset PYTHONHOME PYTHONDONTWRITEBYTECODE
