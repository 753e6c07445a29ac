# shellcheck shell=bash
# Sourced by the scripts of this folder, after launch/arguments.sh: where the ranks of a job go, and how it ends.
#
#   place_ranks [agents]    NUM_NODES, NUM_PER_HOST and SRUN, the command that starts that many tasks, or one a node
#   show_plan WORD ...      what --dry-run prints for a command that SRUN starts
#   need_a_job              end here where there is none
#   prepare_environment     see that there is one
#   run_ranks WORD ...      start it, pass signals on, wait; returns its exit code
#   go_on_or_end CODE       ends the script with CODE; a job whose ranks left with 85 is queued again
#
# The chain of a job that stops and goes on by itself, as it is seen on SLURM 22.05:
#   - `--signal=B:USR1@120` sends USR1 to this shell alone, 120 to 180 seconds before the time limit. Without the B: it
#     goes to the tasks of every step and this shell would not know why they leave.
#   - A shell runs its trap only while it waits, so srun stands in the background. srun passes USR1 on to every task.
#   - Ranks agree on a step, save, and leave with 85. So do they after `train.max_hours`, and after a SIGTERM.
#   - `scontrol requeue` puts this very job back: same number, same command, same log. It starts no sooner than two minutes
#     later, with SLURM_RESTART_COUNT one higher, and train.py goes on from the newest checkpoint.
#   - A preemption, an scancel and an `scontrol requeue` from outside send SIGCONT and SIGTERM to all tasks and to this
#     shell, and SIGKILL after KillWait (30 s by default). SLURM has then decided itself what becomes of the job, and this
#     shell must not ask for more: what was cancelled would start again.

# what a variable is called whose value is nobody's business; as in mellow_ds/launcher/environment.py
_secret='(TOKEN|SECRET|KEY|PASSWORD|PASSWD|CREDENTIAL)S?(_|$)'
_shown='^(NCCL_|GLOO_|UCX_|FI_|PYTHON|OMP_|MKL_|OPENBLAS_|TORCH_|PYTORCH_|TRITON_|DS_|MELLOW_|HF_|TRANSFORMERS_|'
_shown+='TOKENIZERS_|CUDA_|MASTER_)'

# The header comment of the script without what it tells sbatch.
usage() { sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0"; }

say() { printf '[%s %(%H:%M:%S)T] %s\n' "${SLURM_JOB_NAME:-slurm}" -1 "$*" >&2; }

# The fewest CPUs that this job has on a node, of a list such as 72(x2),36.
_fewest_cpus() {
    local entry fewest="" number
    for entry in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do
        number=${entry%%(*}
        if [[ -z "$fewest" ]] || ((number < fewest)); then fewest=$number; fi
    done
    printf '%s' "$fewest"
}

# Outside of a job, for --dry-run, what is asked for is taken as given.
place_ranks() {
    local cpus tasks have=${SLURM_JOB_NUM_NODES:-}
    NUM_NODES=${NODES:-${have:-1}}
    if [[ -z "$NUM_PER_HOST" ]]; then
        # a task a GPU, where nobody says anything else; `4(x2)` is how SLURM writes two nodes of 4
        NUM_PER_HOST=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
        NUM_PER_HOST=${NUM_PER_HOST%%(*}
    fi
    [[ "$NUM_PER_HOST" =~ ^[1-9][0-9]*$ ]] || fail "SLURM says '$NUM_PER_HOST' tasks a node: give --num-per-host"
    tasks=$NUM_PER_HOST
    if [[ "${1:-}" == agents ]]; then tasks=1; fi
    SRUN=(srun "--nodes=$NUM_NODES" "--ntasks=$((NUM_NODES * tasks))" "--ntasks-per-node=$tasks")
    if [[ -n "$have" ]]; then
        ((NUM_NODES <= have)) || fail "--nodes $NUM_NODES, and this job has $have: submit it with sbatch --nodes=$NUM_NODES"
        cpus=$(($(_fewest_cpus) / NUM_PER_HOST))
        ((cpus)) || fail "a node of this job has $(_fewest_cpus) CPUs for $NUM_PER_HOST processes: submit it with" \
            "sbatch --ntasks-per-node=$NUM_PER_HOST --cpus-per-task=8, or with --exclusive"
        if ((tasks < NUM_PER_HOST)); then cpus=$(_fewest_cpus); fi
        SRUN+=("--cpus-per-task=$cpus") # srun does not take over that of sbatch since 22.05, and then binds a task to one
    fi
    # what sbatch was told of a task is said above; newer versions refuse to hear it twice, and unequal
    unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU
    # every rank sees all GPUs of its node and takes the one of its local rank
    if [[ -n "${SLURM_GPUS_ON_NODE:-}" ]]; then SRUN+=(--gpu-bind=none); fi
    # ranks of a node follow one another; no MPI is asked to help; a rank that ends early is train.py's own business, which
    # knows one that failed from one that is done: srun would kill those that still write when the first one leaves
    SRUN+=(--distribution=block --mpi=none --kill-on-bad-exit=0 --wait=0 --export=ALL)
}

# Secrets that SLURM brought here from the shell of sbatch go no further, unless MELLOW_SEND names them.
_withhold_secrets() {
    local name
    while read -r name; do
        if [[ "${name^^}" =~ $_secret && " ${MELLOW_SEND:-} " != *" $name "* && "$name" != SLURM_* ]]; then unset "$name"; fi
    done < <(compgen -e)
}

# The command of every rank, by a shell on its node that reads the environment file first.
_on_a_node() { COMMAND=("${SRUN[@]}" bash "$MELLOW_ROOT/launch/slurm/rank.sh" "$ENV_FILE" "$@"); }

# What of the environment goes on to every rank; SLURM takes all that the shell that submits has exported.
_list_variables() {
    local name
    PLAN_SHOWN=() PLAN_WITHHELD=()
    while read -r name; do
        if [[ ! "$name" =~ $_shown ]]; then continue; fi
        if [[ ! "${name^^}" =~ $_secret ]]; then
            PLAN_SHOWN+=("$(quoted "$name=${!name}")")
        elif [[ " ${MELLOW_SEND:-} " == *" $name "* ]]; then
            PLAN_SHOWN+=("$name=(not shown)")
        else
            PLAN_WITHHELD+=("$name")
        fi
    done < <(compgen -e | sort)
}

show_plan() {
    _on_a_node "$@"
    _list_variables
    if [[ -z "${SLURM_JOB_ID:-}" ]]; then
        printf 'submit with: sbatch --nodes=%s --ntasks-per-node=%s launch/slurm/%s ...\n' \
            "$NUM_NODES" "$NUM_PER_HOST" "${0##*/}"
    fi
    show_run "${COMMAND[@]}"
    printf 'and all else that is exported where sbatch is called, but for secrets and what --export leaves out\n'
}

need_a_job() {
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is no job of SLURM: submit it with" \
        "sbatch --nodes=$NUM_NODES --ntasks-per-node=$NUM_PER_HOST launch/slurm/${0##*/} ..., or add --dry-run"
    trap _pass_on USR1
    trap _be_ended TERM
}

# Makes or finds the environment once, on the first node, before every rank looks for it; says here what is wrong with it.
prepare_environment() { (use_environment) || exit $?; }

# Prints `all` where SLURM hands a signal to every process below a task, `tasks` where to the task alone.
whom_signals_reach() {
    if scontrol show config 2>/dev/null | grep -Eq '^(ProctrackType *= *proctrack/linuxproc|SignalChildrenProcesses *= *yes)'; then
        echo all
    else
        echo tasks
    fi
}

_near_the_limit=
_step=
_told=

_pass_on() {
    _near_the_limit=1
    say "SIGUSR1: the ranks are asked to save and leave"
    _tell
}

# Once: a second signal would end them at once. A trap may run between any two commands.
_tell() {
    if [[ -n "$_near_the_limit" && -n "$_step" && -z "$_told" ]]; then
        _told=1
        kill -USR1 "$_step" 2>/dev/null || true
    fi
}

# SIGTERM, which the ranks got as well. A job that has run into its time limit can be queued again even now; its ranks,
# warned before, were too slow to save, and go on from an older checkpoint.
_be_ended() {
    local reason
    reason=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%r 2>/dev/null || true)
    say "SIGTERM: SLURM ends this job (${reason:-no longer queued})"
    if [[ -n "$_near_the_limit" && "$reason" == TimeLimit ]]; then queue_again; fi
}

queue_again() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= ${MELLOW_MAX_RESTARTS:-500})); then
        say "it was started again $restarts times already (MELLOW_MAX_RESTARTS): submit it again to go on"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "job $SLURM_JOB_ID is queued again and goes on from the newest checkpoint"
    else
        say "the job cannot be queued again (the reason is above): submit it again to go on"
    fi
}

run_ranks() {
    local code=0
    if [[ -n "$_near_the_limit" ]]; then return 85; fi
    _on_a_node "$@"
    _withhold_secrets
    "${COMMAND[@]}" &
    _step=$!
    _tell
    # wait returns at every signal, so ask until srun is gone; asked again then, it still knows the exit code
    while kill -0 "$_step" 2>/dev/null; do wait "$_step" || true; done
    wait "$_step" || code=$?
    _step=
    # 138: USR1 came before train.py listened to it, in its first second; nothing is lost by that
    if [[ -n "$_near_the_limit" && $code == 138 ]]; then code=85; fi
    return "$code"
}

go_on_or_end() {
    local code=$1 state
    if [[ "$code" == 85 ]]; then
        state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true)
        if [[ "$state" == RUNNING ]]; then
            say "state saved"
            queue_again
        else
            say "state saved; SLURM has ended this job itself, and starts it again if it has requeued it"
        fi
    fi
    exit "$code"
}
