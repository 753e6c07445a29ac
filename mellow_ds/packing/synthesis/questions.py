"""The questions about synthetic clips, as ReasonAQA-style records, one family a `subtype`.

The text of a question tells nothing of its answer: yes and no, the letters of the options, and true and false
statements are balanced by construction, and what is named in a question is drawn the same way whatever the answer. What
is left to someone who does not listen is the chance level of `mellow_ds.packing.chance`.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from mellow_ds.packing.synthesis.draws import balanced_choice, stream
from mellow_ds.packing.synthesis.events import NAMES
from mellow_ds.packing.synthesis.scenes import ALONE, SEQUENCE, TOGETHER, Scene

TASKNAME = "synthetic"
LETTERS = "abcd"
PLACES = ("in a kitchen", "in a street", "in a church", "in a factory")  # what no sound of this corpus can tell

Record = dict[str, str]


def clip_path(scene: Scene, audio_format: str) -> str:
    """Where the clip of `scene` stands, relative to the corpus, `/` between folders."""
    return f"audio/{scene.split}/{scene.number:05d}.{audio_format}"


def make_records(scenes: Sequence[Scene], seed: int, audio_format: str) -> list[Record]:
    """All questions about the scenes of one split, those of a clip together."""
    writer = _Writer(scenes, seed, audio_format)
    for scene in scenes:
        for family in _FAMILIES[scene.arrangement]:
            family(writer, scene)
    return writer.records


class _Writer:
    """Collects the records of a split and knows what the families need beyond their clip."""

    def __init__(self, scenes: Sequence[Scene], seed: int, audio_format: str) -> None:
        self.records: list[Record] = []
        self._audio_format = audio_format
        self.seed = seed
        self._num_draws: Counter[str] = Counter()
        self._alone: dict[str, list[Scene]] = {name: [] for name in NAMES}
        for scene in scenes:
            if scene.arrangement == ALONE:
                self._alone[scene.names[0]].append(scene)

    def add(self, subtype: str, scene: Scene, question: str, answer: str, second: Scene | None = None) -> None:
        """One record about `scene`, or about it and `second`."""
        self.records.append(
            {
                "taskname": TASKNAME,
                "filepath1": clip_path(scene, self._audio_format),
                "filepath2": clip_path(second, self._audio_format) if second else "",
                "caption1": scene.caption,
                "caption2": second.caption if second else "",
                "input": question,
                "answer": answer,
                "subtype": subtype,
            }
        )

    def balanced(self, series: str, scene: Scene, num_choices: int) -> int:
        """The next of 0 .. num_choices - 1 in the series of that name, balanced over the split."""
        position = self._num_draws[series]
        self._num_draws[series] += 1
        return balanced_choice(range(num_choices), position, self.seed, scene.split, series)

    def pick(self, purpose: str, scene: Scene, choices: Sequence[str], count: int) -> list[str]:
        """`count` different ones of `choices`, in random order."""
        order = stream(self.seed, scene.split, scene.number, purpose).permutation(len(choices))
        return [choices[int(i)] for i in order[:count]]

    def partner(self, purpose: str, scene: Scene, same: bool) -> Scene | None:
        """Another clip of one event, of the same kind or of another; None where the split has no such clip."""
        rng = stream(self.seed, scene.split, scene.number, purpose)
        others = [name for name in NAMES if (name == scene.names[0]) is same and self._alone[name]]
        if not others:
            return None
        fits = [s for s in self._alone[others[int(rng.integers(len(others)))]] if s.number != scene.number]
        return fits[int(rng.integers(len(fits)))] if fits else None


def _absent(scene: Scene) -> list[str]:
    return [name for name in NAMES if name not in scene.names]


def _lettered(question: str, options: Sequence[str]) -> str:
    """The question with its options on one line, as MMAU words them."""
    return " ".join([question, *(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))])


def _event_open(writer: _Writer, scene: Scene) -> None:
    writer.add("event-open", scene, "what sound is heard?", scene.names[0])


def _event_mcq(writer: _Writer, scene: Scene) -> None:
    """One option is heard, three are not."""
    heard = writer.pick("event-mcq heard", scene, scene.names, 1)[0]
    options = writer.pick("event-mcq others", scene, _absent(scene), len(LETTERS) - 1)
    place = writer.balanced("event-mcq", scene, len(LETTERS))
    options.insert(place, heard)
    writer.add("event-mcq", scene, _lettered("which sound is heard?", options), f"{LETTERS[place]}) {heard}")


def _event_binary(writer: _Writer, scene: Scene) -> None:
    is_heard = writer.balanced("event-binary", scene, 2) == 1
    name = writer.pick("event-binary", scene, scene.names if is_heard else _absent(scene), 1)[0]
    writer.add("event-binary", scene, f"is {name} heard? answer yes or no", "yes" if is_heard else "no")


def _count_open(writer: _Writer, scene: Scene) -> None:
    writer.add("count-open", scene, "how many different sounds are heard?", ("one", "two")[len(scene.names) - 1])


def _order_mcq(writer: _Writer, scene: Scene) -> None:
    """Both sounds of the sequence are among the options: to know which sounds are heard is not enough."""
    end = writer.balanced("order-mcq end", scene, 2)
    place = writer.balanced("order-mcq", scene, len(LETTERS))
    right, wrong = scene.names[end], scene.names[1 - end]
    others = writer.pick("order-mcq others", scene, _absent(scene), len(LETTERS) - 2)
    options = writer.pick("order-mcq wrong ones", scene, [wrong, *others], len(LETTERS) - 1)
    options.insert(place, right)
    question = f"which sound comes {('first', 'last')[end]}?"
    writer.add("order-mcq", scene, _lettered(question, options), f"{LETTERS[place]}) {right}")


def _caption(writer: _Writer, scene: Scene) -> None:
    writer.add("caption", scene, "caption first audio", scene.caption)


def _entailment(writer: _Writer, scene: Scene) -> None:
    """A true or false statement, half of them with a place added, which nothing in the sound can tell.

    False: contradiction, with a place or without. True: entailment, or, with a place, neutral. So the text leaves two
    answers, equally likely, and half of all answers are contradictions. The statement shows the arrangement, so each
    has a balanced series of its own.
    """
    is_true, has_place = divmod(writer.balanced(f"entailment {scene.arrangement}", scene, 4), 2)
    statement = _true_statement(scene) if is_true else _false_statement(writer, scene)
    if has_place:
        statement += " " + writer.pick("entailment place", scene, PLACES, 1)[0]
    answer = ("neutral" if has_place else "entailment") if is_true else "contradiction"
    question = f"does the audio entail the statement '{statement}'? answer entailment, neutral or contradiction"
    writer.add("entailment", scene, question, answer)


def _statement(names: Sequence[str], arrangement: str) -> str:
    if arrangement == SEQUENCE:
        return f"{names[0]} is heard before {names[1]}"
    if arrangement == TOGETHER:
        return f"{names[0]} is heard together with {names[1]}"
    return f"{names[0]} is heard"


def _true_statement(scene: Scene) -> str:
    return _statement(scene.names, scene.arrangement)


def _false_statement(writer: _Writer, scene: Scene) -> str:
    """The order turned round; or one sound replaced by one that is not heard."""
    names = list(scene.names)
    if scene.arrangement == SEQUENCE:
        return _statement(names[::-1], SEQUENCE)
    replaced = int(stream(writer.seed, scene.split, scene.number, "entailment replaced").integers(len(names)))
    names[replaced] = writer.pick("entailment false", scene, _absent(scene), 1)[0]
    return _statement(sorted(names, key=NAMES.index), scene.arrangement)


def _same_binary(writer: _Writer, scene: Scene) -> None:
    is_same = writer.balanced("same-binary", scene, 2) == 1
    second = writer.partner("same-binary", scene, is_same)
    if second is not None:
        question = "is the same sound heard in both audios? answer yes or no"
        writer.add("same-binary", scene, question, "yes" if is_same else "no", second)


def _difference(writer: _Writer, scene: Scene) -> None:
    second = writer.partner("difference", scene, same=False)
    if second is not None:
        answer = f"the first audio has {scene.caption}, the second {second.caption}"
        writer.add("difference", scene, "explain the difference in few words", answer, second)


_Family = Callable[[_Writer, Scene], None]
_ANY: tuple[_Family, ...] = (_event_mcq, _event_binary, _count_open, _caption, _entailment)
_FAMILIES: dict[str, tuple[_Family, ...]] = {
    ALONE: (_event_open, *_ANY, _same_binary, _difference),
    SEQUENCE: (*_ANY, _order_mcq),
    TOGETHER: _ANY,
}
