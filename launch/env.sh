# shellcheck shell=bash
# The one place for the environment of a run: sourced by every script of launch/, by every host of a run and by
# tests/run.sh. Nothing here names a machine or an environment: that goes into launch/env.local.sh, which is not committed
# and is read first where it is there (launch/env.local.sh.example shows it), or into variables:
#
#   MELLOW_MODULES="cuda/12.8 gcc"   environment modules to load
#   MELLOW_VENV=/envs/mellow         a virtual environment to use as it is
#   MELLOW_CONDA=mellow              a conda environment, by name or path, to use as it is
#   MELLOW_EXTRAS="gguf"             extras of the environment that is made here where none of the two is named
#   MELLOW_INTERFACE=eth0            the network interface of collectives (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)
#   MELLOW_CACHE=/local/cache        a folder for what libraries download and compile
#
# docs/launching.md has these and the ones that the scripts read themselves (MELLOW_SEND, MELLOW_SSH_CONFIG, MELLOW_PORT).
#
# Leaves MELLOW_PYTHON (the interpreter), MELLOW_ROOT (this clone), and PATH, PYTHONPATH and VIRTUAL_ENV set for them, so
# that `python`, `deepspeed` and `torchrun` are those of the environment and `mellow_ds` is this clone's, installed or not.
# Ends the script that sources it when the set-up fails. Sourced again where it was sourced before, it does nothing.

MELLOW_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ -f "$MELLOW_ROOT/launch/env.local.sh" ]]; then
    # shellcheck disable=SC1091
    source "$MELLOW_ROOT/launch/env.local.sh"
fi

_mellow_fail() {
    printf 'error: launch/env.sh: %s\n' "$*" >&2
    exit 2
}

# Sets MELLOW_PYTHON to that of the environment that is named; none is: to that of one that fits, made where there is none.
_mellow_find_python() {
    local base
    if [[ -n "${MELLOW_VENV:-}" && -n "${MELLOW_CONDA:-}" ]]; then
        _mellow_fail "MELLOW_VENV and MELLOW_CONDA are both set: keep one"
    fi
    if [[ -n "${MELLOW_VENV:-}" ]]; then
        MELLOW_PYTHON=$MELLOW_VENV/bin/python
        [[ -x "$MELLOW_PYTHON" ]] || _mellow_fail "MELLOW_VENV is $MELLOW_VENV, and $MELLOW_PYTHON is not there"
        export VIRTUAL_ENV=$MELLOW_VENV
    elif [[ -n "${MELLOW_CONDA:-}" ]]; then
        base=${CONDA_EXE:-$(command -v conda || true)}
        [[ -n "$base" ]] || _mellow_fail "MELLOW_CONDA is $MELLOW_CONDA, and conda is not on the PATH: load its module" \
            "(MELLOW_MODULES), or set CONDA_EXE"
        base=$("$base" info --base) || _mellow_fail "conda does not say where it is installed (its reason is above)"
        set +u # what packages do on activation was not written for it
        # shellcheck disable=SC1091
        source "$base/etc/profile.d/conda.sh"
        conda activate "$MELLOW_CONDA" || _mellow_fail "conda cannot activate MELLOW_CONDA=$MELLOW_CONDA"
        [[ "$_mellow_flags" != *u* ]] || set -u
        MELLOW_PYTHON=$CONDA_PREFIX/bin/python
    else
        # shellcheck disable=SC2086
        MELLOW_PYTHON=$(MELLOW_QUIET=1 bash "$MELLOW_ROOT/launch/setup_env.sh" ${MELLOW_EXTRAS:-}) || exit $?
        if [[ "$MELLOW_PYTHON" == "$MELLOW_ROOT/.venv/"* ]]; then export VIRTUAL_ENV=$MELLOW_ROOT/.venv; fi
    fi
}

# What was found once is taken again by scripts that scripts start; another host of the run looks for itself.
_mellow_here="$MELLOW_ROOT ${MELLOW_VENV:-} ${MELLOW_CONDA:-} ${MELLOW_EXTRAS:-} ${HOSTNAME:-}"
if [[ "${_MELLOW_FOUND:-}" != "$_mellow_here" || "${_MELLOW_PATH:-}" != "$PATH" ]]; then
    _mellow_flags=$-
    if [[ -n "${MELLOW_MODULES:-}" ]]; then
        set +u
        if ! type module >/dev/null 2>&1; then
            for _mellow_file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh; do
                # shellcheck disable=SC1090
                if [[ -f "$_mellow_file" ]]; then source "$_mellow_file"; fi
            done
        fi
        type module >/dev/null 2>&1 || _mellow_fail "MELLOW_MODULES is set, and there is no \`module\` command here"
        # shellcheck disable=SC2086
        module load $MELLOW_MODULES || _mellow_fail "cannot load the modules $MELLOW_MODULES"
        [[ "$_mellow_flags" != *u* ]] || set -u
    fi
    _mellow_find_python
    export PATH="${MELLOW_PYTHON%/*}:$PATH"
    export PYTHONPATH="$MELLOW_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export _MELLOW_FOUND=$_mellow_here _MELLOW_PATH=$PATH
fi
export MELLOW_ROOT MELLOW_PYTHON
export PYTHONNOUSERSITE=1
# without bytecode every process compiles torch and DeepSpeed anew: 10 s of imports, and 4 with it
unset PYTHONHOME PYTHONDONTWRITEBYTECODE

if [[ -n "${MELLOW_INTERFACE:-}" ]]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$MELLOW_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$MELLOW_INTERFACE}
fi
if [[ -n "${MELLOW_CACHE:-}" ]]; then
    export HF_HOME=${HF_HOME:-$MELLOW_CACHE/huggingface} TORCH_HOME=${TORCH_HOME:-$MELLOW_CACHE/torch}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$MELLOW_CACHE/triton}
    # compiled for the GPUs and the torch of a host, under a lock: a folder a host
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$MELLOW_CACHE/torch_extensions/${HOSTNAME:-host}}
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # silent while all is well; names what is wrong where it is not
