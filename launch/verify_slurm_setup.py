"""Is this SLURM cluster set up for training? Partitions, GPUs, limits, how a job is stopped and goes on, a trial job.

    python launch/verify_slurm_setup.py
    python launch/verify_slurm_setup.py --partition gpu --nodes 2 --num-per-host 4 --gpus-per-node 4
    python launch/verify_slurm_setup.py --sbatch=--account=speech --sbatch=--qos=long
    python launch/verify_slurm_setup.py --no-trial

One line a check, with the cure beside it. The trial job shows that all nodes see this clone and its environment, that
their versions and clocks agree, and that an all-reduce over all ranks comes to the right sum; it takes a minute.
Ends with 0 where nothing is in the way (a note is to be known, no fault), 1 where something is, 2 without a SLURM.
Needs nothing but Python here; on the nodes the trial uses the environment of launch/env.sh.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OK, NOTE, FAIL = "ok", "note", "FAIL"
_PROGRAMS = ("sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
_ANSWER_SECONDS = 60  # that a command of SLURM may take
_KILL_WAIT_SECONDS = 30  # SLURM's default; a step and the save of a mid-size model fit into it
_CLOCK_SECONDS = 5  # that clocks may differ by
_MEETING_SECONDS = 120.0  # until all ranks of the trial are there
_UNUSABLE = re.compile("DOWN|DRAIN|FAIL|MAINT|INVAL|UNKNOWN|NOT_RESPONDING|POWER")
_TOO_MUCH = "no node of the partition has so much: fewer --num-per-host or --gpus-per-node, or another --partition"
_NEVER_STARTS = {  # why a job waits, where waiting does not help
    "PartitionConfig": _TOO_MUCH,
    "BadConstraints": _TOO_MUCH,
    "PartitionNodeLimit": "fewer --nodes, or another --partition",
    "PartitionTimeLimit": "the partition is for shorter jobs: --sbatch=--time=00:05:00",
    "AccountNotAllowed": "name an account that may use it: --sbatch=--account=NAME",
    "QOSNotAllowed": "name a QOS that you may use: --sbatch=--qos=NAME",
}
Records = dict[str, dict[str, str]]  # by name


class Line(NamedTuple):
    """One line of the table."""

    state: str  # OK, NOTE or FAIL
    check: str
    found: str
    cure: str = ""


class NoAnswer(Exception):
    """What a command of SLURM said that failed."""


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="verify_slurm_setup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--partition", default="", help="the one to use (default: that of the cluster)")
    parser.add_argument("--nodes", type=int, default=2, help="of the trial job (default 2)")
    parser.add_argument("--num-per-host", type=int, default=1, help="processes a node in the trial (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="that the trial asks for (default 0)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=--OPTION", help="more for sbatch; repeatable"
    )
    parser.add_argument("--env-file", default=str(ROOT / "launch" / "env.sh"), help="read on the nodes")
    parser.add_argument("--no-trial", action="store_true", help="submit no job")
    parser.add_argument("--wait-seconds", type=float, default=300, help="for the trial to start and end (default 300)")
    options = parser.parse_args(words)
    for name in ("nodes", "num_per_host"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if not Path(options.env_file).is_file():
        parser.error(f"--env-file {options.env_file} is not there")
    return options


def main(words: list[str]) -> int:
    """Check, print a line each, return the exit code."""
    if words == ["--as-rank"]:
        return be_a_rank(Path(os.environ["MELLOW_TRIAL"]))
    options = parse_arguments(words)
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        what = f"no SLURM here: no {', '.join(missing)} on the PATH"
        print(f"error: {what}; run this where jobs are submitted, or load the module for it", file=sys.stderr)
        return 2
    conf = os.environ.get("SLURM_CONF")
    if conf and not Path(conf).is_file():  # SLURM looks for it for a minute
        print(
            f"error: SLURM_CONF is {conf}, which is not there: unset it, or name the cluster's slurm.conf",
            file=sys.stderr,
        )
        return 2
    failed = 0
    try:
        for line in all_checks(options):
            failed += line.state == FAIL
            cure = f"  -> {line.cure}" if line.cure else ""
            print(f"{line.state:<5} {line.check:<20} {line.found}{cure}", flush=True)
    except NoAnswer as error:
        print(
            f"error: the controller does not answer: {error}; is slurmctld up, and SLURM_CONF right?", file=sys.stderr
        )
        return 2
    print(f"{failed} in the way of training" if failed else "nothing is in the way of training")
    return 1 if failed else 0


def all_checks(options: argparse.Namespace) -> Iterator[Line]:
    """Every line of the table, as it is found."""
    config = settings(ask("scontrol", "show", "config"))
    partitions = records(ask("scontrol", "--oneliner", "show", "partition"))
    nodes = records(ask("scontrol", "--oneliner", "show", "node"))
    yield check_versions(config, nodes)
    chosen = options.partition or next((name for name in partitions if partitions[name].get("Default") == "YES"), "")
    is_there = True
    for line in check_partitions(partitions, nodes, chosen, options):
        is_there &= line.state != FAIL
        yield line
    yield from check_nodes(nodes)
    yield from check_limits()
    yield from check_stopping(config, partitions.get(chosen, {}))
    if options.no_trial:
        yield Line(NOTE, "trial job", "not submitted (--no-trial)")
    elif not is_there:
        yield Line(NOTE, "trial job", "not submitted, for what is wrong above")
    else:
        yield from run_trial(options)


def ask(*command: str) -> str:
    """What a command of SLURM prints; raises `NoAnswer`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} said nothing for {_ANSWER_SECONDS} s") from None
    if done.returncode:
        raise NoAnswer((done.stderr.strip() or f"{command[0]} ended with {done.returncode}").splitlines()[-1])
    return done.stdout


def settings(shown: str) -> dict[str, str]:
    """`Name = value` lines of `scontrol show config`."""
    return dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", shown, re.MULTILINE))


def records(shown: str) -> Records:
    """`PartitionName=a State=UP ...` lines, by the value of their first field."""
    found = {}
    for line in shown.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        if fields:
            found[next(iter(fields.values()))] = fields
    return found


def check_versions(config: Mapping[str, str], nodes: Records) -> Line:
    """Of the controller, of the commands here, of the daemons on the nodes."""
    controller = config.get("SLURM_VERSION", "unknown")
    here = ask("sbatch", "--version").split()[-1]
    there = {fields["Version"] for fields in nodes.values() if fields.get("Version")}
    found = f"{controller} on {config.get('ClusterName', 'a cluster')}"
    if {here} | there == {controller}:
        return Line(OK, "SLURM", found)
    cure = "fine while they are two releases apart at most; else update the older ones"
    return Line(NOTE, "SLURM", f"{found}, commands {here}, nodes {', '.join(sorted(there)) or 'unknown'}", cure)


def check_partitions(partitions: Records, nodes: Records, chosen: str, options: argparse.Namespace) -> Iterator[Line]:
    """A line a partition; the one that is to be used must be up, and hold what is asked for."""
    if chosen not in partitions:
        there = ", ".join(partitions) or "none"
        what = f"no partition '{chosen}'; there are: {there}" if chosen else f"no default; there are: {there}"
        yield Line(FAIL, "partition", what, "choose one: --partition NAME, and sbatch --partition=NAME")
    for name, fields in partitions.items():
        own = [node for node in nodes.values() if name in node.get("Partitions", "").split(",")]
        usable = [node for node in own if not _UNUSABLE.search(node.get("State", "UNKNOWN"))]
        kinds = sorted(
            {f"{node.get('CPUTot')} CPUs {int(node.get('RealMemory', 0)) // 1000} GB {_gres(node)}" for node in own}
        )
        limit = fields.get("MaxTime", "unknown")
        found = f"{len(usable)} of {len(own)} nodes usable, {'; '.join(kinds) or 'none'}; time limit {limit}"
        mark = " (to be used)" if name == chosen else ""
        state, cure = OK, ""
        if name != chosen:
            state = NOTE if fields.get("State") != "UP" else OK
        elif fields.get("State") != "UP":
            state, cure = (
                FAIL,
                f"it is {fields.get('State')}: choose another one with --partition, or ask when it is back",
            )
        elif len(usable) < options.nodes:
            state, cure = FAIL, f"{options.nodes} are asked for: choose another partition, or fewer with --nodes"
        elif sum(_num_gpus(node) >= options.gpus_per_node for node in usable) < options.nodes:
            state, cure = FAIL, f"{options.gpus_per_node} GPUs a node are asked for: choose another partition, or fewer"
        elif limit == "UNLIMITED" and fields.get("DefaultTime", "NONE") == "NONE":
            cure = "say sbatch --time=8:00:00 all the same: short jobs start sooner, and a stuck one ends"
        yield Line(state, "partition", f"{name}{mark}: {found}", cure)


def check_nodes(nodes: Records) -> Iterator[Line]:
    """Nodes that cannot be used, and why."""
    for name, fields in nodes.items():
        if _UNUSABLE.search(fields.get("State", "UNKNOWN")):
            reason = fields.get("Reason", "no reason is given")
            cure = f"once it is mended: scontrol update nodename={name} state=resume"
            yield Line(NOTE, "node", f"{name} is {fields.get('State')} ({reason})", cure)


def check_limits() -> Iterator[Line]:
    """Limits of the account, where the cluster keeps accounts and lets them be read."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
    if shutil.which("sacctmgr") is None:
        yield Line(NOTE, "limits", "no sacctmgr here: limits of the account cannot be read", "ask who runs the cluster")
        return
    fields = "account,qos,maxjobs,maxsubmit,maxwall,maxtres,grptres"
    try:
        shown = ask("sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", f"format={fields}")
        qos = ask(
            "sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=name,maxwall,maxtrespu,maxjobspu,preempt"
        )
    except NoAnswer:
        yield Line(OK, "limits", "the cluster keeps no accounts: only the limits of partitions hold")
        return
    if not shown.strip():
        yield Line(FAIL, "limits", f"user {user} has no account here", "ask for one; then sbatch --account=NAME")
    allowed: set[str] = set()
    for line in shown.splitlines():
        values = dict(zip(fields.split(","), line.split("|"), strict=False))
        allowed |= set(values.pop("qos", "").split(","))
        said = [f"{name} {value}" for name, value in values.items() if value and name != "account"]
        yield Line(OK, "limits", f"account {values['account']}: {', '.join(said) or 'none of its own'}")
    kinds = ("maxwall", "maxtrespu", "maxjobspu", "preempts")
    for line in qos.splitlines():
        name, *limits = line.split("|")
        said = [f"{kind} {limit}" for kind, limit in zip(kinds, limits, strict=False) if limit]
        if name in allowed and said:
            yield Line(OK, "limits", f"qos {name}: {', '.join(said)}")


def check_stopping(config: Mapping[str, str], partition: Mapping[str, str]) -> Iterator[Line]:
    """What happens to a job that is to stop: how long it has to save, and whether it starts again."""
    kill_wait = _first_number(config.get("KillWait", "30 sec"))
    if kill_wait < _KILL_WAIT_SECONDS:
        cure = "too short for a large model: save often (train.save_every_steps), or ask for 60"
        yield Line(NOTE, "KillWait", f"{kill_wait} s from SIGTERM to SIGKILL", cure)
    else:
        yield Line(
            OK, "KillWait", f"{kill_wait} s from SIGTERM to SIGKILL: what a cancelled or preempted job has to save"
        )
    over = partition.get("OverTimeLimit", "NONE")
    over = config.get("OverTimeLimit", "0 min") if over == "NONE" else f"{over} min"
    yield Line(OK, "OverTimeLimit", f"{over} past its time limit a job ends; it saves 2 to 3 minutes before the limit")
    can_requeue = config.get("JobRequeue") == "1"
    yield Line(OK, "requeue", "jobs are queued again by themselves" if can_requeue
               else "off by default; the scripts of launch/slurm ask for it (#SBATCH --requeue)")  # fmt: skip
    if _first_number(config.get("MaxArraySize", "1001")) < 2:
        yield Line(NOTE, "job arrays", "none are allowed", "build shards part by part: --num-parts N --part K")
    yield check_preemption(config, partition)
    if config.get("ProctrackType") == "proctrack/linuxproc" or config.get("SignalChildrenProcesses") == "yes":
        yield Line(OK, "signals", "reach every process of a task")
    else:
        passes = "launch/slurm/torchrun_agent.py passes them on"
        yield Line(OK, "signals", f"reach the tasks, not what they have started; {passes}")
    if "cgroup" not in config.get("TaskPlugin", ""):
        cure = "jobs of one node are not kept to their own CPUs, memory and GPUs: take whole nodes, sbatch --exclusive"
        yield Line(NOTE, "TaskPlugin", config.get("TaskPlugin", "unknown"), cure)


def check_preemption(config: Mapping[str, str], partition: Mapping[str, str]) -> Line:
    """Whether jobs are pushed out by others, and what becomes of them."""
    mode = partition.get("PreemptMode") or config.get("PreemptMode", "OFF")
    if "preempt/none" in config.get("PreemptType", "preempt/none") or mode == "OFF":
        return Line(OK, "preemption", "none")
    grace = _first_number(partition.get("GraceTime", "0"))
    found = f"{mode}, {grace} s of grace before SIGTERM counts"
    if "CANCEL" in mode:
        return Line(
            NOTE, "preemption", found, "a job that is pushed out saves and is not queued again: submit it again"
        )
    if "SUSPEND" in mode or "GANG" in mode:
        cure = "a suspended job keeps its GPUs' memory and its collectives time out: use another partition"
        return Line(NOTE, "preemption", found, cure)
    return Line(OK, "preemption", f"{found}: a job that is pushed out saves and starts again")


def run_trial(options: argparse.Namespace) -> Iterator[Line]:
    """Submit the trial job, wait for it, judge what its ranks wrote."""
    place = ROOT / ".cache"
    try:
        place.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="slurm-trial-", dir=place))
    except OSError as error:
        yield Line(
            FAIL, "trial job", f"{place} cannot be written ({error.strerror})", "have the clone in a folder of yours"
        )
        return
    try:
        (folder / "nonce").write_text(folder.name)
        job = submit_trial(options, folder)
        try:
            waited = wait_for_trial(job, options.wait_seconds)
        finally:
            subprocess.run(["scancel", job], capture_output=True, check=False)
        yield from [waited] if waited else judge_trial(options, folder, job)
    except NoAnswer as error:
        yield Line(FAIL, "trial job", f"refused: {error}", _cure_of_refusal(str(error)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def submit_trial(options: argparse.Namespace, folder: Path) -> str:
    """The number of the job; raises `NoAnswer` with why it is refused."""
    start = [ROOT / "launch/slurm/rank.sh", Path(options.env_file).resolve(), Path(__file__).resolve(), "--as-rank"]
    step = ["srun", "--mpi=none", "--export=ALL", "bash", *start]
    asked = [f"--nodes={options.nodes}", f"--ntasks-per-node={options.num_per_host}", "--time=00:10:00"]
    if options.partition:
        asked.append(f"--partition={options.partition}")
    if options.gpus_per_node:
        asked.append(f"--gpus-per-node={options.gpus_per_node}")
    os.environ["MELLOW_TRIAL"] = str(folder)
    wrapped = shlex.join(map(str, step))
    return ask("sbatch", "--parsable", "--job-name=mellow-trial", f"--output={folder}/out", f"--chdir={ROOT}",
               "--no-requeue", *asked, *options.sbatch, f"--wrap={wrapped}").strip().split(";")[0]  # fmt: skip


def wait_for_trial(job: str, seconds: float) -> Line | None:
    """None once it has ended; a line where it does not in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            state, _, reason = (
                ask("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T|%r").strip().partition("|")
            )
        except NoAnswer:  # a job that ended a while ago is not known any more
            return None
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return None
        if state == "PENDING" and reason in _NEVER_STARTS:
            return Line(FAIL, "trial job", f"it would never start ({reason})", _NEVER_STARTS[reason])
        if time.monotonic() > deadline:
            if state == "PENDING":
                cure = "more --wait-seconds where the cluster is busy (Priority, Resources), else ask for less"
            else:
                cure = "where the ranks do not find one another: look for a firewall, or set MELLOW_INTERFACE"
            return Line(FAIL, "trial job", f"still {state} ({reason}) after {seconds:.0f} s", cure)
        time.sleep(0.5)


def judge_trial(options: argparse.Namespace, folder: Path, job: str) -> Iterator[Line]:
    """What the ranks wrote: who is missing, what differs, the sum."""
    size = options.nodes * options.num_per_host
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
    out = folder / "out"
    if not out.exists():
        cure = "the nodes cannot write there: have the clone on a file system that all share"
        yield Line(FAIL, "shared folder", f"job {job} left nothing in {folder}", cure)
        return
    if len(ranks) < size or any(rank["nonce"] != folder.name for rank in ranks):
        said = [line for line in out.read_text(errors="replace").splitlines() if line.strip()]
        told = next((line for line in said if "error" in line.lower()), said[-1] if said else "nothing")
        yield Line(
            FAIL,
            "trial job",
            f"{len(ranks)} of {size} ranks came to an end; it said: {told[:300]}",
            _cure_of_rank(told),
        )
        return
    yield Line(OK, "shared folder", f"all nodes see {ROOT}")
    for what, name in (("Python", "python"), ("torch", "torch"), ("environment", "prefix")):
        values = {rank[name] for rank in ranks}
        if len(values) > 1:
            cure = "name one environment for all nodes: MELLOW_VENV or MELLOW_CONDA (launch/env.local.sh)"
            yield Line(FAIL, what, f"differs: {', '.join(sorted(values))}", cure)
        else:
            yield Line(OK, what, next(iter(values)))
    apart = max(rank["time"] for rank in ranks) - min(rank["time"] for rank in ranks)
    if apart > _CLOCK_SECONDS:
        yield Line(NOTE, "clocks", f"{apart:.0f} s apart, or nodes that start so late", "have them set by NTP")
    first = ranks[0]
    where = f"{len({rank['host'] for rank in ranks})} nodes, {first['devices']} GPUs on the first, {first['backend']}"
    if any(rank["sum"] != size * (size + 1) / 2 for rank in ranks):
        yield Line(
            FAIL,
            "all-reduce",
            f"wrong sums on {where}",
            "two jobs on one port, or a broken network: look at NCCL_DEBUG=INFO",
        )
    elif options.gpus_per_node and first["backend"] != "nccl":
        yield Line(
            FAIL, "all-reduce", f"{size} ranks on {where}", "the ranks see no GPU: a torch without CUDA, or no driver"
        )
    else:
        slowest = max(rank["milliseconds"] for rank in ranks)
        yield Line(
            OK, "all-reduce", f"{size} ranks on {where}, met at {first['address']}: right, {slowest:.1f} ms for 1 MB"
        )


def be_a_rank(folder: Path) -> int:
    """A task of the trial: meet the others, add up, write what was seen into `folder`."""
    nonce = (folder / "nonce").read_text()
    import torch
    import torch.distributed as dist

    from mellow_ds.engine.process_group import start_process_group, stop_process_group
    from mellow_ds.errors import MellowError
    from mellow_ds.world import World

    try:
        world = World.from_env()
        address, port = world.rendezvous(os.environ)
        device = start_process_group(world, "", _MEETING_SECONDS)
    except MellowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    dist.barrier()
    now = time.time()  # all ranks leave the barrier together
    numbers = torch.full((1 << 18,), float(world.rank + 1), device=device)
    dist.all_reduce(numbers.clone())  # the first one connects
    started = time.perf_counter()
    dist.all_reduce(numbers)
    total = float(numbers.mean())  # waits for it
    found: dict[str, Any] = {
        "sum": total, "milliseconds": 1000 * (time.perf_counter() - started), "nonce": nonce, "time": now,
        "host": os.uname().nodename, "python": sys.version.split()[0], "torch": torch.__version__, "prefix": sys.prefix,
        "devices": torch.cuda.device_count(), "backend": dist.get_backend(), "address": f"{address}:{port}",
    }  # fmt: skip
    (folder / f"rank-{world.rank:05d}.json").write_text(json.dumps(found))
    dist.barrier()
    stop_process_group()
    return 0


def _gres(node: Mapping[str, str]) -> str:
    gres = node.get("Gres", "(null)")
    return "no GPUs" if gres in ("(null)", "") else gres


def _num_gpus(node: Mapping[str, str]) -> int:
    """Of `gpu:2` or `gpu:a100:4(S:0-1),nvme:1`."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", node.get("Gres", "")))


def _first_number(text: str) -> int:
    found = re.search(r"\d+", text)
    return int(found.group()) if found else 0


def _cure_of_refusal(said: str) -> str:
    """For what sbatch says."""
    cures = {
        "account": "name one that you may use: --sbatch=--account=NAME",
        "partition": "choose another one: --partition NAME",
        "qos": "name one that you may use: --sbatch=--qos=NAME",
        "time limit": "the partition is for shorter jobs: --sbatch=--time=00:05:00",
        "memory": "ask for less: --sbatch=--mem=4G",
        "node configuration": _TOO_MUCH,
        "node count": "fewer --nodes, or another --partition",
    }
    return next(
        (cure for words, cure in cures.items() if words in said.lower()), "add what it wants with --sbatch=--OPTION"
    )


def _cure_of_rank(said: str) -> str:
    """For what a rank, or srun, says."""
    cures = {
        "no such file": "the nodes do not see the clone at this path: have it on a file system that all share",
        "cannot open": "the nodes do not see the clone at this path: have it on a file system that all share",
        "modulenotfound": "the nodes use another environment: set MELLOW_VENV or MELLOW_CONDA (launch/env.local.sh)",
        "set up .venv": "make the environment here first: bash launch/setup_env.sh",
        "cpu": "ask for CPUs as well: --sbatch=--cpus-per-task=4",
        "timed out": "the nodes do not reach one another: look for a firewall, or set MELLOW_INTERFACE",
        "connect": "the nodes do not reach one another: look for a firewall, or set MELLOW_INTERFACE",
    }
    return next((cure for words, cure in cures.items() if words in said.lower()), "see docs/slurm_setup.md")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
