"""The file of questions: each clip's come back as they went in, whatever else is in the file."""

from pathlib import Path

from mellow_ds.packing.question_file import QuestionWriter, StoredQuestion, read_questions


def stored(number: int, text: str = "tone?") -> StoredQuestion:
    return StoredQuestion(1, number, (7, number), f"{number:032x}", ("a", "b"), text, "ja \u00fc", "x", "t", ("c", ""))


def test_the_questions_of_a_clip_come_back_in_order(tmp_path: Path) -> None:
    given = {2: [stored(0), stored(1)], 0: [stored(2, "long " * 100_000), stored(3)], 3: [stored(4)]}
    with QuestionWriter(tmp_path / "questions", 4) as writer:
        for clip, questions in given.items():
            for question in questions:
                writer.add(clip, question)
    with writer.path.open("rb", buffering=0) as file:
        for clip in (3, 0, 1, 2):
            assert list(read_questions(file, writer.span(clip))) == given.get(clip, [])
    question = given[2][1].question
    assert (question.id, question.clips, question.captions, question.answer) == (
        f"{1:032x}",
        ("a", "b"),
        ("c", ""),
        "ja \u00fc",
    )
