# shellcheck shell=bash
# Sourced by the scripts that reach the hosts by pdsh, with or without DeepSpeed's runner above it.
#
#   name_pdsh_hosts     from PLAN_HOSTS; sets how pdsh calls ssh
#   reach_pdsh_hosts    refuses where pdsh is missing or a host cannot be reached
#   tie_pdsh            puts a pdsh and an ssh first on the PATH that end with who started them, so that no connection
#                       outlives the run; the exit code of pdsh goes into a file, since not every launcher heeds it, and
#                       a connection that breaks is told to run_watched, since pdsh goes on waiting for the other hosts
#   on_hosts COMMAND    runs it on every host, %n being the place of the host; whether it succeeded on any
#   refuse_neighbour PORT PATTERN    where a run that meets at this port is at work: a stop would reach both
#   doubt_pdsh          compares CODE with that file

PDSH_SSH_OPTIONS="-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=4 -o ServerAliveCountMax=3 -o LogLevel=ERROR"

name_pdsh_hosts() {
    local IFS=,
    PDSH_HOSTS=${PLAN_HOSTS[*]}
    export PDSH_RCMD_TYPE=ssh
    export PDSH_SSH_ARGS_APPEND="$PDSH_SSH_OPTIONS${MELLOW_SSH_CONFIG:+ -F $MELLOW_SSH_CONFIG}${PDSH_SSH_ARGS_APPEND:+ $PDSH_SSH_ARGS_APPEND}"
}

reach_pdsh_hosts() {
    local said line
    command -v pdsh >/dev/null || fail "pdsh is not installed here: install it (apt-get install pdsh), or start with" \
        "launch/ssh/multi_node.sh, which needs ssh alone"
    if ! said=$(pdsh -S -f 1024 -w "$PDSH_HOSTS" true 2>&1 </dev/null); then
        while read -r line; do
            if [[ "$line" != pdsh@* ]]; then printf 'error: host %s\n' "$line" >&2; fi
        done <<<"$said"
        fail "pdsh cannot reach all hosts, and nothing was started: each must take ssh without a password"
    fi
}

tie_pdsh() {
    make_temporary
    put_tied pdsh --code "$MELLOW_TEMPORARY/code" "$(command -v pdsh)"
    put_tied ssh --lost "$MELLOW_TEMPORARY/lost" "$$" "$PDSH_HOSTS" "$(command -v ssh)"
}

on_hosts() {
    local said
    said=$(PATH=$REAL_PATH pdsh -t "${CONNECT_SECONDS:-10}" -f 1024 -w "$PDSH_HOSTS" "{ $1; } >/dev/null 2>&1 && echo done" \
        </dev/null 2>/dev/null) || true
    [[ "$said" == *": done"* ]]
}

refuse_neighbour() {
    if on_hosts "pgrep -f '$2'"; then
        fail "another run of this account meets at $PLAN_MASTER, port $1, on these hosts: wait for its end, or set" \
            "MELLOW_PORT to another port"
    fi
}

# pdsh that was killed makes DeepSpeed's runner say 0.
doubt_pdsh() {
    local code
    code=$(cat "$MELLOW_TEMPORARY/code" 2>/dev/null || echo 137)
    if [[ "$CODE" == 0 && "$code" != 0 ]]; then
        printf 'error: pdsh was ended before the ranks were (code %s)\n' "$code" >&2
        CODE=$code
    fi
}
