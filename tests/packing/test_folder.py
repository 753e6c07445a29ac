"""The output folder: one build at a time, nothing foreign touched, errors of the disk in one line."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mellow_ds.errors import EXIT_FAULT, FaultError, PackingError
from mellow_ds.packing.build import run_build
from mellow_ds.packing.folder import OutputFolder
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.shard_format import MANIFEST_NAME


def test_a_second_build_is_kept_out(tmp_path: Path) -> None:
    first, second = OutputFolder(tmp_path / "out"), OutputFolder(tmp_path / "out")
    with first.locked(), pytest.raises(PackingError, match="another build is writing"), second.locked():
        pass
    with OutputFolder(tmp_path / "out").locked():
        pass


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for path in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(PackingError, match=r"out.* cannot be written .*--out"), OutputFolder(path).locked():
            pass


def test_tars_of_someone_else_are_not_replaced(corpus: Any) -> None:
    out = corpus.folder / "out"
    out.mkdir()
    (out / "shard-000007.tar").write_text("mine")
    (out / "notes.part").write_text("mine")
    corpus.ask_tones(2)
    with pytest.raises(PackingError, match=r"shard-000007\.tar.*--overwrite"):
        run_build([corpus.write()], corpus.root, out, BuildSettings(workers=1))
    assert (out / "shard-000007.tar").read_text() == "mine"
    run_build([corpus.write()], corpus.root, out, BuildSettings(workers=1, overwrite=True))
    assert not (out / "shard-000007.tar").exists()
    assert (out / "notes.part").read_text() == "mine"


def test_a_build_killed_while_publishing_goes_on(corpus: Any, folder_bytes: Any) -> None:
    corpus.ask_tones(9)
    settings = BuildSettings(workers=1, shard_megabytes=0.02)
    run_build([corpus.write()], corpus.root, corpus.folder / "whole", settings)
    out = corpus.folder / "out"
    folder = OutputFolder(out)
    publish, reached = OutputFolder.publish, []

    def die(self: OutputFolder, notes: Any, manifest: Any) -> None:
        reached.append(len(notes))
        (self.path / manifest.shards[0].name).hardlink_to(self.work / manifest.shards[0].name)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            run_build([corpus.write()], corpus.root, out, settings)
    assert folder.work.is_dir()
    assert not (out / MANIFEST_NAME).exists()
    assert OutputFolder.publish is publish
    assert run_build([corpus.write()], corpus.root, out, settings).num_reused == reached[0] > 1
    assert folder_bytes(out) == folder_bytes(corpus.folder / "whole")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 480 kB: one shard of the tests below, with what is needed to make it."""
    place = tmp_path / "disk"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"size=480k"):
        pytest.skip("only root, where mounting is allowed, can make a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_to_be_full_and_nothing_is_published(corpus: Any, tiny_disk: Path) -> None:
    for number in range(8):
        corpus.tone(f"{number}.wav", seconds=3, hertz=100 + number, rate=32_000)
        corpus.ask(f"{number}.wav")
    settings = BuildSettings(workers=1, codec="pcm", shard_megabytes=0.19)
    with pytest.raises(FaultError, match=r"disk full .*start the same command again") as caught:
        run_build([corpus.write()], corpus.root, tiny_disk / "out", settings)
    assert caught.value.exit_code == EXIT_FAULT
    assert not (tiny_disk / "out" / MANIFEST_NAME).exists()
    assert not list((tiny_disk / "out").rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)
    report = run_build([corpus.write()], corpus.root, tiny_disk / "out", settings)
    assert report.num_reused > 0
    assert report.manifest.num_questions == 8


def test_a_full_disk_of_worker_processes_is_said_to_be_full(corpus: Any, tiny_disk: Path) -> None:
    for number in range(6):
        corpus.tone(f"{number}.wav", seconds=3, hertz=100 + number, rate=32_000)
        corpus.ask(f"{number}.wav")
    with pytest.raises(FaultError, match="disk full"):
        run_build(
            [corpus.write()],
            corpus.root,
            tiny_disk / "out",
            BuildSettings(workers=2, codec="pcm", shard_megabytes=0.19),
        )
