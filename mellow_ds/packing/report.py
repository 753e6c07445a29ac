"""What a build or a merge came to, and whether too many records were left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mellow_ds.errors import PackingError
from mellow_ds.shard_format import Manifest


@dataclass(frozen=True)
class Report:
    """What a build or a merge came to."""

    folder: Path  # that the shards are in
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

    @property
    def dropped(self) -> dict[str, int]:
        """Questions that the drop list took out: with their "clip", or by "question"."""
        return self.manifest.sources.get("dropped", {})


def check_rejected_share(counts: Mapping[str, int], num_records: int, allowed: float, path: Path) -> None:
    """Raise `PackingError` where more than the share `allowed` of the records is rejected, or all are.

    `counts`: rejected records by reason; `path`: the file that names them.
    """
    num_rejected = sum(counts.values())
    if num_rejected < num_records and num_rejected <= allowed * num_records:
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
    cure = "correct them, or --audio-root" if num_rejected == num_records else "correct them, or raise --max-rejected"
    raise PackingError(
        f"{num_rejected} of {num_records} records cannot be packed ({num_rejected / num_records:.2%}, "
        f"allowed {allowed:.2%}): {reasons}; each is named in {path}: {cure}"
    )
