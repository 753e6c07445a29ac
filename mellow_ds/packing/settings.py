"""What a build may be told, with defaults and bounds, for the command line and for Python. Imports nothing heavy."""

import os
from dataclasses import dataclass
from pathlib import Path

from mellow_ds.errors import PackingError

CODECS = {"flac": "flac", "pcm": "wav", "opus": "opus"}  # codec: extension of the member that holds it
OPUS_SAMPLE_RATE = 48_000  # Hz: Opus knows no 32 kHz, so it is stored at this and resampled when it is read
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 192_000  # Hz, of the stored audio


@dataclass(frozen=True)
class BuildSettings:
    """How a shard folder is built."""

    codec: str = "flac"
    """flac; pcm: 16-bit WAV, larger and faster to read; opus: smallest, not exact, stored at 48 kHz."""
    sample_rate: int = 32_000
    """Hz, of the stored audio; with opus, of what the reader makes of it."""
    shard_megabytes: float = 256
    """About the size of a shard, in 10**6 bytes."""
    max_rejected: float = 0.01
    """Share of the records that may be left out before the build fails."""
    workers: int = 0
    """Processes; 0: one a CPU."""
    overwrite: bool = False
    """Replace a finished build of other input or settings."""
    progress: bool = False
    """Show progress bars where stderr is a terminal."""
    num_parts: int = 0
    """Build one of so many independent parts, to be joined by `merge`; 0: the whole."""
    part: int = 0
    """Which of the parts, from 0."""
    drop_list: Path | None = None
    """JSON lines that name clips and questions to leave out."""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise PackingError(f"--codec is '{self.codec}'; choose one of {', '.join(CODECS)}")
        if not MIN_SAMPLE_RATE <= self.sample_rate <= MAX_SAMPLE_RATE:
            raise PackingError(
                f"--sample-rate is {self.sample_rate} Hz; it must be from {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
            )
        if not 0 < self.shard_megabytes <= 1_000_000:
            raise PackingError(f"--shard-megabytes is {self.shard_megabytes}; it must be above 0 and at most 1000000")
        if not 0 <= self.max_rejected <= 1:
            raise PackingError(f"--max-rejected is {self.max_rejected}; it is a share, from 0 to 1")
        if self.codec == "opus" and self.sample_rate > OPUS_SAMPLE_RATE:
            raise PackingError(
                f"--sample-rate is {self.sample_rate} Hz, but opus stores {OPUS_SAMPLE_RATE} Hz: give at most that, or "
                "another --codec"
            )
        if self.num_parts < 0:
            raise PackingError(f"--num-parts is {self.num_parts}; it must be 1 or more")
        if not 0 <= self.part < max(self.num_parts, 1):
            wanted = f"from 0 to {self.num_parts - 1}" if self.num_parts else "given together with --num-parts"
            raise PackingError(f"--part is {self.part}; it must be {wanted}")
        if self.workers < 0:
            raise PackingError(f"--workers is {self.workers}; it must be 0 (one a CPU) or more")

    @property
    def num_workers(self) -> int:
        """Processes, at least 1."""
        return self.workers or available_cpus()


MERGE_METHODS = ("link", "copy", "move")


@dataclass(frozen=True)
class MergeSettings:
    """How parts are joined."""

    method: str = "link"
    """link: hard links where the file system has them, else copies; copy; move: as link, then the parts are removed."""
    max_rejected: float = 0.01
    """Share of the records of all parts that may have been left out."""
    overwrite: bool = False
    """Replace a finished build of something else."""
    progress: bool = False
    """Show progress bars where stderr is a terminal."""

    def __post_init__(self) -> None:
        if self.method not in MERGE_METHODS:
            raise PackingError(f"--method is '{self.method}'; choose one of {', '.join(MERGE_METHODS)}")
        if not 0 <= self.max_rejected <= 1:
            raise PackingError(f"--max-rejected is {self.max_rejected}; it is a share, from 0 to 1")


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
