"""Pack question-answer JSON and audio files into a shard folder: the steps, in order.

Read the records (records.py), hash and check every source file (survey.py), place clips into shards (shard_plan.py,
placement.py), write the shards in processes (workers.py, write.py), publish (folder.py). The same input gives the same
bytes, whatever the number of processes and whether or not the build was interrupted.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

import mellow_ds
from mellow_ds.errors import PackingError, ShardError
from mellow_ds.packing.folder import REJECTED_NAME, OutputFolder, renumbered
from mellow_ds.packing.question_set import gather_questions
from mellow_ds.packing.records import RecordSet, Rejection, read_records
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.shard_plan import ShardPlan, plan_shards
from mellow_ds.packing.survey import Survey, listing_hash, survey_sources
from mellow_ds.packing.workers import write_shards
from mellow_ds.packing.write import ShardNote
from mellow_ds.shard_format import Manifest


@dataclass(frozen=True)
class Report:
    """What a build came to."""

    manifest: Manifest
    seconds: float
    was_finished: bool  # nothing had to be done
    num_reused: int  # shards that an interrupted build had finished

    @property
    def num_stored(self) -> int:
        """Clips in all shards, copies included."""
        return sum(shard.num_samples for shard in self.manifest.shards)

    @property
    def replication(self) -> float:
        """Stored clips a clip."""
        return self.num_stored / max(self.manifest.num_clips, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.num_bytes for shard in self.manifest.shards)

    @property
    def rejected(self) -> dict[str, int]:
        """Records left out, by reason."""
        return self.manifest.sources["rejected"]


@dataclass(frozen=True)
class _Input:
    """What is to be packed, and how."""

    records: RecordSet
    audio_root: Path
    settings: BuildSettings


def build_shards(
    json_files: Sequence[str | Path], audio_root: str | Path, out: str | Path, **settings: Any
) -> Manifest:
    """Pack and return the manifest; `settings` are fields of `BuildSettings`. Raises as `run_build` does."""
    return run_build(json_files, audio_root, out, BuildSettings(**settings)).manifest


def run_build(
    json_files: Sequence[str | Path], audio_root: str | Path, out: str | Path, settings: BuildSettings
) -> Report:
    """Pack the records of `json_files`, whose audio lies below `audio_root`, into the folder `out`.

    A finished build of the same input is left as it is. Raises `PackingError` for what the user can correct,
    `FaultError` for a full disk or a killed worker.
    """
    started = time.monotonic()
    if not Path(audio_root).is_dir():
        raise PackingError(f"audio root {audio_root} is not a folder: correct --audio-root")
    records = read_records(json_files)
    if not records.num_records:
        raise PackingError(f"{', '.join(map(str, json_files))}: no record in it, so there is nothing to pack")
    given = _Input(records, Path(audio_root), settings)
    folder = OutputFolder(Path(out))
    with folder.locked():
        return _build(given, folder, started)


def _build(given: _Input, folder: OutputFolder, started: float) -> Report:
    paths = sorted({path for record in given.records.records for path in record.paths})
    listing, newest_change = listing_hash(given.audio_root, paths)
    sources = _describe_sources(given, listing)
    finished = _finished(given, folder, sources)
    if finished is not None and newest_change < folder.manifest_path.stat().st_mtime:
        return _report_finished(given, folder, finished, started)
    with _progress(given.settings, len(paths), "hashing", "file") as bar:
        survey = survey_sources(given.audio_root, paths, given.settings.num_workers, bar)
    sources["audio"]["content"] = survey.content_hash
    if finished is not None and not _differences(given, finished, sources):
        return _report_finished(given, folder, finished, started)
    if not given.settings.overwrite:
        _refuse_other(given, folder, sources)
    return _make(given, survey, folder, sources, started)


def _make(given: _Input, survey: Survey, folder: OutputFolder, sources: dict[str, Any], started: float) -> Report:
    found = gather_questions(given.records, survey)
    _check_rejected(given, folder, found.rejections)
    folder.start_work()
    plans = plan_shards(list(found.questions.values()), survey.clips, given.settings)
    notes, num_reused = _write_plans(given, folder, plans)
    for dropped in (question for note in notes for question in note.dropped):
        found.reject(dropped.id, survey.key_of, dropped.key, dropped.reason, dropped.detail)
    counts = _check_rejected(given, folder, found.rejections)
    subtypes = Counter(question.subtype for question in found.questions.values())
    shards = renumbered(notes)
    manifest = Manifest(
        sample_rate=given.settings.sample_rate,
        codec=given.settings.codec,
        num_clips=len({key for note in notes for key in note.keys}),
        num_questions=sum(shard.num_questions for shard in shards),
        subtypes=dict(sorted(subtypes.items())),
        shards=shards,
        sources={**sources, "rejected": counts},
    )
    folder.publish(notes, manifest)
    return Report(manifest, time.monotonic() - started, was_finished=False, num_reused=num_reused)


def _write_plans(given: _Input, folder: OutputFolder, plans: list[ShardPlan]) -> tuple[list[ShardNote], int]:
    """(notes in the order of the plans, how many an interrupted build had left)."""
    versions = f"{mellow_ds.__version__} {soundfile.__libsndfile_version__} {version('torchaudio')}"
    marks = [plan.fingerprint(versions) for plan in plans]
    notes = {plan.name: folder.finished_note(plan.name, mark) for plan, mark in zip(plans, marks, strict=True)}
    missing = [(plan, mark) for plan, mark in zip(plans, marks, strict=True) if notes[plan.name] is None]
    with _progress(given.settings, sum(len(plan.clips) for plan, _ in missing), "packing", "clip") as bar:
        made = write_shards(missing, given.audio_root, folder.work, given.settings.num_workers, bar)
    notes.update({plan.name: note for (plan, _), note in zip(missing, made, strict=True)})
    return [note for note in notes.values() if note is not None], len(plans) - len(missing)


def _describe_sources(given: _Input, listing: str) -> dict[str, Any]:
    """What the manifest says that it was built from. Nothing of this machine or hour: equal builds are equal."""
    return {
        "tool": f"mellow-ds {mellow_ds.__version__}",
        "json": [asdict(source) for source in given.records.sources],
        "audio": {"listing": listing},
        "shard_megabytes": given.settings.shard_megabytes,
    }


def _finished(given: _Input, folder: OutputFolder, sources: dict[str, Any]) -> Manifest | None:
    """The finished build in the folder, where it has the same records, settings and audio files by name and size."""
    try:
        manifest = folder.finished_manifest()
    except ShardError:
        return None
    return manifest if manifest is not None and not _differences(given, manifest, sources) else None


def _differences(given: _Input, manifest: Manifest, sources: dict[str, Any]) -> list[str]:
    """What sets the build of `manifest` apart from the one that is asked for, as far as `sources` knows yet."""
    built, wanted = manifest.sources, sources["audio"]
    built_audio = built.get("audio") or {}
    compared = {
        "JSON files": built.get("json") != sources["json"],
        "audio files": any(built_audio.get(name) != wanted[name] for name in wanted),
        "--sample-rate": manifest.sample_rate != given.settings.sample_rate,
        "--codec": manifest.codec != given.settings.codec,
        "--shard-megabytes": built.get("shard_megabytes") != given.settings.shard_megabytes,
    }
    return [name for name, differs in compared.items() if differs]


def _refuse_other(given: _Input, folder: OutputFolder, sources: dict[str, Any]) -> None:
    """Raise `PackingError` where the folder holds something that this build would replace."""
    folder.check_unclaimed()
    try:
        manifest = folder.finished_manifest()
    except ShardError as error:
        raise PackingError(f"{error}; or give another --out, or --overwrite to replace it") from None
    differences = _differences(given, manifest, sources) if manifest is not None else []
    if differences:
        raise PackingError(
            f"{folder.path} holds a finished build that differs in {', '.join(differences)}: "
            "give another --out, or --overwrite to replace it"
        )


def _check_rejected(given: _Input, folder: OutputFolder, rejections: list[Rejection]) -> dict[str, int]:
    """Write rejected.jsonl and return the counts by reason; raises `PackingError` where there are too many."""
    path = folder.write_rejected([json.dumps(asdict(rejection)) for rejection in sorted(rejections)])
    counts = dict(sorted(Counter(rejection.reason for rejection in rejections).items()))
    _check_share(counts, given, path)
    return counts


def _check_share(counts: dict[str, int], given: _Input, path: Path) -> None:
    num_rejected, num_records = sum(counts.values()), given.records.num_records
    allowed = given.settings.max_rejected
    if num_rejected < num_records and num_rejected <= allowed * num_records:
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
    cure = "correct them" if num_rejected == num_records else "correct them, or raise --max-rejected"
    raise PackingError(
        f"{num_rejected} of {num_records} records cannot be packed ({num_rejected / num_records:.2%}, "
        f"allowed {allowed:.2%}): {reasons}; each is named in {path}: {cure}"
    )


def _report_finished(given: _Input, folder: OutputFolder, manifest: Manifest, started: float) -> Report:
    _check_share(manifest.sources["rejected"], given, folder.path / REJECTED_NAME)
    folder.remove_work()
    return Report(manifest, time.monotonic() - started, was_finished=True, num_reused=len(manifest.shards))


def _progress(settings: BuildSettings, total: int, verb: str, unit: str) -> Any:
    # disable=None: no bar where stderr is not a terminal
    return tqdm(total=total, desc=verb, unit=unit, disable=None if settings.progress else True)
