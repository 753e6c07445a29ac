"""Caption metrics through pycocoevalcap: BLEU 1-4, ROUGE-L, CIDEr in Python; METEOR, SPICE, SPIDEr where Java can.

Nothing is downloaded. What cannot be computed is None in the scores, with a reason beside it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mellow_ds.evaluation.java_metrics import JavaUnavailableError, Meteor, find_java, ptb_tokenize, spice
from mellow_ds.evaluation.predictions import Prediction
from mellow_ds.prompt import PHRASINGS

SCORE_NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR", "SPICE", "SPIDEr")
# From this many words on an answer is a sentence, which equality alone does not judge well.
_SENTENCE_WORDS = 5
_PLAIN_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:['-][^\W_]+)*")


@dataclass(frozen=True)
class CaptionItem:
    """One thing described: the prediction and all its references."""

    prediction: str
    references: tuple[str, ...]


def caption_items(predictions: Sequence[Prediction]) -> dict[str, list[CaptionItem]]:
    """The items of each subtype that holds captions or descriptions, in the order of first appearance.

    A subtype does when at least half of its examples scored by exact match ask with one of our caption or difference
    phrasings or have an answer of five words or more. Examples of the same clips and question are one item with
    several references (Clotho has five a clip); its prediction is that of the first.
    """
    phrasings = {text for family in PHRASINGS.values() for text in family}
    items: dict[str, list[CaptionItem]] = {}
    for subtype in dict.fromkeys(p.subtype for p in predictions):
        own = [p for p in predictions if p.subtype == subtype and p.kind == "exact"]
        described = sum(p.question in phrasings or len(p.answer.split()) >= _SENTENCE_WORDS for p in own)
        if not own or 2 * described < len(own):
            continue
        groups: dict[tuple[tuple[str, ...], str], list[Prediction]] = {}
        for p in own:
            groups.setdefault((p.clips, p.question), []).append(p)
        items[subtype] = [CaptionItem(group[0].prediction, tuple(p.answer for p in group)) for group in groups.values()]
    return items


def caption_metrics(
    groups: Mapping[str, Sequence[CaptionItem]], java: str | bool | None = True
) -> dict[str, dict[str, Any]]:
    """The metrics of each group (a subtype's items).

    `java` is the program to use, True for the one that is found, None or False for none. Each result holds
    `num_items`, `num_references`, `tokenizer` (`ptb`, or `plain`: lower case, words and numbers, inner apostrophes and
    hyphens kept), `scores` (by SCORE_NAMES, all 0 .. 1 but CIDEr, 0 .. 10, and SPIDEr, the mean of CIDEr and SPICE;
    None where not computed) and `reasons` (why not, by score; and `ptb`, where the plain tokenizer stood in).
    """
    program = find_java() if java is True else (java or None)
    results: dict[str, dict[str, Any]] = {}
    if not any(groups.values()):
        return results
    tokenized, tokenizer, reasons = _tokenize(groups, program)
    with ExitStack() as stack:
        meteor: Meteor | str
        try:
            meteor = stack.enter_context(Meteor(program))
        except JavaUnavailableError as error:
            meteor = str(error)
        for subtype, items in groups.items():
            if not items:
                continue
            scores, own_reasons = _scores(tokenized[subtype], meteor, program)
            results[subtype] = {
                "num_items": len(items),
                "num_references": sum(len(item.references) for item in items),
                "tokenizer": tokenizer,
                "scores": scores,
                "reasons": {**reasons, **own_reasons},
            }
    return results


def _tokenize(
    groups: Mapping[str, Sequence[CaptionItem]], java: str | None
) -> tuple[dict[str, list[CaptionItem]], str, dict[str, str]]:
    """(tokenized groups, tokenizer's name, reasons); all groups by the same tokenizer."""
    texts = [text for items in groups.values() for item in items for text in (item.prediction, *item.references)]
    texts = [text.replace("|||", " ") for text in texts]  # it parts METEOR's fields
    try:
        tokens, name, reasons = ptb_tokenize(java, texts), "ptb", {}
    except JavaUnavailableError as error:
        tokens, name, reasons = [plain_tokenize(text) for text in texts], "plain", {"ptb": str(error)}
    each = iter(tokens)
    tokenized = {
        subtype: [CaptionItem(next(each), tuple(next(each) for _ in item.references)) for item in items]
        for subtype, items in groups.items()
    }
    return tokenized, name, reasons


def plain_tokenize(text: str) -> str:
    """Lower-case words and numbers with blanks between; punctuation dropped, inner apostrophes and hyphens kept."""
    return " ".join(_PLAIN_WORD.findall(text.lower()))


def _scores(
    items: Sequence[CaptionItem], meteor: Meteor | str, java: str | None
) -> tuple[dict[str, float | None], dict[str, str]]:
    scores: dict[str, float | None] = dict.fromkeys(SCORE_NAMES)
    reasons: dict[str, str] = {}
    scores.update(_bleu_and_rouge(items))
    longest = max(len(item.prediction.split()) for item in items)
    for n in range(longest + 1, 5):
        # pycocoevalcap then returns the quotient of its two guards against division by zero
        scores[f"BLEU-{n}"], reasons[f"BLEU-{n}"] = None, f"no prediction has {n} words"
    frequencies = Counter(word for item in items for text in item.references for word in text.split())
    if len(items) < 2 or not frequencies:
        # it weighs n-grams by their rarity among the items: with one, every weight is log(1/1)
        reasons["CIDEr"] = "needs at least two items"
    else:
        scores["CIDEr"] = _cider(items)
    pairs = [(item.prediction, item.references) for item in items]
    try:
        if isinstance(meteor, str):
            raise JavaUnavailableError(meteor)
        scores["METEOR"] = meteor.score(pairs)
    except JavaUnavailableError as error:
        reasons["METEOR"] = str(error)
    try:
        scores["SPICE"] = spice(java, pairs)
    except JavaUnavailableError as error:
        reasons["SPICE"] = str(error)
    if scores["SPICE"] is None or scores["CIDEr"] is None:
        reasons["SPIDEr"] = "is the mean of CIDEr and SPICE"
    else:
        scores["SPIDEr"] = (scores["CIDEr"] + scores["SPICE"]) / 2
    return scores, reasons


def _coco_form(items: Sequence[CaptionItem]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    return {i: list(item.references) for i, item in enumerate(items)}, {
        i: [item.prediction] for i, item in enumerate(items)
    }


def _bleu_and_rouge(items: Sequence[CaptionItem]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    references, predictions = _coco_form(items)
    bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    rouge, _ = Rouge().compute_score(references, predictions)
    return {**{f"BLEU-{n + 1}": float(value) for n, value in enumerate(bleu)}, "ROUGE-L": float(rouge)}


def _cider(items: Sequence[CaptionItem]) -> float:
    from pycocoevalcap.cider.cider import Cider

    score, _ = Cider().compute_score(*_coco_form(items))
    return float(score)
