"""All texts of shard folders, for training a tokenizer on them."""

from collections.abc import Iterator

from mellow_ds.data.reader import ShardReader
from mellow_ds.prompt import PHRASINGS, render_question


def iterate_texts(reader: ShardReader) -> Iterator[str]:
    """Prompts and answers of all questions as the model is given them, in the order of storage; nothing is random.

    A placeholder gives every phrasing of its family, once for each question, so that no phrasing is a rare text.
    """
    for shard in range(len(reader.shards)):
        for info in reader.infos(shard):
            for question in info.questions:
                num_phrasings = len(PHRASINGS.get(question.input.strip().lower(), (question.input,)))
                for draw in range(num_phrasings):
                    prompt, answer = render_question(question.input, question.answer, question.captions, draw)
                    yield prompt
                yield answer
