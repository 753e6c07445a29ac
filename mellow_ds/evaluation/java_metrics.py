"""The Java programs that pycocoevalcap ships: PTB tokenizer, METEOR, SPICE. Started by us, with time-outs.

pycocoevalcap's own wrappers wait for ever on a program that says nothing, write beside the installed package, and
SPICE's downloads a model. Here a program that is missing, fails or is late raises `JavaUnavailableError` with the
reason, and no process outlives the call. The output is the same: these are the same programs with the same options.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import IO

_PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR_JAR = "meteor/meteor-1.5.jar"
_SPICE_JAR = "spice/spice-1.0.jar"
# SPICE parses with these; pycocoevalcap leaves them to be fetched (500 MB).
_SPICE_MODELS = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")

# Seconds. Measured on 2 cores: METEOR loads for 12 s and takes 0.7 ms an item; the tokenizer 0.2 s and 20,000 lines/s;
# SPICE is known for tens of seconds of loading and some 0.1 s an item. The limits are for machines ten times slower.
_START_SECONDS = 180.0
_SECONDS_PER_LINE = 0.02
_SPICE_SECONDS_PER_ITEM = 2.0


class JavaUnavailableError(Exception):
    """A Java program cannot be had or did not do its work; the text is the reason, for the results."""


def find_java() -> str | None:
    """The `java` program: JAVA_HOME's, else the one on the PATH; None where there is none."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    return found or shutil.which("java")


def package_folder() -> Path:
    """Where pycocoevalcap is installed (a namespace package, it has no __file__)."""
    import pycocoevalcap

    return Path(next(iter(pycocoevalcap.__path__)))


def _command(java: str | None, jar: str, *options: str) -> list[str]:
    """`java OPTIONS JAR`; the last option is `-jar` or `-cp`."""
    if java is None:
        raise JavaUnavailableError("no java on this machine")
    path = package_folder() / jar
    if not path.is_file():
        raise JavaUnavailableError(f"pycocoevalcap lacks {jar}")
    # Numbers with a point and texts in UTF-8 whatever the locale is.
    return [java, "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US", *options, str(path)]


def ptb_tokenize(java: str | None, sentences: Sequence[str], timeout: float | None = None) -> list[str]:
    """Each sentence as lower-case PTB tokens with blanks between, without punctuation, as COCO captions are scored.

    Raises `JavaUnavailableError`.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    command = [*_command(java, _PTB_JAR, "-cp"), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-encoding", "UTF-8", "-preserveLines", "-lowerCase"]
    # One sentence a line, so none may hold what Java takes for a line's end.
    text = "\n".join(" ".join(sentence.split()) for sentence in sentences) + "\n"
    limit = _START_SECONDS + _SECONDS_PER_LINE * len(sentences) if timeout is None else timeout
    output = _run(command, text, limit, "the PTB tokenizer")
    lines = output.split("\n")[: len(sentences)]
    if len(lines) != len(sentences):
        raise JavaUnavailableError(f"the PTB tokenizer gave {len(lines)} lines for {len(sentences)}")
    return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in lines]


def _run(command: list[str], text: str, limit: float, name: str) -> str:
    """Output of a program; `subprocess.run` kills it when it is late."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise JavaUnavailableError(f"{name} did not end within {limit:.0f} s") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JavaUnavailableError(f"{name} could not be run ({error})") from None
    if done.returncode != 0:
        raise JavaUnavailableError(f"{name} ended with code {done.returncode}{_last_line(done.stderr)}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return f": {lines[-1][:200]}" if lines else ""


class Meteor:
    """METEOR 1.5 as a running program (it loads for seconds, so one serves several corpora). A context manager."""

    def __init__(self, java: str | None) -> None:
        self._command = [*_command(java, _METEOR_JAR, "-Xmx2G", "-jar"), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> "Meteor":
        # A file, not a pipe: a full pipe that nobody reads would stop the program.
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8"
            )
        except OSError as error:
            self._errors.close()
            raise JavaUnavailableError(f"METEOR could not be started ({error})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._errors is not None
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                assert pipe is not None
                pipe.close()
            except OSError:  # a line was still on its way to the program that is gone
                pass
        self._errors.close()

    def score(self, items: Sequence[tuple[str, Sequence[str]]], timeout: float | None = None) -> float:
        """The corpus score of (prediction, references), tokenized texts. Raises `JavaUnavailableError`."""
        assert self._process is not None, "Meteor is used outside its `with`"
        limit = _START_SECONDS + _SECONDS_PER_LINE * len(items) if timeout is None else timeout
        # Killing the program ends a read that waits for it.
        watchdog = Timer(limit, self._process.kill)
        watchdog.start()
        try:
            statistics = [self._ask(" ||| ".join(("SCORE", *references, said))) for said, references in items]
            # one line an item, then the corpus score
            self._tell(" ||| ".join(("EVAL", *statistics)))
            return float([self._read() for _ in range(len(items) + 1)][-1])
        except (OSError, ValueError) as error:
            code = self._process.poll()
            if not watchdog.is_alive():
                raise JavaUnavailableError(f"METEOR did not end within {limit:.0f} s") from None
            raise JavaUnavailableError(f"METEOR failed ({error}, code {code}){self._last_error()}") from None
        finally:
            watchdog.cancel()

    def _ask(self, line: str) -> str:
        self._tell(line)
        return self._read()

    def _tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise ValueError("it ended")
        return line.strip()

    def _last_error(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        return _last_line(self._errors.read().decode("utf-8", errors="replace"))


def spice(java: str | None, items: Sequence[tuple[str, Sequence[str]]], timeout: float | None = None) -> float:
    """Mean SPICE F score of (prediction, references), tokenized texts. Fetches nothing.

    Raises `JavaUnavailableError`.
    """
    command = _command(java, _SPICE_JAR, "-Xmx8G", "-jar")
    missing = [name for name in _SPICE_MODELS if not (package_folder() / name).is_file()]
    if missing:
        raise JavaUnavailableError(f"its language models are not installed (pycocoevalcap/{missing[0]})")
    limit = _START_SECONDS + _SPICE_SECONDS_PER_ITEM * len(items) if timeout is None else timeout
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.json", Path(folder) / "out.json"
        content = [{"image_id": i, "test": said, "refs": list(refs)} for i, (said, refs) in enumerate(items)]
        source.write_text(json.dumps(content), encoding="utf-8")
        _run([*command, str(source), "-out", str(target), "-subset", "-silent"], "", limit, "SPICE")
        try:
            scores = [float(item["scores"]["All"]["f"]) for item in json.loads(target.read_text(encoding="utf-8"))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JavaUnavailableError(f"SPICE wrote no scores ({error})") from None
    if len(scores) != len(items):
        raise JavaUnavailableError(f"SPICE gave {len(scores)} scores for {len(items)} items")
    return sum(scores) / len(scores)
