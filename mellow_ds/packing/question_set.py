"""Records and the clips behind their paths, brought together: questions with content ids, and the records left out."""

from collections import Counter
from dataclasses import dataclass

from mellow_ds.packing.drop_list import DropList
from mellow_ds.packing.records import Record, RecordSet, Rejection
from mellow_ds.packing.survey import Survey
from mellow_ds.shard_format import Question, question_id

_NO_DROP_LIST = DropList()


@dataclass(frozen=True)
class QuestionSet:
    """The usable questions; `reject` takes one out when its clip turns out bad."""

    questions: dict[str, Question]  # by id, in the order of the records
    record_of: dict[str, Record]  # by question id
    rejections: list[Rejection]
    matched: set[str]  # keys and ids on the drop list that came up
    dropped: Counter[str]  # questions that the drop list takes out: with their "clip", or by "question"

    def reject(self, question_id: str, path_keys: dict[str, str], bad_key: str, reason: str, detail: str) -> None:
        """Move a question to the rejections, by its record and the path of the clip `bad_key`."""
        record = self.record_of[question_id]
        path = next(path for path in record.paths if path_keys[path] == bad_key)
        self.rejections.append(Rejection(record.file, record.number, path, reason, detail))
        del self.questions[question_id]


def gather_questions(records: RecordSet, survey: Survey, drop_list: DropList = _NO_DROP_LIST) -> QuestionSet:
    """Questions of all records whose clips are usable as far as their headers say; the others are rejected.

    What `drop_list` names is left out and counted apart. The ids of the others stay as they are without one.
    """
    found = QuestionSet({}, {}, list(records.rejections), set(), Counter())
    occurrences: Counter[str] = Counter()
    same_clips: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple for all questions about the same clips
    for record in records.records:
        bad = next((path for path in record.paths if path in survey.bad), None)
        if bad is not None:
            fault = survey.bad[bad]
            found.rejections.append(Rejection(record.file, record.number, bad, fault.reason, fault.detail))
            continue
        clips = tuple(survey.key_of[path] for path in record.paths)
        question = _question(record, same_clips.setdefault(clips, clips), occurrences)
        on_list = drop_list.clips.intersection(clips) | drop_list.questions.intersection((question.id,))
        if on_list:
            found.matched.update(on_list)
            found.dropped["question" if on_list == {question.id} else "clip"] += 1
        else:
            found.questions[question.id] = question
            found.record_of[question.id] = record
    return found


def _question(record: Record, clips: tuple[str, ...], occurrences: Counter[str]) -> Question:
    """The question of a record; `occurrences` counts those that say the same, by the id of the first."""
    texts = (record.input, record.answer, record.subtype)
    first_id = question_id(clips, *texts, 0)
    occurrence = occurrences[first_id]
    occurrences[first_id] += 1
    return Question(
        id=question_id(clips, *texts, occurrence) if occurrence else first_id,
        clips=clips,
        input=record.input,
        answer=record.answer,
        subtype=record.subtype,
        taskname=record.taskname,
        captions=record.captions,
    )
