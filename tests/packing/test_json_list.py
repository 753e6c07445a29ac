"""JSON lists entry by entry: the same as reading them whole, whatever the cuts between blocks."""

import hashlib
import json
from pathlib import Path

import pytest

from mellow_ds.errors import PackingError
from mellow_ds.packing import json_list
from mellow_ds.packing.json_list import JsonList

LISTS = [
    "[]",
    " [ ] \n",
    '[{"a": 1}]',
    '\ufeff[{"a": "b\\"],[{ \\u00e9 \u00e9 \U0001f600"}, 12, -3.5e7, true, null, "x", [[], {"c": [1, {}]}]]\r\n',
    '[{"long": "' + "x" * 500 + '"} , {}\n,\t123456]',
]


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_the_entries_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, block: int
) -> None:
    monkeypatch.setattr(json_list, "_BLOCK_BYTES", block)
    path = tmp_path / "list.json"
    path.write_text(text, encoding="utf-8")
    entries = JsonList(path)
    assert list(entries) == json.loads(text.lstrip("\ufeff"))
    assert entries.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entries.num_entries == len(json.loads(text.lstrip("\ufeff")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{}", "holds a JSON dict"),
        ('"text"', "holds a JSON str"),
        ("[{}", "is not JSON"),
        ("[{},]", "is not JSON"),
        ("[{} {}]", "is not JSON"),
        ("[,{}]", "is not JSON"),
        ("[{}]]", "is not JSON"),
        ("[{}] x", "is not JSON"),
        ('[{"a": tru}]', r"is not JSON .*line 1 column 8"),
        ("[1, 2]", "a list without an object"),
        ("[" * 100_000, "is not JSON"),
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 5])
def test_what_is_no_list_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, block: int
) -> None:
    monkeypatch.setattr(json_list, "_BLOCK_BYTES", max(block, len(text) // 10))  # the long text in ten blocks
    path = tmp_path / "list.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PackingError, match=rf"list\.json .*{message}"):
        list(JsonList(path))


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(PackingError, match=r"list\.json is not JSON"):
        list(JsonList(path))
    with pytest.raises(PackingError, match=r"gone\.json cannot be read .*--json"):
        list(JsonList(tmp_path / "gone.json"))


def test_a_large_file_is_not_read_whole_to_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_EXPLAINED_BYTES", 100)
    monkeypatch.setattr(json_list, "_MOST_ENTRY_CHARS", 1_000)
    monkeypatch.setattr(json_list, "_BLOCK_BYTES", 300)
    path = tmp_path / "records.json"
    for fault in ("{]" + " " * 100, '{"never": "closed' + " " * 100_000):
        path.write_text('[{"a": 1}, {"b": 2},' + fault)
        entries = JsonList(path)
        with pytest.raises(PackingError, match="no JSON list from about entry 2 on"):
            list(entries)
