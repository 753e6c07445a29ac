"""Caption metrics against re-implementations, closed forms and hand cases; METEOR and PTB tokens where Java is."""

import math
from collections import Counter

import pytest

from mellow_ds.evaluation.captions import CaptionItem, caption_items, caption_metrics, plain_tokenize
from mellow_ds.evaluation.java_metrics import find_java
from mellow_ds.evaluation.predictions import Prediction, score_prediction

needs_java = pytest.mark.skipif(find_java() is None, reason="no java on this machine: METEOR and PTB cannot run")

ITEMS = [
    CaptionItem("a dog barks loudly in the rain", ("a dog is barking in the rain", "loud barking while it rains")),
    CaptionItem("birds sing and a car passes by", ("birds sing while a car passes", "a car passes by as birds sing")),
    CaptionItem("a man speaks in a room", ("a woman speaks in a small room and laughs",)),
]


def _scores(items: list[CaptionItem]) -> dict[str, float | None]:
    return caption_metrics({"s": items}, java=None)["s"]["scores"]


def _bleu(items: list[CaptionItem], order: int) -> float:
    """Papineni et al. 2002, with the reference length closest to the prediction's (the shorter on a tie)."""

    def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    log_precision = 0.0
    for n in range(1, order + 1):
        hits = total = 0
        for item in items:
            said = grams(item.prediction.split(), n)
            most = Counter()
            for reference in item.references:
                most |= grams(reference.split(), n)
            hits += sum((said & most).values())
            total += sum(said.values())
        log_precision += math.log(hits / total) / order
    said_length = sum(len(item.prediction.split()) for item in items)
    reference_length = sum(
        min((abs(len(r.split()) - len(item.prediction.split())), len(r.split())) for r in item.references)[1]
        for item in items
    )
    return math.exp(log_precision + min(0.0, 1 - reference_length / said_length))


def test_bleu_equals_the_formula() -> None:
    scores = _scores(ITEMS)
    for n in (1, 2, 3):
        assert scores[f"BLEU-{n}"] == pytest.approx(_bleu(ITEMS, n), rel=1e-6)


def test_identical_captions_score_full() -> None:
    items = [CaptionItem("a b c d e", ("a b c d e",)), CaptionItem("f g h i j", ("f g h i j",))]
    scores = _scores(items)
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(1.0, abs=1e-6)
    # cosine 1 for each of four n-gram orders, times 10
    assert scores["CIDEr"] == pytest.approx(10.0)


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "the cat": precision 2/3, recall 2/5, beta 1.2
    item = CaptionItem("the cat sat", ("the cat on the mat",))
    precision, recall, beta2 = 2 / 3, 2 / 5, 1.44
    wanted = (1 + beta2) * precision * recall / (recall + beta2 * precision)
    assert _scores([item])["ROUGE-L"] == pytest.approx(wanted)


def test_cider_by_hand() -> None:
    """One word each: idf log 2, cosine 1 of four orders (the longer n-grams are absent), so 10 / 4; a miss gives 0."""
    assert _scores([CaptionItem("rain", ("rain",)), CaptionItem("wind", ("wind",))])["CIDEr"] == pytest.approx(2.5)
    assert _scores([CaptionItem("rain", ("wind",)), CaptionItem("wind", ("rain",))])["CIDEr"] == 0.0
    half = _scores([CaptionItem("rain", ("rain", "snow")), CaptionItem("fog", ("wind",))])["CIDEr"]
    assert half == pytest.approx(2.5 / 2 / 2)  # right by one of two references, in one of two items


def test_what_cannot_be_computed_is_none_with_a_reason() -> None:
    result = caption_metrics({"s": [CaptionItem("a b", ("a b",))]}, java=None)["s"]
    assert result["tokenizer"] == "plain"
    for name in ("CIDEr", "METEOR", "SPICE", "SPIDEr", "BLEU-3", "BLEU-4"):
        assert result["scores"][name] is None
        assert result["reasons"][name]
    assert result["reasons"]["METEOR"] == result["reasons"]["ptb"] == "no java on this machine"


def test_empty_predictions_score_zero() -> None:
    scores = _scores([CaptionItem("", ("a dog",)), CaptionItem("", ("a cat",))])
    assert scores["ROUGE-L"] == scores["CIDEr"] == 0.0
    assert scores["BLEU-1"] is None


def test_no_items() -> None:
    assert caption_metrics({}) == {}
    assert caption_metrics({"s": []}) == {}


def test_plain_tokenization() -> None:
    assert plain_tokenize("A dog's well-known BARK, 3.5 times (twice)!") == "a dog's well-known bark 3.5 times twice"


def _prediction(i: int, subtype: str, clips: tuple[str, ...], question: str, answer: str) -> Prediction:
    return score_prediction(f"{i:02d}", subtype, clips, question, answer, f"said {i}")


def test_references_of_a_clip_are_one_item() -> None:
    caption, other = "describe the first audio", "describe the second audio"
    items = caption_items(
        [
            _prediction(0, "caption", ("k1",), caption, "a dog barks"),
            _prediction(1, "caption", ("k2",), caption, "a cat"),
            _prediction(2, "caption", ("k1",), caption, "barking"),
            _prediction(3, "caption", ("k1", "k2"), other, "a cat meows"),
        ]
    )
    assert items == {
        "caption": [
            CaptionItem("said 0", ("a dog barks", "barking")),
            CaptionItem("said 1", ("a cat",)),
            CaptionItem("said 3", ("a cat meows",)),
        ]
    }


def test_which_subtypes_are_captions() -> None:
    predictions = [
        _prediction(0, "open", ("k",), "which digit is spoken?", "nine"),
        _prediction(1, "binary", ("k",), "is it?", "yes"),
        _prediction(2, "mcq", ("k",), "which? a) x b) y", "a) x"),
        _prediction(3, "detail", ("k",), "why is it loud?", "because a train passes very close"),
        _prediction(4, "difference", ("k", "l"), "explain the difference between the two audios in one sentence", "x"),
    ]
    assert set(caption_items(predictions)) == {"detail", "difference"}


@needs_java
@pytest.mark.slow
def test_with_java() -> None:
    groups = {
        "first": [
            CaptionItem("A dog barks, loudly!", ("a dog barks loudly",)),
            CaptionItem("A cat's \u00e9lan (meow)", ("a cat's \u00e9lan (meow)",)),
            CaptionItem("", ("rain falls",)),
        ],
        "second": [CaptionItem("the dog is barking", ("a dog ||| barks",)), CaptionItem("rain", ("rain",))],
    }
    results = caption_metrics(groups)
    first, second = results["first"], results["second"]
    assert first["tokenizer"] == "ptb"
    assert first["scores"]["METEOR"] is not None
    assert second["scores"]["METEOR"] is not None
    assert 0.3 < first["scores"]["METEOR"] < 1.0
    # METEOR of "the dog is barking" for "a dog barks" is 0.168 (called by hand); with an exact second item it is higher
    assert 0.168 < second["scores"]["METEOR"] < 1.0
    # two of three predictions equal their references once tokenized: a longest common subsequence of all words
    assert first["scores"]["ROUGE-L"] == pytest.approx(2 / 3)
    # no network, no models: SPICE says why it is missing and fetched nothing
    assert "models are not installed" in first["reasons"]["SPICE"]
