"""The whole of an evaluation with a scripted model, in one rank and in several, and what must stop it."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mellow_ds.config.schema import EvaluationConfig
from mellow_ds.data.batch import Batch
from mellow_ds.errors import FaultError
from mellow_ds.evaluation.evaluate import answer_text, evaluate
from mellow_ds.evaluation.predictions import read_predictions
from mellow_ds.evaluation.results import format_results
from mellow_ds.world import World

END_ID, FIRST_WORD = 0, 10
WORDS = ["yes", "no", "rain", "b)", "x"]


@dataclass(frozen=True)
class Example:
    """What the data side hands over, as far as evaluation reads it."""

    id: str
    question: str
    answer: str
    subtype: str
    clips: tuple[str, ...]
    said: tuple[str, ...]  # what the scripted model will answer


class Words:
    """A tokenizer of WORDS."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return " ".join(WORDS[i - FIRST_WORD] for i in token_ids)


class Scripted(torch.nn.Module):
    """Answers each row by its script when it hears that row's clip, and `yes` in silence."""

    def __init__(self, script: dict[int, tuple[str, ...]]) -> None:
        super().__init__()
        self.script = script
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[dict] = []

    def generate(self, *, input_ids, attention_mask, waveforms, clip_row, clip_start, clip_index, **options):
        self.calls.append(options)
        assert not self.training
        assert not torch.is_grad_enabled()
        assert input_ids.shape == attention_mask.shape
        assert clip_start.shape == clip_index.shape == clip_row.shape
        heard = [int(waveforms[index].max()) for index in clip_index]
        rows = [[FIRST_WORD + WORDS.index(w) for w in (self.script[h] if h else ("yes",))] for h in heard]
        longest = min(max(len(row) for row in rows) + 1, options["max_new_tokens"])
        padded = [(row + [options["eos_token_id"]] * longest)[:longest] for row in rows]
        return torch.tensor(padded)


EXAMPLES = [
    Example("e3", "is it?", "yes", "binary", ("k1",), ("yes",)),
    Example("e1", "is it?", "no", "binary", ("k2",), ("no",)),
    Example("e2", "which? a) y b) x", "b) x", "mcq", ("k3",), ("b)", "x")),
    Example("e0", "what?", "rain", "open", ("k4",), ("no", "rain")),
    Example("e4", "describe the first audio", "rain rain", "caption", ("k5",), ("rain", "rain")),
    Example("e5", "describe the first audio", "x rain", "caption", ("k6",), ("x", "rain", "rain", "rain", "rain")),
]
SCRIPT = {i + 1: example.said for i, example in enumerate(EXAMPLES)}


class Batches:
    """Batches of two examples each; an empty one at the end keeps step with other ranks."""

    def __init__(self, examples: list[Example], silence_audio: bool) -> None:
        self.examples, self.silence_audio = examples, silence_audio
        self.num_closed = 0

    def close(self) -> None:
        self.num_closed += 1

    def __iter__(self) -> Iterator[tuple[Batch, list[Example]]]:
        for start in range(0, len(self.examples) + 1, 2):
            own = self.examples[start : start + 2]
            rows = max(len(own), 1)
            loudness = [0.0 if self.silence_audio else float(EXAMPLES.index(e) + 1) for e in own] or [0.0]
            index = torch.arange(rows)
            ids = torch.ones(rows, 3, dtype=torch.long)
            waveforms = torch.tensor(loudness)[:, None].expand(rows, 8)
            yield Batch(waveforms, ids, ids, -100 * ids, index, 0 * index, index, tuple(e.id for e in own)), own


CONFIG = EvaluationConfig(max_new_tokens=4, captions=False)


def _evaluate(folder: Path, examples=EXAMPLES, world=None, config=CONFIG, model=None, **options) -> dict:
    options = {"num_expected": len(EXAMPLES), "end_id": END_ID, **options}
    model = Scripted(SCRIPT) if model is None else model
    opened: list[Batches] = []

    def open_batches(silence_audio: bool) -> Batches:
        opened.append(Batches(examples, silence_audio))
        return opened[-1]

    try:
        return evaluate(model, open_batches, Words(), world or World(), config, folder, **options)
    finally:
        assert all(batches.num_closed == 1 for batches in opened)


def test_one_rank(tmp_path: Path) -> None:
    model = Scripted(SCRIPT).train()
    results = _evaluate(tmp_path, model=model, about={"checkpoint": "step-000200"})
    assert model.training
    assert len(model.calls) == 3  # the empty batch is not generated
    assert model.calls[0] == {
        "max_new_tokens": 4,
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
        "synced_gpus": False,  # no rank waits for another, which may have no batch left
    }
    accuracy = {name: entry["accuracy"] for name, entry in results["by_subtype"].items()}
    assert accuracy == {"binary": 1.0, "mcq": 1.0, "open": 0.0, "caption": 0.5}
    assert results["overall"]["unfinished"] == 1  # e5 has five words, four tokens are generated
    assert results["about"] == {"checkpoint": "step-000200"}
    assert results["silenced"] is None
    assert json.loads((tmp_path / "results.json").read_text()) == results
    predictions = read_predictions(tmp_path / "predictions.jsonl")
    assert [(p.id, p.prediction) for p in predictions] == [
        ("e0", "no rain"),
        ("e1", "no"),
        ("e2", "b) x"),
        ("e3", "yes"),
        ("e4", "rain rain"),
        ("e5", "x rain rain rain"),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions.jsonl", "results.json"]


def test_ranks_that_make_their_passes_together_make_those_of_empty_batches_too(tmp_path: Path) -> None:
    model = Scripted(SCRIPT)
    results = _evaluate(tmp_path, model=model, in_step=True)
    assert [call["synced_gpus"] for call in model.calls] == [True] * 4  # three of examples, one without
    assert results["num_examples"] == len(EXAMPLES) == len(read_predictions(tmp_path / "predictions.jsonl"))


def test_silence_is_compared(tmp_path: Path) -> None:
    results = _evaluate(tmp_path, config=dataclasses.replace(CONFIG, compare_silence=True))
    assert results["overall"]["num_correct"] == 4
    assert results["silenced"]["overall"]["num_correct"] == 1  # `yes`, once right
    assert {p.prediction for p in read_predictions(tmp_path / "silenced/predictions.jsonl")} == {"yes"}
    binary = next(line for line in format_results(results).splitlines() if line.startswith("binary"))
    assert binary.split()[-2] == "50.0"


def test_caption_metrics_are_in_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mellow_ds.evaluation.captions.find_java", lambda: None)
    results = _evaluate(tmp_path, config=dataclasses.replace(CONFIG, captions=True))
    assert set(results["captions"]) == {"caption"}
    assert results["captions"]["caption"]["num_items"] == 2
    assert "as captions" in format_results(results)
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_together_give_what_one_gives(tmp_path: Path, size: int) -> None:
    """Ranks run at once, as threads with a real barrier; more ranks than examples included."""
    config = dataclasses.replace(CONFIG, compare_silence=True)
    barrier = threading.Barrier(size)
    returned: dict[int, dict] = {}

    def run(rank: int) -> None:
        own = EXAMPLES[rank * len(EXAMPLES) // size : (rank + 1) * len(EXAMPLES) // size]
        world = World(rank, size)
        returned[rank] = _evaluate(tmp_path / "many", own, world, config, barrier=lambda: barrier.wait(20))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # no_grad is per thread, so this thread's mode is untouched
    alone = _evaluate(tmp_path / "one", config=config)
    assert all(returned[rank] == {} for rank in range(1, size))
    for name in ("predictions.jsonl", "silenced/predictions.jsonl"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    for name in ("overall", "by_subtype", "by_kind", "silenced"):
        assert returned[0][name] == alone[name]
    assert returned[0]["generation"]["world_size"] == size


@pytest.mark.parametrize(("examples", "found"), [(EXAMPLES[:-1], "5 examples"), ([*EXAMPLES, EXAMPLES[0]], "once (e3")])
def test_wrong_sets_of_examples_give_no_results(tmp_path: Path, examples: list[Example], found: str) -> None:
    with pytest.raises(FaultError) as caught:
        _evaluate(tmp_path, examples)
    assert found in str(caught.value)
    assert not (tmp_path / "results.json").exists()


def test_a_failure_while_merging_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    calls = []
    with pytest.raises(FaultError, match="rank 1"):
        _evaluate(tmp_path, world=World(0, 2), barrier=lambda: calls.append(1))
    assert len(calls) == 2


def test_answer_text() -> None:
    assert answer_text([10, 11, 0, 12, 0], Words(), 0, 8) == ("yes no", True)
    assert answer_text([10, 11], Words(), 0, 8) == ("yes no", True)  # the batch ended before the limit
    assert answer_text([10, 11], Words(), 0, 2) == ("yes no", False)
    assert answer_text([0], Words(), 0, 1) == ("", True)
