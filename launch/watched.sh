# shellcheck shell=bash
# Sourced by the scripts whose launcher is not of this project (DeepSpeed's, pdsh, mpirun): runs it so that its end is this
# script's end and the other way round, and so that a stop reaches the ranks and not the launcher, which would drop them.
#
#   make_temporary                      sets MELLOW_TEMPORARY, a folder of this run, whose bin/ is first on the PATH
#   put_tied NAME WORD ...              puts a NAME there that ends with who started it: tied.py with these words
#   run_watched FUNCTION COMMAND ...    FUNCTION SIGNAL has to send a signal to the ranks, and to say whether any got it;
#                                       sets CODE
#
# The command gets a process group of its own: Ctrl-C in a terminal goes to the script alone. A signal before there are
# ranks waits for them, as the launcher may be starting them this moment; a second one ends them and the launcher at once. Where this script is killed, launch/tied.py ends the launcher. SIGUSR2 says that the host
# in the file $MELLOW_TEMPORARY/lost is lost: the ranks of the others wait for it in a collective, and are ended.

_signals=""
_untold="" # a signal that no rank has got
_lost_host=""

make_temporary() {
    MELLOW_TEMPORARY=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf $(quoted "$MELLOW_TEMPORARY")" EXIT
    mkdir "$MELLOW_TEMPORARY/bin"
    # shellcheck disable=SC2034  # for what must not be tied
    REAL_PATH=$PATH
    PATH=$MELLOW_TEMPORARY/bin:$PATH
}

put_tied() {
    local file=$MELLOW_TEMPORARY/bin/$1
    {
        printf '#!/bin/sh\nexec '
        quoted "$MELLOW_PYTHON" -I "$MELLOW_ROOT/launch/tied.py" "${@:2}" | tr '\n' ' '
        printf '"$@"\n'
    } >"$file"
    chmod +x "$file"
}

# Has no `return`: bash 5.2 takes it for one of the function that waits.
_stop() { # SIGNAL NAME
    if [[ -z "$_signals" ]]; then
        _signals=$1
        printf '%s: every rank is told, and waited for; once more ends them at once\n' "$2" >&2
        "$_send" "$1" || _untold=$1
    else
        _untold=""
        printf 'ending all ranks at once\n' >&2
        "$_send" KILL || true
        sleep 1
        kill -KILL -- "-$_child" 2>/dev/null || true
    fi
}

_lose() {
    if [[ -z "$_lost_host" ]]; then
        _lost_host=$(head -n 1 "$MELLOW_TEMPORARY/lost")
        printf 'error: host %s is lost: it is off, or its link is cut; the ranks on the others are ended\n' "$_lost_host" >&2
        export CONNECT_SECONDS=4 # the lost host is tried as well
        "$_send" TERM || true
        sleep 1
        "$_send" KILL || true
        kill -KILL -- "-$_child" 2>/dev/null || true
    fi
}

run_watched() {
    _send=$1
    shift
    set -m # a process group for what is started now
    "$MELLOW_PYTHON" -I "$MELLOW_ROOT/launch/tied.py" "$@" </dev/null &
    _child=$!
    set +m
    trap '_stop INT Ctrl-C' INT
    trap '_stop TERM SIGTERM' TERM HUP
    trap '_stop USR1 SIGUSR1' USR1
    trap _lose USR2
    CODE=0
    while :; do
        while [[ -n "$_untold" ]] && kill -0 "$_child" 2>/dev/null; do
            sleep 0.5
            if [[ -n "$_untold" ]] && "$_send" "$_untold"; then _untold=""; fi
        done
        wait "$_child" && CODE=0 || CODE=$?
        # a signal ends `wait` before the launcher has ended
        kill -0 "$_child" 2>/dev/null || break
    done
    wait "$_child" 2>/dev/null && CODE=0 || CODE=$?
    kill -KILL -- "-$_child" 2>/dev/null || true # what it left here
    trap - INT TERM HUP USR1
    trap '' USR2
    # -N as launchers hand on the code of a rank that signal N ended
    if ((CODE > 192)); then CODE=$((384 - CODE)); fi
    if [[ -n "$_lost_host" ]]; then CODE=1; fi
}
