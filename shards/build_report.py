"""What a build or a merge came to, as text for the terminal."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mellow_ds.packing.report import Report


def describe_report(report: "Report", done: str) -> str:
    """What a build or merge came to, as text for the terminal."""
    out, manifest = report.folder, report.manifest
    state = "is already there, made from the same input: nothing to do" if report.was_finished else done
    lines = [
        f"{out} {state}",
        f"clips        {manifest.num_clips:,}",
        f"questions    {manifest.num_questions:,}",
        f"shards       {len(manifest.shards):,}, {report.num_bytes:,} bytes",
        f"replication  {report.replication:.3f} stored clips a clip",
        f"rejected     {sum(report.rejected.values()):,} records",
        *(f"               {count:,} {reason}" for reason, count in report.rejected.items()),
        *_describe_dropped(report),
        f"seconds      {report.seconds:.1f}",
    ]
    if report.rejected:
        lines.append(f"{out / 'rejected.jsonl'} names each rejected record")
    if report.num_reused and not report.was_finished:
        lines.append(f"shards taken over from an interrupted build: {report.num_reused}")
    return "\n".join(lines)


def _describe_dropped(report: "Report") -> list[str]:
    if "drop_list" not in report.manifest.sources:
        return []
    with_clip, by_name = report.dropped.get("clip", 0), report.dropped.get("question", 0)
    how = f"{with_clip:,} with a clip, {by_name:,} by name"
    return [f"dropped      {with_clip + by_name:,} questions by the drop list ({how})"]
