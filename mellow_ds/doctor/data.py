"""Findings about shards against readers: numbers of shards, workers and cores, order, cache, evaluation shards."""

import math

from mellow_ds.doctor.facts import Case, ShardFacts
from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.doctor.memory import GIGABYTE, readable

_LARGE_SHARD_BYTES = 2 * GIGABYTE
_AHEAD_SHARDS = 2  # of each rank: one being read, one on its way


def check_data(case: Case) -> list[Finding]:
    """What the manifests tell."""
    found = [*_evaluation(case), *_cores(case)]
    if case.shards is not None:
        found += [*_readers(case, case.shards), *_cache(case, case.shards)]
    return found


def _readers(case: Case, shards: ShardFacts) -> list[Finding]:
    train, data, world = case.config.train, case.config.data, case.machine.world
    readers = world * max(train.num_workers, 1)
    found = []
    if shards.num_shards < readers:
        found.append(
            Finding(
                # a rank reads samples by offset, so no reader stays without work: what shards bound is locality
                SLOW if shards.num_shards < world else NOTE, "fewer-shards-than-readers",
                f"{shards.num_shards} shards for {readers} readers ({world} ranks x {max(train.num_workers, 1)} loader "
                "processes)",
                "several readers share a shard: each example is still read once, but remote shards are downloaded by "
                "every host that needs a part, and disks seek",
                f"pack into {readers} shards or more (mellow-shards build with smaller --shard-megabytes), or lower "
                "train.num_workers",
            )
        )  # fmt: skip
    if data.shuffle and 1 < shards.num_shards <= data.shuffle_window:
        found.append(
            Finding(
                NOTE, "window-holds-all",
                f"data.shuffle_window {data.shuffle_window} holds all {shards.num_shards} shards",
                "examples are permuted over the whole corpus: the best order, and every rank touches every shard",
                "nothing to do while the shards are on local disks; with remote ones lower it",
            )
        )  # fmt: skip
    largest = max(shards.shard_bytes, default=0)
    if largest > _LARGE_SHARD_BYTES and shards.remote_bytes:
        found.append(
            Finding(
                SLOW, "remote-shard-large", f"a remote shard has {readable(largest)}",
                "the first step waits until the first shards are there as a whole",
                "pack into shards of 256 MB or so (mellow-shards build --shard-megabytes 256)",
            )
        )  # fmt: skip
    return found


def _cache(case: Case, shards: ShardFacts) -> list[Finding]:
    bound = case.config.data.cache_gigabytes * GIGABYTE
    if not shards.remote_bytes or not bound:
        return []
    largest = max(shards.shard_bytes)
    data = case.config.data
    at_once = min(data.order_runs * data.shuffle_window, shards.num_shards) * largest
    needed = min(max(at_once, _AHEAD_SHARDS * case.machine.ranks_per_host * largest), shards.remote_bytes)
    if bound < largest:
        return [
            Finding(
                STOPS, "cache-below-shard",
                f"data.cache_gigabytes is {data.cache_gigabytes:g}, but a remote shard has {readable(largest)}",
                "a shard is read from the cache, which can never hold it", "raise it, or set it to 0 for no bound",
            )
        ]  # fmt: skip
    if bound < needed:
        return [
            Finding(
                SLOW, "cache-small",
                f"data.cache_gigabytes is {data.cache_gigabytes:g}, but a host reads up to "
                f"{readable(needed)} of remote shards at the same time",
                "shards are removed while they are still needed, and downloaded again",
                f"raise it to {math.ceil(needed / GIGABYTE)} or more, or lower data.order_runs or data.shuffle_window",
            )
        ]  # fmt: skip
    return []


def _evaluation(case: Case) -> list[Finding]:
    config = case.config
    wants = [
        key
        for key, wanted in (
            ("train.evaluate_at_end", config.train.evaluate_at_end),
            ("train.evaluate_every_steps", config.train.evaluate_every_steps),
        )
        if wanted
    ]
    if not wants or config.data.eval_shards:
        return []
    return [
        Finding(
            STOPS, "no-eval-shards", f"{wants[0]} is set, but data.eval_shards is empty",
            "there is nothing held out to measure on", f"name data.eval_shards, or drop {wants[0]}",
        )
    ]  # fmt: skip


def _cores(case: Case) -> list[Finding]:
    machine, train = case.machine, case.config.train
    if machine.is_remote:
        return []
    found = []
    processes = machine.ranks_per_host * (1 + train.num_workers)
    if train.num_workers and processes > machine.num_cores and (machine.on_gpus or train.num_workers > 1):
        fitting = max(machine.num_cores // machine.ranks_per_host - 1, 0)
        found.append(
            Finding(
                SLOW, "workers-beyond-cores",
                f"{machine.ranks_per_host} ranks of a host with {train.num_workers} loader processes each are "
                f"{processes} processes on {machine.num_cores} cores",
                "loaders and training take the cores from one another",
                f"set train.num_workers to {fitting} or take fewer ranks a host",
            )
        )  # fmt: skip
    if machine.on_gpus and not train.num_workers:
        found.append(
            Finding(
                SLOW, "no-workers", "train.num_workers is 0",
                "the GPU waits while the training process reads, decodes and tokenizes each micro-batch",
                f"set it to {max(min(machine.num_cores // machine.ranks_per_host - 1, 8), 1)}",
            )
        )  # fmt: skip
    return found
