# shellcheck shell=bash
# Sourced by every script of launch/: the arguments that all of them take, and the words in which they refuse and show.
#
#   source launch/arguments.sh
#   read_arguments hostfile num-per-host -- "$@"    the names: options with a value that this script takes beside
#                                                   --config, --deepspeed_config and --env-file
#   use_environment                                 source the environment file: MELLOW_PYTHON, PATH, PYTHONPATH
#
# read_arguments leaves CONFIG, ENGINE_JSON, ENV_FILE (launch/env.sh where none is given), DRY_RUN (1 or empty), a variable
# for each option that the script takes (HOSTFILE, NODES, NUM_PER_HOST, INCLUDE ...; empty where it is not given), and the
# array TRAIN_ARGUMENTS: all that train.py gets, --config and --deepspeed_config among it, in the order in which it stood.
# TRAIN_SCRIPT is train.py as it is called from the working directory. `--help` prints the header comment of the script.

MELLOW_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
export MELLOW_ROOT
PLAN_SHOWN=() PLAN_WITHHELD=() # for scripts that make no plan
# all options with a value that any script of launch/ takes
_known_options=" hostfile nodes num-per-host env-file include exclude node-rank master min-hosts max-restarts "

# Ends the script with one line and the code of a user's mistake.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Prints the header comment of the script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Prints a command so that a shell reads it back as it is.
quoted() {
    local word
    local line=""
    for word; do
        [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
        line+="$word "
    done
    printf '%s\n' "${line% }"
}

# NAME of --name, as the variable that holds its value is called.
_variable_of() {
    local name=${1#--}
    name=${name//-/_}
    printf '%s' "${name^^}"
}

_check_count() {
    [[ -z "$2" || "$2" =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1 is '$2'; it must be a number above 0"
}

# shellcheck disable=SC2034  # its variables are for the script that sources this
read_arguments() {
    local takes=" env-file " word name value
    CONFIG="" ENGINE_JSON="" HOSTFILE="" NODES="" NUM_PER_HOST="" ENV_FILE="" DRY_RUN="" TRAIN_ARGUMENTS=()
    while [[ "$1" != "--" ]]; do
        takes+="$1 "
        printf -v "$(_variable_of "$1")" '%s' ""
        shift
    done
    shift
    while (($#)); do
        word=$1 name=${1%%=*} value=""
        shift
        case "$name" in
        -h | --help)
            usage
            exit 0
            ;;
        --dry-run)
            DRY_RUN=1
            continue
            ;;
        --*) ;;
        *)
            TRAIN_ARGUMENTS+=("$word")
            continue
            ;;
        esac
        if [[ "$name" != --config && "$name" != --deepspeed_config && "$_known_options" != *" ${name#--} "* ]]; then
            TRAIN_ARGUMENTS+=("$word")
            continue
        fi
        if [[ "$word" == *=* ]]; then
            value=${word#*=}
        elif (($#)) && [[ "$1" != --* ]]; then
            value=$1
            shift
        fi
        [[ -n "$value" ]] || fail "$name has no value; see ${0##*/} --help"
        case "$name" in
        --config) CONFIG=$value TRAIN_ARGUMENTS+=("$name" "$value") ;;
        --deepspeed_config) ENGINE_JSON=$value TRAIN_ARGUMENTS+=("$name" "$value") ;;
        *)
            [[ "$takes" == *" ${name#--} "* ]] || fail "${0##*/} takes no $name; see ${0##*/} --help"
            printf -v "$(_variable_of "$name")" '%s' "$value"
            ;;
        esac
    done
    [[ -n "$CONFIG" ]] || fail "no run configuration is given: add --config NAME, a recipe or a YAML file"
    _check_count --nodes "$NODES"
    _check_count --num-per-host "$NUM_PER_HOST"
    if [[ -n "$HOSTFILE" && ! -f "$HOSTFILE" ]]; then
        fail "the hostfile $HOSTFILE is not there: write a line a host, such as \`node1 slots=4\`" \
            "(launch/deepspeed/hostfile.example)"
    fi
    ENV_FILE=${ENV_FILE:-$MELLOW_ROOT/launch/env.sh}
    [[ -f "$ENV_FILE" ]] || fail "--env-file $ENV_FILE is not there"
    ENV_FILE=$(cd "$(dirname "$ENV_FILE")" && pwd -P)/${ENV_FILE##*/}
    TRAIN_SCRIPT=$MELLOW_ROOT/train.py
    if [[ "$PWD" -ef "$MELLOW_ROOT" ]]; then TRAIN_SCRIPT=train.py; fi
}

# Sources the environment file, on this host as every host of the run does.
use_environment() {
    # shellcheck disable=SC1090
    source "$ENV_FILE" </dev/null
    if [[ -z "${MELLOW_PYTHON:-}" ]]; then
        MELLOW_PYTHON=$(command -v python || command -v python3) || fail "$ENV_FILE puts no python on the PATH"
    fi
    case ":${PYTHONPATH:-}:" in
    *":$MELLOW_ROOT:"*) ;;
    *) PYTHONPATH="$MELLOW_ROOT${PYTHONPATH:+:$PYTHONPATH}" ;;
    esac
    export MELLOW_PYTHON PYTHONPATH
}

# Sets the PLAN_ variables of mellow_ds/cli/script_plan.py from HOSTFILE, INCLUDE, EXCLUDE, NUM_PER_HOST and
# TRAIN_ARGUMENTS. `--for-deepspeed`: with what is only for its launcher. Refuses what is wrong in them.
# shellcheck disable=SC2120
make_plan() {
    local options=("$@") plan sent
    if [[ -n "${HOSTFILE:-}" ]]; then options+=(--hostfile "$HOSTFILE"); fi
    if [[ -n "${INCLUDE:-}" ]]; then options+=(--include "$INCLUDE"); fi
    if [[ -n "${EXCLUDE:-}" ]]; then options+=(--exclude "$EXCLUDE"); fi
    if [[ -n "${NUM_PER_HOST:-}" ]]; then options+=(--num-per-host "$NUM_PER_HOST"); fi
    read -r -a sent <<<"${MELLOW_SEND:-}"
    if ((${#sent[@]})); then options+=(--env "${sent[@]}"); fi
    plan=$("$MELLOW_PYTHON" -m mellow_ds.cli.script_plan "${options[@]}" -- "$TRAIN_SCRIPT" "${TRAIN_ARGUMENTS[@]}") ||
        exit $?
    eval "$plan"
}

# Sets DROPPED, options of `env` that keep from DeepSpeed's runner what it would send by itself, secrets as well, and with
# quotes that no shell takes off. What travels is in the plan.
# shellcheck disable=SC2034
drop_from_runner() {
    local name
    DROPPED=()
    while read -r name; do
        if [[ "$name" =~ ^(MLFLOW|PYTHON|MV2|UCX|NCCL) ]]; then DROPPED+=(-u "$name"); fi
    done < <(compgen -e)
}

# Prints what a dry run says: the command, and the variables that travel.
show_run() {
    printf 'would run, in %s:\n  ' "$PWD"
    quoted "$@"
    if ((${#PLAN_SHOWN[@]})); then
        printf 'variables that travel:\n'
        printf '  %s\n' "${PLAN_SHOWN[@]}"
    fi
    if ((${#PLAN_WITHHELD[@]})); then
        printf 'not sent, secret by name: %s (send with MELLOW_SEND="%s")\n' "${PLAN_WITHHELD[*]}" "${PLAN_WITHHELD[*]}"
    fi
}

# Becomes `mellow-ds launch` with the options that were read; words before `--` are more of its options.
launch_with_mellow() {
    local options=() sent
    while [[ "$1" != "--" ]]; do
        options+=("$1")
        shift
    done
    if [[ -n "${HOSTFILE:-}" ]]; then options+=(--hostfile "$HOSTFILE"); fi
    if [[ -n "${INCLUDE:-}" ]]; then options+=(--include "$INCLUDE"); fi
    if [[ -n "${EXCLUDE:-}" ]]; then options+=(--exclude "$EXCLUDE"); fi
    if [[ -n "${NUM_PER_HOST:-}" ]]; then options+=(--num-per-host "$NUM_PER_HOST"); fi
    if [[ -n "${MELLOW_PORT:-}" ]]; then options+=(--master-port "$MELLOW_PORT"); fi
    if [[ -n "${MELLOW_SSH_CONFIG:-}" ]]; then options+=(--ssh-config "$MELLOW_SSH_CONFIG"); fi
    if [[ -n "$DRY_RUN" ]]; then options+=(--dry-run); fi
    read -r -a sent <<<"${MELLOW_SEND:-}"
    if ((${#sent[@]})); then options+=(--env "${sent[@]}"); fi
    exec "$MELLOW_PYTHON" -m mellow_ds.cli.main launch "${options[@]}" "$@"
}

# Sets MELLOW_HOST_RANKS and MELLOW_HOST_DEVICES, lists with a place a host, as torchrun_node.sh reads them.
# shellcheck disable=SC2034
join_plan_of_hosts() {
    local IFS=,
    MELLOW_HOST_RANKS=${PLAN_RANKS[*]}
    IFS=';'
    MELLOW_HOST_DEVICES=${PLAN_DEVICES[*]}
}

# Prints what a host's shell has to run: source the environment file, set what travels (below what that file sets), and
# become the command.
on_host() {
    local inside
    inside="cd $(quoted "$PWD") && . $(quoted "$ENV_FILE") </dev/null || exit; $PLAN_EXPORTS exec $(quoted "$@")"
    quoted bash -c "$inside"
}
