"""The list of audio files on disk: numbers, order, faults, and errors of the disk."""

import errno
import sqlite3
from pathlib import Path

import pytest

from mellow_ds.packing import catalogue as catalogue_module
from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.decode import BadClip


@pytest.mark.parametrize("is_named", [True, False])
def test_a_path_has_one_number_and_comes_in_its_place(
    tmp_path: Path, is_named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_module, "_CACHED_PATHS", 4)
    names = [f"d{number % 7}/\u00e9 {number * 37 % 100}.wav" for number in range(100)] + [
        "Z",
        "a",
        "\U0001f600",
        "\uffee",
    ]
    file = tmp_path / "a folder#%" / "files.part"
    file.parent.mkdir()
    file.write_text("what a killed build left")
    with Catalogue(file if is_named else None) as catalogue:
        numbers = {name: catalogue.number_of(name) for name in names}
        assert list(numbers.values()) == list(range(len(set(names))))
        assert {name: catalogue.number_of(name) for name in reversed(names)} == numbers
        assert [path for _, path in catalogue.in_order()] == sorted(set(names))
        assert all(catalogue.path_of(number) == path for number, path in catalogue.in_order())
        assert len(catalogue) == len(numbers)
        catalogue.note_fault(3, BadClip("cut short", "9 of 10"))
        assert catalogue.fault_of(2) is None
        fault = catalogue.fault_of(3)
        assert fault is not None
        assert (fault.reason, fault.detail) == ("cut short", "9 of 10")
    assert [path.name for path in file.parent.iterdir()] == ["files.part"]


def test_a_full_disk_is_an_error_of_the_system() -> None:
    for message, number in (("database or disk is full", errno.ENOSPC), ("disk I/O error", errno.EIO)):
        with pytest.raises(OSError, match=message) as caught, catalogue_module._as_os_errors():
            raise sqlite3.OperationalError(message)
        assert caught.value.errno == number
