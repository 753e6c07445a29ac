"""What a build may be told, with defaults and bounds, for the command line and for Python. Imports nothing heavy."""

import os
from dataclasses import dataclass

from mellow_ds.errors import PackingError

CODECS = {"flac": "flac", "pcm": "wav"}  # codec: extension of the member that holds it
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 192_000  # Hz, of the stored audio


@dataclass(frozen=True)
class BuildSettings:
    """How a shard folder is built."""

    codec: str = "flac"
    """flac, or pcm: 16-bit WAV, larger and faster to read."""
    sample_rate: int = 32_000
    """Hz, of the stored audio."""
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
        if self.workers < 0:
            raise PackingError(f"--workers is {self.workers}; it must be 0 (one a CPU) or more")

    @property
    def num_workers(self) -> int:
        """Processes, at least 1."""
        return self.workers or available_cpus()


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
