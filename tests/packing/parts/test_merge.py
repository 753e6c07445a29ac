"""Parts joined: the questions and clips of one build; what does not belong together is named; kills lose nothing."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mellow_ds.errors import PackingError
from mellow_ds.packing.build import run_build
from mellow_ds.packing.hash_buckets import HashBuckets
from mellow_ds.packing.parts import merge as merge_module
from mellow_ds.packing.parts.merge import run_merge
from mellow_ds.packing.report import Report
from mellow_ds.packing.settings import BuildSettings, MergeSettings
from mellow_ds.packing.sorted_runs import SortedRuns
from mellow_ds.packing.verify import verify_shards
from mellow_ds.shard_format import MANIFEST_NAME, Question, SampleInfo, read_index, read_manifest

NUM_PARTS = 3
SMALL = 0.02  # megabytes of a shard that holds a few tones


def build(corpus: Any, out: str, **settings: Any) -> Report:
    settings = {"workers": 1, "shard_megabytes": SMALL, "max_rejected": 0.3, **settings}
    return run_build([corpus.write()], corpus.root, corpus.folder / out, BuildSettings(**settings))


def build_parts(corpus: Any, out: str = "parts", num_parts: int = NUM_PARTS, **settings: Any) -> list[Path]:
    return [
        build(corpus, out, num_parts=num_parts, part=part, **settings).folder for part in reversed(range(num_parts))
    ]


def merge(corpus: Any, parts: list[Path], out: str = "merged", **settings: Any) -> Report:
    return run_merge(parts, corpus.folder / out, MergeSettings(**{"max_rejected": 0.3, **settings}))


def content(folder: Path) -> tuple[Counter[Question], set[tuple[str, int]]]:
    """(all questions, all clips with their lengths) of a shard folder, by its indexes."""
    questions: Counter[Question] = Counter()
    clips = set()
    for shard in read_manifest(folder).shards:
        with (folder / shard.name).open("rb") as tar:
            for row in read_index(folder, shard):
                tar.seek(int(row["json_offset"]))
                info = SampleInfo.from_json(tar.read(int(row["json_bytes"])), shard.name)
                questions.update(info.questions)
                clips.add((info.key, info.num_frames))
    return questions, clips


def ask_with_faults(corpus: Any, count: int = 18) -> None:
    """A ring of pairs, so that some cross parts, and records that cannot be packed."""
    corpus.ask_tones(count)
    corpus.records.insert(3, "no record")
    corpus.records.insert(9, 17)
    corpus.ask("gone.wav")
    corpus.ask("tone-004.wav", "gone.wav")
    whole = corpus.tone("half.mp3", seconds=1, rate=44_100).read_bytes()
    (corpus.root / "half.mp3").write_bytes(whole[: len(whole) // 2])
    corpus.ask("half.mp3")
    corpus.ask("tone-011.wav", "half.mp3")


def same_but_for_shards(joined: Report, whole: Report) -> None:
    ours, theirs = joined.manifest, whole.manifest
    for name in ("sample_rate", "codec", "num_clips", "num_questions", "subtypes", "format_version"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("tool", "json", "rejected", "shard_megabytes"):
        assert ours.sources[name] == theirs.sources[name]
    assert content(joined.folder) == content(whole.folder)
    assert (joined.folder / "rejected.jsonl").read_text() == (whole.folder / "rejected.jsonl").read_text()
    assert verify_shards(joined.folder) == []


@pytest.mark.parametrize("num_parts", [1, 3, 40])
def test_parts_joined_hold_what_one_build_holds(corpus: Any, num_parts: int) -> None:
    ask_with_faults(corpus)
    whole = build(corpus, "whole")
    parts = build_parts(corpus, num_parts=num_parts)
    if num_parts == 3:
        manifests = [read_manifest(part) for part in parts]
        assert sum(manifest.num_clips for manifest in manifests) > whole.manifest.num_clips, "no pair crosses"
        assert all(manifest.num_questions for manifest in manifests)
    report = merge(corpus, parts)
    same_but_for_shards(report, whole)
    assert merge(corpus, parts[::-1]).was_finished


def test_the_same_audio_under_two_paths_in_two_parts(corpus: Any) -> None:
    ask_with_faults(corpus, 12)
    for number in range(8):  # the same words about the same audio under many paths: some part has to count anew
        name = f"copy-{number}.wav"
        shutil.copy(corpus.root / "tone-001.wav", corpus.root / name)
        corpus.ask(name, answer="tone 1")
        corpus.ask(name, "tone-002.wav", answer="yes", subtype="pair")
    whole = build(corpus, "whole")
    parts = build_parts(corpus)
    in_parts = [content(part)[0] for part in parts]
    assert any(first & second for first, second in itertools.combinations(in_parts, 2)), "nothing to tell apart"
    before = {part: (part / MANIFEST_NAME).read_bytes() for part in parts}
    same_but_for_shards(merge(corpus, parts), whole)
    for part, manifest in before.items():
        assert (part / MANIFEST_NAME).read_bytes() == manifest
        assert verify_shards(part) == [], "a part is not changed by joining it"


def test_the_same_parts_give_the_same_bytes_by_every_method(corpus: Any, folder_bytes: Any) -> None:
    ask_with_faults(corpus)
    parts = build_parts(corpus)
    linked = merge(corpus, parts)
    first = linked.manifest.shards[0].name
    assert (linked.folder / first).stat().st_nlink == 2
    copied = merge(corpus, parts, "copied", method="copy")
    assert (copied.folder / first).stat().st_nlink == 1
    wanted = folder_bytes(linked.folder)
    assert folder_bytes(copied.folder) == wanted
    moved = merge(corpus, parts, "moved", method="move")
    assert folder_bytes(moved.folder) == wanted
    assert not any(part.exists() for part in parts)
    assert merge(corpus, parts, "moved", method="move").was_finished


def test_the_parts_may_lie_in_the_folder_that_they_are_joined_into(corpus: Any) -> None:
    corpus.ask_tones(9)
    parts = build_parts(corpus, "out")
    assert parts[0].parent == corpus.folder / "out"
    report = merge(corpus, parts, "out", method="move")
    assert report.manifest.num_questions == 18
    assert not list((corpus.folder / "out").glob("part-*"))
    assert verify_shards(corpus.folder / "out") == []


def test_a_file_system_without_links_gets_copies(corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.ask_tones(9)
    parts = build_parts(corpus)
    hardlink_to, refused = Path.hardlink_to, []

    def refuse(self: Path, target: Path) -> None:
        if "part-" in str(target):
            refused.append(target)
            raise OSError(18, "Invalid cross-device link")
        hardlink_to(self, target)

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    report = merge(corpus, parts)
    assert refused
    assert (report.folder / "shard-000000.tar").stat().st_nlink == 1
    assert verify_shards(report.folder) == []


def test_parts_that_do_not_belong_together_are_named(corpus: Any) -> None:
    corpus.ask_tones(9)
    whole = build(corpus, "whole").folder
    parts = build_parts(corpus)
    with pytest.raises(PackingError, match=r"1 of 3 parts are missing: 1; .*--num-parts 3 --part"):
        merge(corpus, [parts[0], parts[2]])
    with pytest.raises(PackingError, match=r"part 1 of 3 is there twice, in .*parts.*and .*copy"):
        merge(corpus, [*parts, Path(shutil.copytree(parts[1], corpus.folder / "copy"))])
    with pytest.raises(PackingError, match="whole is not a part of a build"):
        merge(corpus, [*parts, whole])
    with pytest.raises(PackingError, match="nowhere is not there"):
        merge(corpus, [*parts, corpus.folder / "nowhere"])
    with pytest.raises(PackingError, match="is one of the parts"):
        merge(corpus, parts, str(parts[0].relative_to(corpus.folder)))
    others = {
        "--num-parts": build_parts(corpus, "four", num_parts=4)[:1],
        "--codec": build_parts(corpus, "pcm", codec="pcm")[:1],
        "--sample-rate": build_parts(corpus, "slow", sample_rate=16_000)[:1],
        "--shard-megabytes": build_parts(corpus, "large", shard_megabytes=1)[:1],
    }
    corpus.tone("tone-003.wav", seconds=0.2)
    others["audio files"] = build_parts(corpus, "other-audio")[:1]
    corpus.ask("tone-003.wav")
    others["JSON files"] = build_parts(corpus, "other-json")[:1]
    for name, foreign in others.items():
        with pytest.raises(PackingError, match=f"different builds: they differ in .*{name}"):
            merge(corpus, [*parts[1:], *foreign])
    assert not (corpus.folder / "merged" / MANIFEST_NAME).exists()


def test_damage_is_named_and_nothing_is_published(corpus: Any) -> None:
    corpus.ask_tones(12)
    parts = build_parts(corpus)
    tar, index = parts[1] / "shard-000000.tar", parts[1] / "shard-000000.index.npy"
    payload = tar.read_bytes()
    os.truncate(tar, len(payload) - 512)
    with pytest.raises(PackingError, match=r"shard-000000\.tar has .* bytes; .*\(part 1\)"):
        merge(corpus, parts)
    tar.write_bytes(payload[:1_000] + bytes([payload[1_000] ^ 1]) + payload[1_001:])
    with pytest.raises(PackingError, match=r"shard-000000\.tar is not the file .*SHA-256"):
        merge(corpus, parts, method="copy")
    tar.write_bytes(payload)
    rows = index.read_bytes()
    index.write_bytes(rows[:-1] + bytes([rows[-1] ^ 1]))
    with pytest.raises(PackingError, match=r"index\.npy is not the index .*\(part 1\)"):
        merge(corpus, parts)
    index.write_bytes(rows)
    (parts[0] / "rejected.jsonl").write_text("{}\n")
    with pytest.raises(PackingError, match=r"rejected\.jsonl has 1 lines; wanted are 0"):
        merge(corpus, parts)
    assert not (corpus.folder / "merged" / MANIFEST_NAME).exists()


def test_a_question_in_two_shards_of_a_part_is_found(corpus: Any) -> None:
    corpus.ask_tones(6, pairs=False)
    (part,) = build_parts(corpus, num_parts=1, shard_megabytes=1)
    path = part / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    assert len(manifest["shards"]) == 1
    for name in ("shard-000000.tar", "shard-000000.index.npy"):
        shutil.copy(part / name, part / name.replace("000000", "000001"))
    manifest["shards"].append({**manifest["shards"][0], "name": "shard-000001.tar"})
    manifest["num_questions"] *= 2
    path.write_text(json.dumps(manifest))
    with pytest.raises(PackingError, match="holds a question twice: build part 0 anew"):
        merge(corpus, [part])


def test_a_merge_that_is_refused_leaves_no_folder(corpus: Any) -> None:
    corpus.ask_tones(6)
    parts = build_parts(corpus)
    with pytest.raises(PackingError, match="are missing"):
        merge(corpus, parts[:1])
    assert not (corpus.folder / "merged").exists()


def test_a_part_whose_rejected_records_cannot_be_read_is_named(corpus: Any) -> None:
    ask_with_faults(corpus)
    parts = build_parts(corpus)
    path = next(part for part in parts if (part / "rejected.jsonl").stat().st_size) / "rejected.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (b"{}\n", b"text\n", b"3\n", b'{"file": "r.json", "record": -1}\n'):
        path.write_bytes(b"".join([broken, *lines[1:]]))
        with pytest.raises(PackingError, match=r"rejected\.jsonl cannot be read .*build part \d anew"):
            merge(corpus, parts)
    assert not (corpus.folder / "merged").exists()


def test_many_twins_in_small_buckets_come_out_as_in_one_build(corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        corpus.tone(f"tone-{number}.wav", hertz=300 + 50 * number)
        for copy in range(7):
            shutil.copy(corpus.root / f"tone-{number}.wav", corpus.root / f"{copy}-{number}.wav")
            for _ in range(2):
                corpus.ask(f"{copy}-{number}.wav")
                corpus.ask(f"{copy}-{number}.wav", f"{copy}-{(number + 1) % 6}.wav", subtype="pair")
    whole = build(corpus, "whole")
    monkeypatch.setattr(HashBuckets.__init__, "__defaults__", (100,))
    monkeypatch.setattr(SortedRuns.__init__, "__defaults__", (200,))
    same_but_for_shards(merge(corpus, build_parts(corpus, num_parts=5)), whole)


def test_the_share_of_rejected_records_is_that_of_all_parts(corpus: Any) -> None:
    corpus.ask_tones(18, pairs=False)
    corpus.ask("gone.wav")
    corpus.ask("gone.wav", answer="no")
    parts = build_parts(corpus, max_rejected=0.1)
    assert sum(read_manifest(part).sources["rejected"].get("file is missing", 0) for part in parts) == 2
    with pytest.raises(PackingError, match=r"2 of 20 records .*10\.00%, allowed 5\.00%"):
        merge(corpus, parts, max_rejected=0.05)
    assert not (corpus.folder / "merged" / MANIFEST_NAME).exists()
    assert merge(corpus, parts, max_rejected=0.1).rejected == {"file is missing": 2}
    with pytest.raises(PackingError, match="2 of 20 records"):
        build_parts(corpus, "strict", max_rejected=0.05)  # one part alone has more than all may have


def test_another_build_in_the_folder_is_kept(corpus: Any) -> None:
    corpus.ask_tones(6)
    whole = build(corpus, "out").manifest
    parts = build_parts(corpus)
    with pytest.raises(PackingError, match=r"holds a finished build of something else.*--overwrite"):
        merge(corpus, parts, "out")
    assert read_manifest(corpus.folder / "out") == whole
    assert merge(corpus, parts, "out", overwrite=True).manifest.num_questions == 12
    assert verify_shards(corpus.folder / "out") == []


def test_drop_lists_are_joined(corpus: Any) -> None:
    corpus.ask_tones(12)
    key = next(iter(content(build(corpus, "first").folder)[1]))[0]
    drop_list = corpus.folder / "drop.jsonl"
    drop_list.write_text(json.dumps({"kind": "clip", "id": key, "reason": "silent"}))
    whole = build(corpus, "whole", drop_list=drop_list)
    report = merge(corpus, build_parts(corpus, drop_list=drop_list))
    assert report.dropped == whole.dropped == {"clip": 3}
    same_but_for_shards(report, whole)


@pytest.mark.parametrize("method", ["link", "copy", "move"])
def test_a_merge_that_stops_anywhere_goes_on(corpus: Any, folder_bytes: Any, method: str) -> None:
    ask_with_faults(corpus, 9)
    parts = build_parts(corpus, num_parts=2)
    kept = [Path(shutil.copytree(part, corpus.folder / f"kept-{part.name}")) for part in parts]
    wanted = folder_bytes(merge(corpus, kept, "wanted").folder)
    num_calls = _stop_after(corpus, parts, method, 10**9, "never")
    for number in range(num_calls):
        for part, copy in zip(parts, kept, strict=True):
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(copy, part)
        out = f"out-{number}"
        with pytest.raises(KeyboardInterrupt):
            _stop_after(corpus, parts, method, number, out)
        manifest = corpus.folder / out / MANIFEST_NAME
        if manifest.exists():
            assert verify_shards(manifest.parent) == []
        assert folder_bytes(merge(corpus, parts, out, method=method).folder) == wanted
        assert all(part.exists() == (method != "move") for part in parts)
        shutil.rmtree(corpus.folder / out)


def _stop_after(corpus: Any, parts: list[Path], method: str, count: int, out: str) -> int:
    """Merge, stopped before the file operation `count` that changes names; returns how many there were."""
    calls = 0

    def counted(operation: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == count:
                raise KeyboardInterrupt
            calls += 1
            return operation(*arguments, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("hardlink_to", "replace", "unlink", "rmdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        merge(corpus, parts, out, method=method)
    return calls


@pytest.mark.slow
def test_a_part_and_a_merge_that_are_killed_go_on(corpus: Any, folder_bytes: Any) -> None:
    corpus.ask_tones(24)
    for number in range(24):
        corpus.tone(f"tone-{number:03d}.wav", seconds=2, rate=44_100, hertz=200 + number)
    parts = build_parts(corpus, num_parts=2, shard_megabytes=0.5)
    wanted = [folder_bytes(part) for part in parts[::-1]]
    joined = folder_bytes(merge(corpus, parts).folder)
    out = corpus.folder / "killed"
    given = ["--json", str(corpus.write()), "--audio-root", str(corpus.root), "--out", str(out), "--workers", "1"]
    given += ["--shard-megabytes", "0.5", "--max-rejected", "0.3", "--num-parts", "2"]
    folders = [str(out / f"part-0000{part}-of-00002") for part in (0, 1)]
    for part in (0, 1):
        notes = ".build/*.done.json"
        points = [(notes, 1), (notes, 2), ("shard-*.tar", 1)]
        _run_killed(["build", *given, "--part", str(part)], Path(folders[part]), points)
        assert folder_bytes(Path(folders[part])) == wanted[part]
    merging = ["merge", *folders, "--out", str(out / "all"), "--method", "copy", "--max-rejected", "0.3"]
    _run_killed(merging, out / "all", [(".build/*.tar", 1), (".build/*.tar", 2), ("shard-*.tar", 1)])
    assert folder_bytes(out / "all") == joined


# the command, which moves its shards up and never comes to the manifest: no kill is too late
WITHOUT_AN_END = """
import sys, time
from mellow_ds.packing import folder
from shards.cli import main
folder._sync_folder = lambda *_: time.sleep(600)
sys.exit(main(sys.argv[1:]))
"""


def _run_killed(arguments: list[str], out: Path, points: list[tuple[str, int]]) -> None:
    """Run the command, killed once `out` has so many files of a kind, for each of `points`; then to its end."""
    root = Path(__file__).resolve().parents[3]
    for pattern, count in points:
        command = [sys.executable, "-c", WITHOUT_AN_END, *arguments]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + 120
                while len(list(out.glob(pattern))) < count:
                    assert process.poll() is None, f"it ended before {pattern}"
                    assert time.monotonic() < deadline, pattern
                    time.sleep(0.01)
                assert process.poll() is None
            finally:
                process.kill()
    command = [sys.executable, "-m", "shards", *arguments]
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL, timeout=120)


def test_merging_imports_nothing_that_decodes() -> None:
    code = "import sys, mellow_ds.packing.parts.merge; print('torch' in sys.modules)"
    root = Path(merge_module.__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
