"""What an audit may be told, and the kinds of things that it finds. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from mellow_ds.config.schema import DataConfig
from mellow_ds.errors import PackingError


@dataclass(frozen=True)
class Kind:
    """One kind of finding."""

    what: Literal["clip", "question"]
    serious: bool  # --strict ends with code 2 for it
    title: str  # of the table; {names} are fields of `AuditSettings`
    in_drop_list: bool  # by default


KINDS: dict[str, Kind] = {
    "damaged": Kind("clip", True, "samples that cannot be read", False),
    "silent": Kind("clip", True, "peak under {silent_peak:g} or RMS under {silent_rms:g} dBFS", True),
    "clipped": Kind("clip", False, "over {clipped_share:.2%} of the samples at full scale", False),
    "duplicate": Kind("clip", False, "same decoded audio as another clip of the split", True),
    "shared-clip": Kind("clip", True, "clips that a later split has too", True),
    "shared-question": Kind("question", True, "questions that a later split has too", True),
    "repeated-question": Kind("question", False, "same audio, prompt and answer as another", False),
    "empty": Kind("question", True, "empty prompt or answer", True),
    "options": Kind("question", True, "multiple choice whose options or answer cannot be read", True),
    "long-prompt": Kind("question", False, "prompt over {ip_text_len} {unit}, cut", False),
    "long-answer": Kind("question", False, "answer over {op_text_len} {unit}{end}, cut", False),
}
DEFAULT_DROP = tuple(name for name, kind in KINDS.items() if kind.in_drop_list)


@dataclass(frozen=True)
class AuditSettings:
    """How an audit looks."""

    silent_peak: float = -50.0
    """dBFS; a clip whose loudest sample is quieter is near silent (here full scale is 0, 16-bit noise about -90)."""
    silent_rms: float = -65.0
    """dBFS; so is one whose root mean square is lower, clicks or not."""
    clipped_share: float = 0.001
    """Share of the samples at full scale above which a clip is clipped. A clip merely normalised has one or two."""
    ip_text_len: int = DataConfig.ip_text_len
    """Most tokens of a prompt, as data.ip_text_len."""
    op_text_len: int = DataConfig.op_text_len
    """Most tokens of an answer, end-of-text included, as data.op_text_len."""
    tokenizer: str = ""
    """Folder, GGUF file or hub name of the tokenizer; empty: texts are measured in words."""

    def __post_init__(self) -> None:
        for name in ("silent_peak", "silent_rms"):
            if getattr(self, name) > 0:
                raise PackingError(f"--{name.replace('_', '-')} is {getattr(self, name):g} dBFS; it must be 0 or less")
        if not 0 <= self.clipped_share <= 1:
            raise PackingError(f"--clipped-share is {self.clipped_share:g}; it is a share, from 0 to 1")
        for name in ("ip_text_len", "op_text_len"):
            if getattr(self, name) < 1:
                raise PackingError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")

    @property
    def unit(self) -> str:
        """What texts are measured in."""
        return "tokens" if self.tokenizer else "words"

    def title(self, kind: str) -> str:
        """The title of a kind with the thresholds in it."""
        end = " (end-of-text included)" if self.tokenizer else ""
        return KINDS[kind].title.format(**vars(self), unit=self.unit, end=end)
