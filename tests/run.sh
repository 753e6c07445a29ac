#!/usr/bin/env bash
# Sets up the test environment, then runs the whole suite:
#
#   bash tests/run.sh [pytest arguments]
#
# Needs no GPU and, once set up, no network. The last line is pytest's own summary, the exit code pytest's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -t 0 ] || exec </dev/null # the same with a pipe, a file or nothing at all as standard input

note() { printf '[tests] %s\n' "$*" >&2; }

# What the tests of pdsh, ssh, network namespaces, SLURM, MPI, environment modules and caption metrics need from the
# system; they skip, with a reason, where it is not there.
missing_debian_packages() {
    command -v pdsh >/dev/null || echo pdsh
    command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || echo openssh-server
    command -v ssh >/dev/null || echo openssh-client
    command -v ip >/dev/null || [ -x /usr/sbin/ip ] || echo iproute2
    command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || echo slurm-wlm
    command -v munged >/dev/null || [ -x /usr/sbin/munged ] || echo munge
    command -v mpirun >/dev/null || echo openmpi-bin
    command -v mpiexec.hydra >/dev/null || echo mpich
    [ -e /etc/profile.d/modules.sh ] || echo environment-modules
    command -v java >/dev/null || echo default-jre-headless
}

install_debian_packages() (
    packages=$(missing_debian_packages | tr '\n' ' ')
    [ -n "$packages" ] || exit 0
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        note "without ${packages}some tests are skipped (as root: apt-get install $packages)"
        exit 0
    fi
    note "installing ${packages}with apt-get"
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then # a test run starts no ssh server and no SLURM on this machine
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    get() { timeout 600 apt-get -qq -o DPkg::Lock::Timeout=120 install -y --no-install-recommends $packages; }
    { get || { timeout 300 apt-get -qq update && get; }; } </dev/null >/dev/null 2>&1 ||
        note "apt-get could not install ${packages}: the tests that need them are skipped"
)

install_debian_packages
MELLOW_EXTRAS="test lora gguf smollm2" source launch/env.sh

cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 3 ? cores / 2 : 1))} # many tests run two ranks side by side
export PYTHONPATH=$MELLOW_ROOT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# a file of tests at a time to each of two workers, since much of a test is waiting; 0: all in one process
workers=${MELLOW_TEST_WORKERS:-2}
note "pytest in $workers worker(s), with $OMP_NUM_THREADS thread(s) a process on $cores cores"
exec "$MELLOW_PYTHON" -m pytest -m "not gpu" -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
