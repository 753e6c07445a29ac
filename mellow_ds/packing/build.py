"""Pack question-answer JSON and audio files into a shard folder: the steps, in order.

Read the records (records.py; where a build is split, those of one part: parts.py), hash and check every source file
(survey.py), place clips into shards (shard_plan.py, placement.py), write the shards in processes (workers.py,
write.py), publish (folder.py). The same input gives the same bytes, whatever the number of processes and whether or not
the build was interrupted.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

import mellow_ds
from mellow_ds.errors import PackingError, ShardError
from mellow_ds.packing.build_input import BuildInput, describe_sources, differences, read_input
from mellow_ds.packing.folder import REJECTED_NAME, OutputFolder, renumbered
from mellow_ds.packing.parts.split import part_folder
from mellow_ds.packing.question_set import QuestionSet, gather_questions
from mellow_ds.packing.records import Rejection
from mellow_ds.packing.report import Report, check_rejected_share
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.shard_plan import ShardPlan, plan_shards
from mellow_ds.packing.survey import Survey, survey_sources
from mellow_ds.packing.workers import write_shards
from mellow_ds.packing.write import ShardNote
from mellow_ds.shard_format import Manifest

_log = logging.getLogger("mellow_ds.packing")


def build_shards(
    json_files: Sequence[str | Path], audio_root: str | Path, out: str | Path, **settings: Any
) -> Manifest:
    """Pack and return the manifest; `settings` are fields of `BuildSettings`. Raises as `run_build` does."""
    return run_build(json_files, audio_root, out, BuildSettings(**settings)).manifest


def run_build(
    json_files: Sequence[str | Path], audio_root: str | Path, out: str | Path, settings: BuildSettings
) -> Report:
    """Pack the records of `json_files`, whose audio lies below `audio_root`, into the folder `out`.

    With `settings.num_parts`, pack one part of them into a folder of its own below `out`. A finished build of the same
    input is left as it is. Raises `PackingError` for what the user can correct, `FaultError` for a full disk or a
    killed worker.
    """
    started = time.monotonic()
    if not Path(audio_root).is_dir():
        raise PackingError(f"audio root {audio_root} is not a folder: correct --audio-root")
    given = read_input(json_files, Path(audio_root), settings)
    if not given.records.num_records:
        raise PackingError(f"{', '.join(map(str, json_files))}: no record in it, so there is nothing to pack")
    folder = OutputFolder(part_folder(Path(out), settings))
    with folder.locked():
        return _build(given, folder, started)


def _build(given: BuildInput, folder: OutputFolder, started: float) -> Report:
    sources = describe_sources(given)
    finished = _finished(given, folder, sources)
    if finished is not None and given.listing.newest_change < folder.manifest_path.stat().st_mtime:
        return _report_finished(given, folder, finished, started)
    paths = given.paths
    with _progress(given.settings, len(paths), "hashing", "file") as bar:
        survey = survey_sources(given.audio_root, paths, given.settings.num_workers, bar)
    sources["audio"]["content"] = survey.content_hash
    if finished is not None and not differences(given, finished, sources):
        return _report_finished(given, folder, finished, started)
    if not given.settings.overwrite:
        _refuse_other(given, folder, sources)
    return _make(given, survey, folder, sources, started)


def _make(given: BuildInput, survey: Survey, folder: OutputFolder, sources: dict[str, Any], started: float) -> Report:
    found = gather_questions(given.records, survey, given.drop_list)
    _check_rejected(given, folder, found.rejections)
    _check_dropped(given, found)
    folder.start_work()
    plans = plan_shards(list(found.questions.values()), survey.clips, given.settings)
    notes, num_reused = _write_plans(given, folder, plans)
    for bad in (question for note in notes for question in note.dropped):
        found.reject(bad.id, survey.key_of, bad.key, bad.reason, bad.detail)
    sources["rejected"] = _check_rejected(given, folder, found.rejections)
    if given.drop_list.sha256:
        sources["dropped"] = dict(sorted(found.dropped.items()))
    subtypes = Counter(question.subtype for question in found.questions.values())
    shards = renumbered(notes)
    manifest = Manifest(
        sample_rate=given.settings.sample_rate,
        codec=given.settings.codec,
        num_clips=len({key for note in notes for key in note.keys}),
        num_questions=sum(shard.num_questions for shard in shards),
        subtypes=dict(sorted(subtypes.items())),
        shards=shards,
        sources=sources,
    )
    folder.publish([note.info for note in notes if note.info is not None], manifest)
    return Report(folder.path, manifest, time.monotonic() - started, was_finished=False, num_reused=num_reused)


def _write_plans(given: BuildInput, folder: OutputFolder, plans: list[ShardPlan]) -> tuple[list[ShardNote], int]:
    """(notes in the order of the plans, how many an interrupted build had left)."""
    versions = f"{mellow_ds.__version__} {soundfile.__libsndfile_version__} {version('torchaudio')}"
    marks = [plan.fingerprint(versions) for plan in plans]
    notes = {plan.name: folder.finished_note(plan.name, mark) for plan, mark in zip(plans, marks, strict=True)}
    missing = [(plan, mark) for plan, mark in zip(plans, marks, strict=True) if notes[plan.name] is None]
    with _progress(given.settings, sum(len(plan.clips) for plan, _ in missing), "packing", "clip") as bar:
        made = write_shards(missing, given.audio_root, folder.work, given.settings.num_workers, bar)
    notes.update({plan.name: note for (plan, _), note in zip(missing, made, strict=True)})
    return [note for note in notes.values() if note is not None], len(plans) - len(missing)


def _finished(given: BuildInput, folder: OutputFolder, sources: dict[str, Any]) -> Manifest | None:
    """The finished build in the folder, where it has the same records, settings and audio files by name and size."""
    try:
        manifest = folder.finished_manifest()
    except ShardError:
        return None
    return manifest if manifest is not None and not differences(given, manifest, sources) else None


def _refuse_other(given: BuildInput, folder: OutputFolder, sources: dict[str, Any]) -> None:
    """Raise `PackingError` where the folder holds something that this build would replace."""
    folder.check_unclaimed()
    try:
        manifest = folder.finished_manifest()
    except ShardError as error:
        raise PackingError(f"{error}; or give another --out, or --overwrite to replace it") from None
    found = differences(given, manifest, sources) if manifest is not None else []
    if found:
        raise PackingError(
            f"{folder.path} holds a finished build that differs in {', '.join(found)}: "
            "give another --out, or --overwrite to replace it"
        )


def _check_rejected(given: BuildInput, folder: OutputFolder, rejections: list[Rejection]) -> dict[str, int]:
    """Write rejected.jsonl and return the counts by reason; raises `PackingError` where there are too many.

    A part may reject as many as the whole build: which of them fall together in a part is chance.
    """
    path = folder.write_rejected([json.dumps(asdict(rejection)) for rejection in sorted(rejections)])
    counts = dict(sorted(Counter(rejection.reason for rejection in rejections).items()))
    check_rejected_share(counts, given.records.num_records, given.settings.max_rejected, path)
    return counts


def _check_dropped(given: BuildInput, found: QuestionSet) -> None:
    """Refuse a drop list of another corpus, and one that leaves nothing; a part sees only its share of it."""
    num_listed = len(given.drop_list.clips) + len(given.drop_list.questions)
    num_missed = num_listed - len(found.matched)
    if num_missed and not given.settings.num_parts:
        what = f"{num_missed} of {num_listed} entries of {given.settings.drop_list} name nothing in these records"
        if num_missed == num_listed:
            raise PackingError(f"{what}: it is the list of another corpus or split; correct --drop-list")
        _log.warning("%s", what)
    if not found.questions and found.dropped and not given.settings.num_parts:
        raise PackingError(f"{given.settings.drop_list} leaves no question to pack: correct --drop-list")


def _report_finished(given: BuildInput, folder: OutputFolder, manifest: Manifest, started: float) -> Report:
    rejected, allowed = manifest.sources["rejected"], given.settings.max_rejected
    check_rejected_share(rejected, given.records.num_records, allowed, folder.path / REJECTED_NAME)
    folder.remove_work()
    seconds = time.monotonic() - started
    return Report(folder.path, manifest, seconds, was_finished=True, num_reused=len(manifest.shards))


def _progress(settings: BuildSettings, total: int, verb: str, unit: str) -> Any:
    # disable=None: no bar where stderr is not a terminal
    return tqdm(total=total, desc=verb, unit=unit, disable=None if settings.progress else True)
