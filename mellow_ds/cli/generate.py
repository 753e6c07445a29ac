"""`mellow-ds generate`: answer a question about audio files."""

import argparse
from pathlib import Path

from mellow_ds.errors import EXIT_DONE, ConfigError

_EXAMPLES = """
examples:
  mellow-ds generate --checkpoint RUN/checkpoints/step-000200 --audio bell.wav --prompt "what sound is heard?"
  mellow-ds generate --checkpoint RUN/checkpoints/step-000200 --audio a.wav --audio b.wav \\
    --prompt "explain the difference in few words"
"""


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Answer a question about one or more audio files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="step folder of a run, or a converted model")
    parser.add_argument("--audio", required=True, action="append", type=Path, help="a clip; give it again for a second")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens (default 64)")
    options = parser.parse_args(arguments)
    for path in options.audio:
        if not path.is_file():
            raise ConfigError(f"--audio {path} is not there")
    if not options.checkpoint.is_dir():
        raise ConfigError(f"--checkpoint {options.checkpoint} is not there: name a step folder of a run")
    import torch

    from mellow_ds.cli.model_folder import load_model_folder
    from mellow_ds.evaluation.generate import generate_answer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_model_folder(options.checkpoint, device)
    print(generate_answer(model, processor, options.audio, options.prompt, options.max_new_tokens))
    return EXIT_DONE
