"""How a corpus is best cut into shards for a cluster, and whether reading them keeps its GPUs busy: arithmetic alone.

The model, in the words of the order (data/order.py): an epoch is cut into `order_runs` C equal runs, each read front to
back through windows of `shuffle_window` w shards, and a global batch of G takes its share of each. So a step touches
about min(C, G) runs, and a node its share of them: it reads in C / nodes windows at a time, which is what must be on
its disk (remote shards) or in its page cache (local ones). A shard is downloaded whole, once an epoch and node.

Rates of decoding are measured ones (plan_rates.py); benchmarks/plan_check.py holds the model against the real stream.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mellow_ds.config.schema import DataConfig
from mellow_ds.errors import PackingError
from mellow_ds.packing.planning import rates

MEGABYTE = 1e6
GIGABYTE = 1e9
SHARD_MEGABYTES = (256, 128, 64, 32, 16)  # sizes to choose from, best first
_CODECS = tuple(rates.EXAMPLES_PER_CPU_SECOND)
_AHEAD_PART = 0.5  # of the cache that downloads ahead may take (data/reader.py)
_COMFORT = 1.2  # times what the GPUs take from which on nothing need be said


@dataclass(frozen=True)
class CorpusSize:
    """What is to be read."""

    num_clips: int
    mean_seconds: float  # of a clip
    questions_per_clip: float
    clips_per_question: float = 1.2  # ReasonAQA: 1.21
    sample_rate: int = DataConfig.sampling_rate  # Hz
    replication: float = 1.05  # stored clips a clip; ReasonAQA's graph stays under 1.25
    stored_bytes: float = 0  # of existing shards; 0: estimated
    num_shards: int = 0  # of existing shards; 0: to be chosen

    def __post_init__(self) -> None:
        _above_zero(self, "num_clips", "mean_seconds", "questions_per_clip", "sample_rate")
        if self.clips_per_question < 1 or self.replication < 1:
            raise PackingError("--clips-per-question and --replication are 1 or more")

    @property
    def num_questions(self) -> int:
        """Examples of an epoch."""
        return max(round(self.num_clips * self.questions_per_clip), 1)


@dataclass(frozen=True)
class Cluster:
    """Who reads."""

    nodes: int = 1
    gpus: int = 1  # a node
    workers: int = 2  # loader processes a GPU
    cores: int = 0  # a node; 0: as many as are needed
    disk: float = 1_000.0  # MB/s a node, of scattered reads of half a megabyte
    network: float = 0.0  # MB/s a node from where the shards are; 0: they are on the node's disk
    cache: float = DataConfig.cache_gigabytes  # GB a node for remote shards (data.cache_gigabytes)
    memory: float = 64.0  # GB a node that are left for the page cache

    def __post_init__(self) -> None:
        _above_zero(self, "nodes", "gpus", "disk")
        for name in ("workers", "cores", "network", "cache", "memory"):
            if getattr(self, name) < 0:
                raise PackingError(f"--{name} is {getattr(self, name)}; it must be 0 or more")

    @property
    def world(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Demand:
    """How it is read, and how fast."""

    examples_per_second: float  # a GPU
    batch_size: int = 4  # examples of a micro-batch
    accumulation: int = 1  # micro-batches of a step
    codec: str = "flac"
    examples_per_cpu_second: float = 0.0  # of this corpus; 0: by codec, as measured
    segment_seconds: float = DataConfig.segment_seconds
    order_runs: int = DataConfig.order_runs
    shuffle_window: int = DataConfig.shuffle_window
    grouped: int = 1  # data.questions_per_clip
    crops: int = 1  # stored crops a clip, with features
    shard_megabytes: float = 0.0  # 0: to be chosen
    first_batch_seconds: float = 60.0  # that a first batch may take to arrive, when the shard size is chosen

    def __post_init__(self) -> None:
        _above_zero(self, "examples_per_second", "batch_size", "accumulation", "segment_seconds")
        _above_zero(self, "order_runs", "shuffle_window", "grouped", "crops", "first_batch_seconds")
        if self.codec not in _CODECS:
            raise PackingError(f"--codec is '{self.codec}'; choose one of {', '.join(_CODECS)}")
        for name in ("examples_per_cpu_second", "shard_megabytes"):
            if getattr(self, name) < 0:
                raise PackingError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True)
class Supply:
    """What one part of the way can give."""

    name: str  # "loader processes", "disk" or "network"
    examples_per_second: float  # a GPU
    meaning: str  # what it is made of, in words


@dataclass(frozen=True)
class Plan:
    """What follows."""

    corpus: CorpusSize
    cluster: Cluster
    demand: Demand
    total_bytes: float
    shard_bytes: float
    num_shards: int
    working_shards: int  # that a node reads in at a time
    first_shards: int  # that a node's first step touches
    cpu_seconds: float  # of an example in a loader process, its way to the trainer included
    first_batch: dict[str, float]  # seconds by what they are spent on
    cache_bytes: float  # a node: the least for remote shards
    epoch_download_bytes: float  # a node; 0 for local shards
    supplies: tuple[Supply, ...]
    advice: tuple[str, ...] = field(default=())

    @property
    def bottleneck(self) -> Supply:
        """The part that gives least."""
        return min(self.supplies, key=lambda supply: supply.examples_per_second)

    @property
    def busy_share(self) -> float:
        """Share of the time that the GPUs compute, 0 to 1."""
        wanted, given = self.demand.examples_per_second, self.bottleneck.examples_per_second
        if not self.cluster.workers:  # loading and computing take turns
            return 1 / (1 + wanted / given)
        return min(1.0, given / wanted)

    @property
    def first_batch_seconds(self) -> float:
        """From the start of the stream to the first step's batches."""
        return sum(self.first_batch.values())


def make_plan(corpus: CorpusSize, cluster: Cluster, demand: Demand) -> Plan:
    """The plan: shards of the size asked for, of existing ones, or of the largest size that serves."""
    total = total_bytes(corpus, demand)
    if demand.shard_megabytes:
        sizes: tuple[float, ...] = (demand.shard_megabytes * MEGABYTE,)
    elif corpus.num_shards:
        sizes = (total / corpus.num_shards,)
    else:
        sizes = tuple(size * MEGABYTE for size in SHARD_MEGABYTES)
    plans = [_plan_with(corpus, cluster, demand, total, size) for size in sizes]
    chosen = next((plan for plan in plans if _serves(plan)), plans[-1])
    return replace(chosen, advice=tuple(_advise(chosen)))


def clip_bytes(corpus: CorpusSize, demand: Demand) -> float:
    """Bytes of a stored clip, its questions included."""
    if corpus.stored_bytes:
        return corpus.stored_bytes / (corpus.num_clips * corpus.replication)
    texts = rates.SAMPLE_BYTES + rates.QUESTION_BYTES * corpus.questions_per_clip
    if demand.codec == "features":
        return texts + rates.FEATURE_CROP_BYTES * demand.crops
    return texts + 2 * corpus.sample_rate * corpus.mean_seconds * rates.BYTES_OF_PCM[demand.codec]


def total_bytes(corpus: CorpusSize, demand: Demand) -> float:
    """Bytes of all shards."""
    return corpus.stored_bytes or clip_bytes(corpus, demand) * corpus.num_clips * corpus.replication


def cpu_seconds(corpus: CorpusSize, demand: Demand) -> float:
    """CPU time of one example from shard to batch."""
    if demand.examples_per_cpu_second:
        return 1 / demand.examples_per_cpu_second
    clips = corpus.clips_per_question / min(demand.grouped, demand.batch_size, max(corpus.questions_per_clip, 1))
    reference = 1 / rates.EXAMPLES_PER_CPU_SECOND[demand.codec]
    if demand.codec == "features":  # a crop costs the same, however long
        return rates.TEXT_SECONDS + reference * clips / rates.REFERENCE_CLIPS
    seconds = min(corpus.mean_seconds, demand.segment_seconds)
    return rates.TEXT_SECONDS + reference * clips * seconds / rates.REFERENCE_CLIP_SECONDS


def transfer_seconds(corpus: CorpusSize, demand: Demand) -> float:
    """CPU time that an example takes on its way from a loader process to the trainer; its clips are not compressed."""
    shared = min(demand.grouped, demand.batch_size, max(corpus.questions_per_clip, 1))
    window = rates.FEATURE_CROP_BYTES if demand.codec == "features" else 2 * demand.segment_seconds * corpus.sample_rate
    megabytes = corpus.clips_per_question / shared * window / MEGABYTE
    return megabytes * rates.TRANSFER_SECONDS_A_MEGABYTE + rates.TRANSFER_SECONDS_A_BATCH / demand.batch_size


def _plan_with(corpus: CorpusSize, cluster: Cluster, demand: Demand, total: float, shard_bytes: float) -> Plan:
    num_shards = max(math.ceil(total / shard_bytes), 1)
    shard_bytes = total / num_shards
    working = _working_shards(num_shards, cluster, demand)
    first = _first_shards(num_shards, cluster, demand)
    cost = cpu_seconds(corpus, demand) + (transfer_seconds(corpus, demand) if cluster.workers else 0.0)
    working_bytes = working * shard_bytes
    download = (total / cluster.nodes) * (1 + (cluster.nodes - 1) / num_shards) if cluster.network else 0.0
    return Plan(
        corpus=corpus,
        cluster=cluster,
        demand=demand,
        total_bytes=total,
        shard_bytes=shard_bytes,
        num_shards=num_shards,
        working_shards=working,
        first_shards=first,
        cpu_seconds=cost,
        first_batch=_first_batch(corpus, cluster, demand, num_shards, first, shard_bytes, cost),
        cache_bytes=min(working_bytes / _AHEAD_PART, total) if cluster.network else 0.0,
        epoch_download_bytes=download,
        supplies=_supplies(corpus, cluster, demand, total, working_bytes, cost, download),
    )


def _working_shards(num_shards: int, cluster: Cluster, demand: Demand) -> int:
    """Shards that a node reads in at a time."""
    global_batch = cluster.world * demand.batch_size * demand.accumulation
    windows = math.ceil(num_shards / demand.shuffle_window)
    # a step takes neighbouring runs, and the next step the next ones where it is smaller than the number of runs
    groups = math.ceil(demand.order_runs / min(global_batch, demand.order_runs))
    runs = _runs_of_a_step(cluster, demand) + (cluster.nodes > 1)  # a node's slice begins and ends inside a run
    of_node = groups * math.ceil(_windows_of(runs, windows, demand))
    return min(min(of_node, windows) * demand.shuffle_window, num_shards)


def _first_shards(num_shards: int, cluster: Cluster, demand: Demand) -> int:
    """Different shards that the examples of a node's first step stand in, as is to be expected of a random draw."""
    examples = cluster.gpus * demand.batch_size * demand.accumulation
    windows = math.ceil(num_shards / demand.shuffle_window)
    width = num_shards / windows
    touched = _windows_of(_runs_of_a_step(cluster, demand), windows, demand)
    expected = touched * width * (1 - (1 - 1 / width) ** (examples / touched))
    return max(min(math.ceil(expected), examples, num_shards), 1)


def _runs_of_a_step(cluster: Cluster, demand: Demand) -> float:
    """Runs that a node takes its examples of one step from."""
    global_batch = cluster.world * demand.batch_size * demand.accumulation
    return max(min(demand.order_runs, global_batch) / cluster.nodes, 1.0)


def _windows_of(runs: float, windows: int, demand: Demand) -> float:
    """Windows that neighbouring runs read in at a time: one each, or fewer where several runs share a window."""
    return min(runs, runs * windows / demand.order_runs + 1 if windows < demand.order_runs else runs, windows)


def _first_batch(
    corpus: CorpusSize,
    cluster: Cluster,
    demand: Demand,
    num_shards: int,
    first_shards: int,
    shard_bytes: float,
    cost: float,
) -> dict[str, float]:
    """Seconds from the start of the stream to the batches of the first step, on the slowest rank."""
    rounds = math.ceil(demand.accumulation / max(cluster.workers, 1))  # micro-batches of a loader process
    clips = corpus.clips_per_question * clip_bytes(corpus, demand)
    step_bytes = cluster.gpus * demand.batch_size * demand.accumulation * clips
    return {
        "reading the manifest": num_shards * rates.SHARD_START_SECONDS,
        "starting loader processes": rates.WORKER_START_SECONDS if cluster.workers else 0.0,
        "shards arriving": first_shards * shard_bytes / (cluster.network * MEGABYTE) if cluster.network else 0.0,
        "reading indexes": first_shards / cluster.gpus * rates.INDEX_SECONDS,
        "reading samples": step_bytes / (cluster.disk * MEGABYTE),
        "preparing the batches": rounds * demand.batch_size * cost,
    }


def _supplies(
    corpus: CorpusSize,
    cluster: Cluster,
    demand: Demand,
    total: float,
    working_bytes: float,
    cost: float,
    download: float,
) -> tuple[Supply, ...]:
    """What each part of the way can give a GPU."""
    at_work = float(max(cluster.workers, 1))
    if cluster.cores and cluster.workers:
        at_work = min(at_work, max((cluster.cores - cluster.gpus) / cluster.gpus, 0.5))  # a core for each trainer
    supplies = [
        Supply("loader processes", at_work / cost, f"{at_work:g} at work a GPU, {1 / cost:,.0f} examples/s each")
    ]
    once = total / corpus.num_questions
    shared = min(demand.grouped, demand.batch_size, max(corpus.questions_per_clip, 1))
    again = corpus.clips_per_question * clip_bytes(corpus, demand) / shared
    in_memory = working_bytes <= cluster.memory * GIGABYTE
    read = min(once, again) if in_memory else again
    why = "a window is read once into memory" if in_memory else "its windows do not fit the memory: each clip anew"
    disk = cluster.disk * MEGABYTE / read / cluster.gpus
    supplies.append(Supply("disk", disk, f"{read / 1e3:,.0f} kB an example: {why}"))
    if download:
        bytes_each = download * cluster.nodes / corpus.num_questions
        given = cluster.network * MEGABYTE / bytes_each / cluster.gpus
        fits = total <= cluster.cache * GIGABYTE or not cluster.cache
        when = "in the first epoch alone" if fits else "each shard once an epoch"
        supplies.append(Supply("network", given, f"{bytes_each / 1e3:,.0f} kB an example: {when}"))
    return tuple(supplies)


def _serves(plan: Plan) -> bool:
    """Whether shards of this size do: the first batch arrives in time, each node has windows of its own, all fit."""
    windows = plan.num_shards / plan.demand.shuffle_window
    if not plan.cluster.network:
        return windows >= plan.cluster.nodes
    return (
        windows >= plan.cluster.nodes
        and plan.first_batch["shards arriving"] <= plan.demand.first_batch_seconds
        and plan.cache_bytes <= max(plan.cluster.cache * GIGABYTE, plan.total_bytes * (plan.cluster.cache == 0))
    )


def _advise(plan: Plan) -> list[str]:
    """What to change, the most telling first."""
    cluster, demand, worst = plan.cluster, plan.demand, plan.bottleneck
    advice = []
    if worst.examples_per_second < _COMFORT * demand.examples_per_second or not cluster.workers:
        advice += {"loader processes": _advise_loaders, "disk": _advise_disk, "network": _advise_network}[worst.name](
            plan
        )
    if cluster.network:
        if plan.first_batch["shards arriving"] > demand.first_batch_seconds:
            advice.append(
                f"the first batch waits for {plan.first_shards} shards a node: fewer data.order_runs, smaller shards, "
                "or copy the shards to the nodes before the run"
            )
        if 0 < cluster.cache * GIGABYTE < plan.cache_bytes:
            advice.append(
                f"the cache holds {cluster.cache:,.0f} GB, but {plan.cache_bytes / GIGABYTE:,.0f} GB are in use at a "
                "time: raise data.cache_gigabytes, or lower data.shuffle_window or data.order_runs"
            )
    if math.ceil(plan.num_shards / demand.shuffle_window) < cluster.nodes:
        advice.append("there are fewer windows than nodes, so that nodes read the same shards: make smaller shards")
    return advice


def _advise_loaders(plan: Plan) -> list[str]:
    cluster, demand = plan.cluster, plan.demand
    wanted = demand.examples_per_second * _COMFORT
    needed = max(math.ceil(wanted * plan.cpu_seconds), 1)
    room = max((cluster.cores - cluster.gpus) // cluster.gpus, 0) if cluster.cores else math.inf
    if needed <= room:
        if needed <= cluster.workers:
            return []
        return [f"--train.num_workers {needed} ({needed * cluster.gpus} cores a node for loading)"]
    advice = []
    for codec in ("pcm", "features"):
        if rates.EXAMPLES_PER_CPU_SECOND[codec] > rates.EXAMPLES_PER_CPU_SECOND[demand.codec]:
            other = replace(demand, codec=codec, examples_per_cpu_second=0)
            corpus = replace(plan.corpus, stored_bytes=0)
            each = cpu_seconds(corpus, other) + transfer_seconds(corpus, other)
            processes = max(math.ceil(wanted * each), 1)
            size = total_bytes(corpus, other) / GIGABYTE
            advice.append(f"--codec {codec}: {_processes(processes)} a GPU will do; the shards take {size:,.1f} GB")
    if demand.grouped == 1 and demand.codec != "features":
        advice.append("data.questions_per_clip 4: a micro-batch then decodes a clip once for 4 questions")
    advice.append(f"more cores: {_processes(needed)} a GPU would do with {demand.codec}; there is room for {room:g}")
    return advice


def _processes(count: int) -> str:
    return f"{count} loader process{'' if count == 1 else 'es'}"


def _advise_disk(plan: Plan) -> list[str]:
    cluster, demand = plan.cluster, plan.demand
    factor = _COMFORT * demand.examples_per_second / plan.bottleneck.examples_per_second
    advice = [f"a disk of {cluster.disk * factor:,.0f} MB/s a node"]
    working = plan.working_shards * plan.shard_bytes / GIGABYTE
    if working > cluster.memory:
        advice.append(f"{working:,.0f} GB of memory a node for the page cache, or a smaller data.shuffle_window")
    if demand.codec == "pcm":
        advice.append("--codec flac or features: fewer bytes")
    return advice


def _advise_network(plan: Plan) -> list[str]:
    factor = _COMFORT * plan.demand.examples_per_second / plan.bottleneck.examples_per_second
    total = plan.total_bytes / GIGABYTE
    return [
        f"{plan.cluster.network * factor:,.0f} MB/s a node",
        f"data.cache_gigabytes {math.ceil(total)}: all shards stay on each node, and only the first epoch downloads",
        *(["--codec flac or features: fewer bytes"] if plan.demand.codec == "pcm" else []),
    ]


def corpus_of_folder(folder: str | Path, clips_per_question: float = 0) -> tuple[CorpusSize, str]:
    """(size of an existing shard folder, its codec). Clips a question are those of its first samples, if not given.

    Raises `ShardError` where manifest or an index cannot be used.
    """
    from itertools import islice

    from mellow_ds.packing.inspection.summary import sample_infos
    from mellow_ds.shard_format import read_index, read_manifest

    manifest = read_manifest(folder)
    seconds: dict[bytes, float] = {}
    for shard in manifest.shards:
        rows = read_index(folder, shard)
        frames = (rows["num_frames"] / manifest.sample_rate).tolist()
        seconds.update(zip(rows["key"].tolist(), frames, strict=True))
    if not clips_per_question and manifest.shards:
        infos = islice(sample_infos(Path(folder), manifest.shards[0]), 500)
        counts = [len(question.clips) for info in infos for question in info.questions]
        clips_per_question = sum(counts) / max(len(counts), 1)
    num_clips = max(len(seconds), 1)
    size = CorpusSize(
        num_clips=num_clips,
        mean_seconds=sum(seconds.values()) / num_clips,
        questions_per_clip=manifest.num_questions / num_clips,
        clips_per_question=max(clips_per_question, 1),
        sample_rate=manifest.sample_rate,
        replication=max(sum(shard.num_samples for shard in manifest.shards) / num_clips, 1),
        stored_bytes=float(sum(shard.num_bytes for shard in manifest.shards)),
        num_shards=len(manifest.shards),
    )
    return size, manifest.codec


_OPTIONS = {  # fields whose option has another name
    "num_clips": "clips",
    "mean_seconds": "seconds",
    "questions_per_clip": "questions",
    "examples_per_second": "consumes",
}


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            option = _OPTIONS.get(name, name.replace("_", "-"))
            raise PackingError(f"--{option} is {getattr(config, name)}; it must be above 0")
