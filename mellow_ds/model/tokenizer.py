"""A tokenizer of whole words, trained on the corpus: what a decoder made from nothing reads and writes.

Each word is one token wherever it stands, each punctuation mark another, and decoding gives the text back exactly.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"

_BLANK = "\u2581"  # stands for a blank inside a token, as SentencePiece has it
_PIECES = rf"{_BLANK}?\w+|{_BLANK}?[^\w\s{_BLANK}]|[\s{_BLANK}]"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The `vocab_size` most frequent words and marks of `texts` (end-of-text is id 0, unknown id 1); a function of the
    multiset of texts alone. A text decodes to itself when its words are known and it does not begin with a blank."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # a blank is put before the first word too, so that a word is the same token at the start of a text
            pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_BLANK, prepend_scheme="always", split=False)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=0, special_tokens=[END_OF_TEXT, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
