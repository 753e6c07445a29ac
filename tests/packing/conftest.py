"""A small corpus on disk: tones as audio files, records as JSON."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile


@dataclass
class Corpus:
    """Audio files below `root` and a list of records about them."""

    folder: Path
    records: list[Any] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.folder / "audio"

    def tone(self, name: str, seconds: float = 0.05, rate: int = 8_000, hertz: float = 440.0, **options: Any) -> Path:
        """A tone in the file `name` (its ending gives the format); `options` are soundfile's, or channels."""
        channels = options.pop("channels", 1)
        wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.repeat(wave[:, None], channels, axis=1), rate, **options)
        return path

    def ask(self, *clips: str, answer: str = "yes", **fields: Any) -> None:
        """A record in ReasonAQA's form about one or two clips."""
        record = {
            "taskname": "test",
            "filepath1": clips[0],
            "filepath2": clips[1] if len(clips) > 1 else "",
            "caption1": "",
            "caption2": "",
            "input": "is it a tone?",
            "answer": answer,
            "subtype": "binary",
        }
        self.records.append({**record, **fields})

    def ask_tones(self, count: int, pairs: bool = True) -> None:
        """`count` different tones, a question each, and one about each with its successor."""
        names = [f"tone-{number:03d}.wav" for number in range(count)]
        for number, name in enumerate(names):
            self.tone(name, seconds=0.05 + 0.001 * number, hertz=200 + 10 * number)
            self.ask(name, answer=f"tone {number}")
            if pairs:
                self.ask(name, names[(number + 1) % count], subtype="pair")

    def write(self, name: str = "records.json") -> Path:
        """The JSON file with the records so far."""
        path = self.folder / name
        path.write_text(json.dumps(self.records), encoding="utf-8")
        return path


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "audio").mkdir()
    return Corpus(tmp_path)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Name and content of every file of a folder, those in subfolders included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(name="folder_bytes")
def _folder_bytes() -> Any:
    return folder_bytes
