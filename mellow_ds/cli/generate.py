"""`mellow-ds generate`: answer questions about audio files."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mellow_ds.errors import EXIT_DONE, ConfigError
from mellow_ds.option_parser import OptionParser

if TYPE_CHECKING:
    from mellow_ds.packing.records import Record

_EXAMPLES = """
examples:
  mellow-ds generate --checkpoint RUN/checkpoints/step-000200 --audio bell.wav --prompt "what sound is heard?"
  mellow-ds generate --checkpoint RUN/checkpoints/step-000200 --audio a.wav --audio b.wav \\
    --prompt "explain the difference in few words"
  mellow-ds generate --checkpoint RUN/checkpoints/step-000200 --examples test.json --audio-root audio --num-examples 3
"""


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments, program)
    if bool(options.examples) == bool(options.audio and options.prompt):
        raise ConfigError("give --audio and --prompt for your own question, or --examples FILE.json")
    for path in options.audio or []:
        if not path.is_file():
            raise ConfigError(f"--audio {path} is not there")
    if not options.checkpoint.is_dir():
        raise ConfigError(f"--checkpoint {options.checkpoint} is not there: name a step folder of a run")
    import torch

    from mellow_ds.cli.model_folder import load_model_folder
    from mellow_ds.evaluation.generate import generate_answer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_model_folder(options.checkpoint, device)

    def answer(audio: list[Path], prompt: str) -> str:
        return generate_answer(model, processor, audio, prompt, options.max_new_tokens)

    if not options.examples:
        print(answer(options.audio, options.prompt))
        return EXIT_DONE
    for record in _spread(options.examples, options.num_examples):
        print(f"audio     {', '.join(record.paths)}")
        print(f"question  {record.input}")
        print(f"reference {record.answer}")
        print(f"answer    {answer([options.audio_root / clip for clip in record.paths], record.input)}\n")
    return EXIT_DONE


def parse_arguments(arguments: list[str], program: str) -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(
        prog=program,
        description="Answer a question about one or more audio files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="step folder of a run, or a converted model")
    parser.add_argument("--audio", action="append", type=Path, help="a clip; give it again for a second")
    parser.add_argument("--prompt", help="the question")
    parser.add_argument("--examples", type=Path, help="take questions from this JSON file (ReasonAQA format)")
    parser.add_argument("--audio-root", type=Path, default=Path(), help="folder that the JSON's paths are relative to")
    parser.add_argument("--num-examples", type=int, default=3, help="questions taken from --examples (default 3)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens (default 64)")
    return parser.parse_args(arguments)


def _spread(path: Path, number: int) -> "list[Record]":
    """`number` records of the file, of different clips and kinds of question where there are so many."""
    from mellow_ds.packing.records import read_records

    records = read_records([path]).records
    chosen: list[Record] = []
    for record in records:
        if all(record.subtype != other.subtype and record.paths[0] != other.paths[0] for other in chosen):
            chosen.append(record)
    return (chosen + records)[:number]
