"""The pages on launching, walked on real hosts: every command that they show is typed, and does what the page says."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.runs import ROOT
from tests.cluster.hosts import NODES
from tests.cluster.reader import LAST_STEP, Reader
from tests.cluster.runs import START_SECONDS, losses, wrote_steps
from tests.cluster.slurm import Job, Slurm
from tests.docs.commands import fenced_commands, mentioned_commands

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2400)]  # many lines, each a start
LINE_OF_A_PLACE = re.compile("(NODE_RANK|RANK)=")  # typed on each host


@pytest.fixture
def reader(slurm: Slurm, corpus: Path, tmp_path: Path) -> Iterator[Reader]:
    yield Reader(slurm, corpus, tmp_path)
    slurm.run("scancel", "--me")


def page(name: str) -> Path:
    return ROOT / "docs" / f"{name}.md"


def trains(line: str) -> bool:
    """Whether a line trains to the end, by whatever."""
    starts = re.search(r"\btrain\.(py|sbatch)\b|\blaunch/(ssh|deepspeed)/", line)
    return starts is not None and "--dry-run" not in line and "--mode" not in line


def walk(reader: Reader, line: str, losses_of_one_host: list[float]) -> str:
    """Type a line; what it said. Where it trains, it trains as one host does."""
    if trains(line):
        reader.forget_runs()
    if line.startswith("sbatch "):
        job = submitted(reader, line)
        assert job.end(START_SECONDS) == ("COMPLETED", 0), job.said()[-3000:]
        said = job.said()
    else:
        done = reader.type(f"salloc --nodes=2 {line}" if line.startswith("srun ") else line)  # "inside an allocation"
        said = done.stdout + done.stderr
    if trains(line):
        assert_trained(reader, losses_of_one_host)
    return said


def submitted(reader: Reader, line: str, *more: object) -> Job:
    number = re.search(r"Submitted batch job (\d+)", reader.type(line, *more).stdout)
    assert number is not None
    return Job(reader.slurm, number.group(1))


def assert_trained(reader: Reader, losses_of_one_host: list[float]) -> None:
    """On two ranks as one host does; on one, it is the same run but for what dropout draws on each rank."""
    (run,) = reader.runs.iterdir()
    is_alone = "on 1 rank" in (run / "log.txt").read_text()
    assert losses(run) == pytest.approx(losses_of_one_host, rel=1e-3 if is_alone else 1e-6)


def test_the_distributed_quick_start(reader: Reader, losses_of_one_host: list[float]) -> None:
    said = [walk(reader, line, losses_of_one_host) for line in fenced_commands(page("distributed"))]
    assert len(said) == 10
    assert (reader.runs / "mine" / "evaluation" / LAST_STEP / "results.json").is_file()
    assert "caption" in said[-1]  # of the report


def lines_of_the_guide() -> list[str]:
    """What the page before it has shown, in the same run folder or another, is not typed again."""
    lines = dict.fromkeys(fenced_commands(page("launching")) + mentioned_commands(page("launching")))
    lines.pop("mellow-ds launch")  # the command as such
    known = {line.replace(" --save-dir runs/mine", "") for line in fenced_commands(page("distributed"))}
    return [line for line in lines if line.replace(" --save-dir runs/mine", "") not in known]


@pytest.mark.parametrize("third", range(3))
def test_the_launch_guide(reader: Reader, losses_of_one_host: list[float], third: int) -> None:
    lines = [line for line in lines_of_the_guide() if not LINE_OF_A_PLACE.match(line)]
    assert len(lines) > 10
    for line in lines[third::3]:
        walk(reader, line, losses_of_one_host)


def test_the_launch_guide_by_hand(reader: Reader, losses_of_one_host: list[float]) -> None:
    places = [line for line in lines_of_the_guide() if LINE_OF_A_PLACE.match(line)]
    assert len(places) == 4
    for pair in (places[:2], places[2:]):
        reader.forget_runs()
        started = [reader.start(line, host=host) for line, host in zip(pair, NODES, strict=True)]
        said = [process.communicate(timeout=START_SECONDS) for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        assert_trained(reader, losses_of_one_host)


def test_slurm_in_five_commands(reader: Reader, losses_of_one_host: list[float]) -> None:
    (reader.folder / "shards" / "train").symlink_to(reader.folder / "SHARDS")
    lines = fenced_commands(page("slurm"))
    train = next(line for line in lines if "launch/slurm/train.sbatch" in line)
    ends = {  # of a job that trains on and on: its state, and words in its log
        "scancel JOB": ("CANCELLED", "SLURM has ended this job itself"),
        "scancel --signal=INT JOB": ("FAILED", ""),
        "scancel --batch --signal=USR1 JOB": ("PENDING", "is queued again and goes on from the newest checkpoint"),
        "scontrol requeue JOB": ("PENDING", "DUE TO JOB REQUEUE"),
    }
    for line in lines:
        if line.startswith("tail -f"):
            process = reader.start(line)
            assert process.stdout is not None
            assert process.stdout.readline()
            process.kill()
            process.communicate()
        elif " JOB" in line:
            reader.forget_runs()
            state, words = ends.pop(line)
            job = submitted(reader, train, "--train.max_steps", 100_000, "--train.save_every_steps", 0)
            job.wait_for(lambda: wrote_steps(reader.runs / "mine", 2), START_SECONDS)
            reader.type(line.replace("JOB", job.number))
            job.wait_for(lambda job=job, state=state: job.state == state, 60)
            job.wait_for(lambda job=job, words=words: words in job.said(), 60)
            assert list((reader.runs / "mine" / "checkpoints").glob("step-*")), job.said()[-3000:]
            reader.slurm.run("scancel", job.number)
        else:
            said = walk(reader, line, losses_of_one_host)
            if "debug.sbatch" in line:
                assert "0: node1 | 1: node2" in said
            if "evaluate.sbatch" in line:
                assert (reader.runs / "mine" / "evaluation" / LAST_STEP / "results.json").is_file()
    assert not ends


def test_slurm_set_up(reader: Reader) -> None:
    for line in fenced_commands(page("slurm_setup")):
        if line.startswith("sbatch"):
            job = submitted(reader, line)
            job.wait_for(lambda job=job: not reader.slurm.run("squeue", "-h", "-j", job.number).stdout.strip(), 60)
        else:
            said = reader.type(line).stdout
            if "verify_slurm_setup" in line:
                assert said.endswith("nothing is in the way of training\n")
    assert (reader.folder / "shards" / "train" / "manifest.json").is_file()
