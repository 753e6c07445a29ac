"""How long texts are for a model: in tokens of its tokenizer, or in words where none is given."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mellow_ds.errors import PackingError


def prompt_lengths(prompts: Sequence[str], tokenizer: str) -> list[int]:
    """Tokens (or words) of prompts, as the model is given them; `tokenizer` "": words."""
    if not tokenizer:
        return [len(prompt.split()) for prompt in prompts]
    return _num_tokens(tokenizer, list(prompts))


def answer_lengths(answers: Sequence[str], tokenizer: str) -> list[int]:
    """Tokens of answers, end-of-text included (or words, without); an answer stands after a blank."""
    if not tokenizer:
        return [len(answer.split()) for answer in answers]
    return [count + 1 for count in _num_tokens(tokenizer, [" " + answer for answer in answers])]


def check_tokenizer(name: str) -> None:
    """Raise `PackingError` where the tokenizer cannot be loaded."""
    _load(name)


def _num_tokens(tokenizer: str, texts: list[str]) -> list[int]:
    if not texts:
        return []
    return [len(ids) for ids in _load(tokenizer)(texts, add_special_tokens=False)["input_ids"]]


@lru_cache(maxsize=1)
def _load(name: str) -> Any:
    """The tokenizer, once a process."""
    from transformers import AutoTokenizer

    path = Path(name)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PackingError(
            f"--tokenizer {name} cannot be loaded ({reason}): name a folder with a tokenizer.json, a GGUF file, or a "
            "model of the hub"
        ) from None
