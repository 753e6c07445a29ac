"""Pack question-answer JSON and audio files into a shard folder: the steps, in order.

Read the records for their audio files (build_input.py, catalogue.py; where a build is split, parts/split.py says which
are its own), hash and check every source file (survey.py), read the records again into a file of questions by clip
(question_set.py), place clips into shards (shard_plan.py, placement.py), write the shards in processes (workers.py,
write.py), publish (folder.py). The same input gives the same bytes, whatever the number of processes and whether or not
the build was interrupted. Questions are never in memory but those of one clip; of clips there are numbers only.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

import mellow_ds
from mellow_ds.errors import PackingError, ShardError
from mellow_ds.packing.build_input import BuildInput, describe_sources, differences, read_input
from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.folder import REJECTED_NAME, OutputFolder, renumbered
from mellow_ds.packing.parts.split import part_folder
from mellow_ds.packing.question_file import read_questions
from mellow_ds.packing.question_set import QuestionSet
from mellow_ds.packing.record_file import RecordFile
from mellow_ds.packing.records import Rejection
from mellow_ds.packing.rejections import Rejections
from mellow_ds.packing.report import Report, check_rejected_share
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.shard_plan import PlanFile, ShardPlan, plan_shards
from mellow_ds.packing.survey import Survey, survey_sources
from mellow_ds.packing.workers import write_shards
from mellow_ds.packing.write import ShardNote, bad_place, note_path
from mellow_ds.shard_format import Manifest, read_index

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
    folder = OutputFolder(part_folder(Path(out), settings))
    with folder.locked(), _files_of_records(folder, settings) as catalogue:
        # a part would write down the records of all others, and beside a finished build there may be nothing to do
        is_kept = folder.work.exists() and not settings.num_parts
        written = RecordFile(folder.work / "records.part") if is_kept else None
        given = read_input(json_files, Path(audio_root), settings, catalogue, written)
        if not given.num_records:
            raise PackingError(f"{', '.join(map(str, json_files))}: no record in it, so there is nothing to pack")
        return _build(given, folder, started)


@contextmanager
def _files_of_records(folder: OutputFolder, settings: BuildSettings) -> Iterator[Catalogue]:
    """A catalogue, in the work folder; what this run alone needs there is removed in the end.

    Beside a finished build nothing is written before it is known that there is something to do.
    """
    is_new = not folder.manifest_path.exists()
    if is_new and not settings.overwrite:
        folder.check_unclaimed()
    if is_new or folder.work.exists():
        folder.start_work()
    try:
        with Catalogue(folder.work / "files.part" if folder.work.exists() else None) as catalogue:
            yield catalogue
    finally:
        folder.end_work()


def _build(given: BuildInput, folder: OutputFolder, started: float) -> Report:
    sources = describe_sources(given)
    finished = _finished(given, folder, sources)
    if finished is not None and given.listing.newest_change < folder.manifest_path.stat().st_mtime:
        return _report_finished(given, folder, finished, started)
    num_files = len(given.catalogue) if given.wanted_files is None else int(given.wanted_files.sum())
    with _progress(given.settings, num_files, "hashing", "file") as bar:
        workers = given.settings.num_workers
        survey = survey_sources(given.audio_root, given.catalogue, given.wanted_files, workers, bar)
    sources["audio"]["content"] = survey.content_hash
    if finished is not None and not differences(given, finished, sources):
        return _report_finished(given, folder, finished, started)
    if not given.settings.overwrite:
        _refuse_other(given, folder, sources)
    return _make(given, survey, folder, sources, started)


def _make(given: BuildInput, survey: Survey, folder: OutputFolder, sources: dict[str, Any], started: float) -> Report:
    if not folder.work.exists():
        folder.start_work()
    found = given.read_again(survey, folder.work)
    if given.written is not None:
        given.written.path.unlink()
    _check_rejected(given, folder, found.rejections)
    _check_dropped(given, found)
    plans = plan_shards(found, survey, given.catalogue, given.settings, folder.work / "plans.part")
    notes, num_reused = _write_plans(given, folder, plans, found.file.path)
    for number, note in enumerate(notes):
        if note.bad:
            _reject_questions(given, found, plans.read(number), note)
    sources["rejected"] = _check_rejected(given, folder, found.rejections)
    if given.drop_list.sha256:
        sources["dropped"] = dict(sorted(found.dropped.items()))
    shards = renumbered(notes)
    manifest = Manifest(
        sample_rate=given.settings.sample_rate,
        codec=given.settings.codec,
        num_clips=_count_clips(folder, survey, notes),
        num_questions=sum(shard.num_questions for shard in shards),
        subtypes={name: count for name, count in sorted(found.subtypes.items()) if count},
        shards=shards,
        sources=sources,
    )
    folder.publish([note.info for note in notes if note.info is not None], manifest)
    return Report(folder.path, manifest, time.monotonic() - started, was_finished=False, num_reused=num_reused)


def _write_plans(
    given: BuildInput, folder: OutputFolder, plans: PlanFile, questions: Path
) -> tuple[list[ShardNote], int]:
    """(notes in the order of the plans, how many an interrupted build had left)."""
    versions = f"{mellow_ds.__version__} {soundfile.__libsndfile_version__} {version('torchaudio')}"
    notes: dict[int, ShardNote] = {}
    with questions.open("rb", buffering=0) as file:
        for number, name in enumerate(plans.names):
            if note_path(folder.work, name).exists():
                note = folder.finished_note(name, plans.read(number).fingerprint(versions, file))
                if note is not None:
                    notes[number] = note
    num_reused, missing = len(notes), [number for number in range(len(plans)) if number not in notes]
    with _progress(given.settings, sum(plans.num_clips[number] for number in missing), "packing", "clip") as bar:
        workers = given.settings.num_workers
        made = write_shards(plans, missing, questions, versions, given.audio_root, folder.work, workers, bar)
    notes.update(zip(missing, made, strict=True))
    return [notes[number] for number in range(len(plans))], num_reused


def _reject_questions(given: BuildInput, found: QuestionSet, plan: ShardPlan, note: ShardNote) -> None:
    """Move the questions of a shard that have a bad clip to the rejections, by record and path of the clip."""
    with found.file.path.open("rb", buffering=0) as file:
        for clip in plan.clips:
            for question in read_questions(file, clip.questions):
                place = bad_place(question, note.bad)
                if place is not None:
                    path = given.catalogue.path_of(question.paths[place])
                    name = given.records.names[question.file]
                    reason, detail = note.bad[question.clips[place]]
                    found.rejections.add(Rejection(name, question.number, path, reason, detail))
                    found.subtypes[question.subtype] -= 1


def _count_clips(folder: OutputFolder, survey: Survey, notes: Sequence[ShardNote]) -> int:
    """Different clips in the shards of the work folder."""
    is_there = np.zeros(survey.num_clips, bool)
    for note in notes:
        if note.info is not None:
            is_there[survey.clips_of_keys(read_index(folder.work, note.info)["key"])] = True
    return int(is_there.sum())


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


def _check_rejected(given: BuildInput, folder: OutputFolder, rejections: Rejections) -> dict[str, int]:
    """Write rejected.jsonl and return the counts by reason; raises `PackingError` where there are too many.

    A part may reject as many as the whole build: which of them fall together in a part is chance.
    """
    path = folder.write_rejected(rejections.lines())
    counts = dict(sorted(rejections.counts.items()))
    check_rejected_share(counts, given.num_records, given.settings.max_rejected, path)
    return counts


def _check_dropped(given: BuildInput, found: QuestionSet) -> None:
    """Refuse a drop list of another corpus, and one that leaves nothing; a part sees only its share of it."""
    num_listed = len(given.drop_list.clips) + len(given.drop_list.questions)
    num_missed = num_listed - found.num_matched
    if num_missed and not given.settings.num_parts:
        what = f"{num_missed} of {num_listed} entries of {given.settings.drop_list} name nothing in these records"
        if num_missed == num_listed:
            raise PackingError(f"{what}: it is the list of another corpus or split; correct --drop-list")
        _log.warning("%s", what)
    if not any(found.asked) and found.dropped and not given.settings.num_parts:
        raise PackingError(f"{given.settings.drop_list} leaves no question to pack: correct --drop-list")


def _report_finished(given: BuildInput, folder: OutputFolder, manifest: Manifest, started: float) -> Report:
    rejected, allowed = manifest.sources["rejected"], given.settings.max_rejected
    check_rejected_share(rejected, given.num_records, allowed, folder.path / REJECTED_NAME)
    folder.remove_work()
    seconds = time.monotonic() - started
    return Report(folder.path, manifest, seconds, was_finished=True, num_reused=len(manifest.shards))


def _progress(settings: BuildSettings, total: int, verb: str, unit: str) -> Any:
    # disable=None: no bar where stderr is not a terminal
    return tqdm(total=total, desc=verb, unit=unit, disable=None if settings.progress else True)
