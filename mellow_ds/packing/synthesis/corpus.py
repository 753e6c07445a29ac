"""`mellow-shards synthesize`: a folder with audio files and ReasonAQA-style JSON, made by formula from a seed.

A folder that is finished says so by `corpus.json`, which holds what it was made from; while it is being made that file
is called `corpus.partial.json`, so a run that was killed goes on where it stopped and never mixes two corpora.
"""

import json
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_handle
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mellow_ds.errors import FaultError, PackingError
from mellow_ds.packing.synthesis.questions import clip_path, make_records
from mellow_ds.packing.synthesis.scenes import Scene, draw_scenes, scene_waveform

VERSION = 1  # of the formulas and questions; another one makes another corpus
AUDIO_FORMATS = ("wav", "flac")
SAMPLE_RATE = 16_000  # Hz; nothing in the events lies above 4 kHz but noise
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8_000, 192_000
DONE_NAME, PARTIAL_NAME = "corpus.json", "corpus.partial.json"
_CLIPS_A_TASK = 8

_log = logging.getLogger("mellow_ds.packing")


def synthesize(
    out: Path, num_clips: dict[str, int], seed: int, audio_format: str, workers: int, sample_rate: int = SAMPLE_RATE
) -> None:
    """Make `out/audio/SPLIT/NNNNN.wav` (16-bit) and `out/SPLIT.json` for each split of `num_clips`.

    The files are the same bytes for the same arguments, whatever `workers` (processes; 0: in this one). Files that are
    there from an earlier call with the same arguments are kept. Raises `PackingError` for arguments that make no corpus
    and for a folder that holds another one.
    """
    arguments = _checked_arguments(num_clips, seed, audio_format, workers, sample_rate)
    out = Path(out)
    is_done = _claim_folder(out, arguments)
    scenes = {split: draw_scenes(seed, split, count) for split, count in arguments["num_clips"].items()}
    missing = [
        scene for split in scenes.values() for scene in split if not (out / clip_path(scene, audio_format)).is_file()
    ]
    missing_json = [split for split in scenes if not (out / f"{split}.json").is_file()]
    if is_done and not missing and not missing_json:
        _log.info("%s holds this corpus already: nothing to make", out)
        return
    for split in scenes:
        (out / "audio" / split).mkdir(parents=True, exist_ok=True)
    _write_clips(out, missing, audio_format, sample_rate, workers)
    for split, drawn in scenes.items():
        _write_json(out / f"{split}.json", make_records(drawn, seed, audio_format))
    if not is_done:
        (out / PARTIAL_NAME).replace(out / DONE_NAME)
    total = sum(arguments["num_clips"].values())
    _log.info("%s: %d clips written, %d of %d were there", out, len(missing), total - len(missing), total)


def _checked_arguments(
    num_clips: dict[str, int], seed: int, audio_format: str, workers: int, sample_rate: int
) -> dict[str, Any]:
    """What the corpus is a function of; raises `PackingError` naming the argument."""
    for split, count in num_clips.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split) or split == "corpus":
            raise PackingError(f"split '{split}': give a name of letters, digits, - and _ other than 'corpus'")
        if count < 0:
            raise PackingError(f"{count} clips for the split '{split}': give 0 or more")
    wanted = {split: count for split, count in num_clips.items() if count}
    if not wanted:
        raise PackingError("a corpus of no clips: give a number above 0 for at least one split")
    if audio_format not in AUDIO_FORMATS:
        raise PackingError(f"audio format '{audio_format}': choose one of {', '.join(AUDIO_FORMATS)}")
    if workers < 0:
        raise PackingError(f"{workers} workers: give 0 or more")
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise PackingError(f"sample rate {sample_rate}: give {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz")
    return {
        "version": VERSION,
        "num_clips": dict(sorted(wanted.items())),
        "seed": seed,
        "audio_format": audio_format,
        "sample_rate": sample_rate,
    }


def _claim_folder(out: Path, arguments: dict[str, Any]) -> bool:
    """Mark `out` as holding the corpus of `arguments`; True where it was finished before."""
    for name in (DONE_NAME, PARTIAL_NAME):
        if (out / name).exists():
            _refuse_other_corpus(out / name, arguments)
            return name == DONE_NAME
    in_the_way = [out / "audio", *(out / f"{split}.json" for split in arguments["num_clips"])]
    for path in in_the_way:
        if path.exists():
            raise PackingError(f"{path} is there and is not of a synthetic corpus: name another folder to write to")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PackingError(f"{out} cannot be made ({error.strerror}): name another folder to write to") from None
    _write_json(out / PARTIAL_NAME, arguments)
    return False


def _refuse_other_corpus(path: Path, arguments: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackingError(f"{path} cannot be read ({error}): name another folder to write to") from None
    if not isinstance(found, dict):
        raise PackingError(f"{path} is not of a synthetic corpus: name another folder to write to")
    for key, wanted in arguments.items():
        if found.get(key) != wanted:
            raise PackingError(
                f"{path} is of another corpus ({key} {found.get(key)}, asked for {wanted}): "
                "name another folder to write to, or delete this one"
            )


def _write_clips(out: Path, scenes: list[Scene], audio_format: str, sample_rate: int, workers: int) -> None:
    """Render the scenes to their files, in `workers` processes."""
    tasks = [
        (out, scenes[start : start + _CLIPS_A_TASK], audio_format, sample_rate)
        for start in range(0, len(scenes), _CLIPS_A_TASK)
    ]
    with tqdm(total=len(scenes), desc="synthesize", unit="clip", disable=None if scenes else True) as bar:
        for num_written in _run(tasks, min(workers, len(tasks))):
            bar.update(num_written)


def _run(tasks: list[tuple[Path, list[Scene], str, int]], workers: int) -> Iterator[int]:
    if workers < 2:
        yield from map(_write_task, tasks)
        return
    # spawn: a fork would copy the threads' locks of whatever the caller has loaded (torch); an executor and no Pool,
    # which waits for ever on a worker that was killed for memory
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        # the processes start here and inherit what is blocked: from their first moment Ctrl-C is the parent's to handle
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            results = pool.map(_write_task, tasks)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            yield from results
        except BrokenProcessPool:
            raise FaultError(
                "a process that wrote clips was killed (out of memory?): start again to go on, with fewer workers"
            ) from None


def _end_with_parent() -> None:
    """Set up a worker process: one whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_handle([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_task(task: tuple[Path, list[Scene], str, int]) -> int:
    """Write the clips of one task, each published by rename; returns their number."""
    import soundfile

    out, scenes, audio_format, sample_rate = task
    for scene in scenes:
        path = out / clip_path(scene, audio_format)
        partial = path.with_name(path.name + ".partial")
        wave = scene_waveform(scene, sample_rate)
        try:
            soundfile.write(partial, wave, sample_rate, subtype="PCM_16", format=audio_format.upper())
            partial.replace(path)
        except (OSError, soundfile.LibsndfileError) as error:
            partial.unlink(missing_ok=True)
            raise FaultError(f"{path} cannot be written ({error}): is the disk full?") from None
    return len(scenes)


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise FaultError(f"{path} cannot be written ({error.strerror})") from None
