"""`mellow-ds convert`: bring a checkpoint of the original Mellow here."""

import argparse
from pathlib import Path

from mellow_ds.cli.arguments import read_overrides
from mellow_ds.config.load import load_run_config
from mellow_ds.config.schema import RunConfig
from mellow_ds.errors import EXIT_DONE, ConfigError
from mellow_ds.option_parser import OptionParser

_EXAMPLES = """
The kind and sizes of the encoder come from the checkpoint; --config (default: mellow) and keys after it say which
decoder and tokenizer belong to it. The folder works with mellow-ds generate and evaluate, and with from_pretrained.
Nothing in the file is executed: one that holds more than tensors is refused.

Weights of an audio encoder alone (HTSAT_AudioSet_Saved_1.ckpt, Cnn14_mAP=0.431.pth) need no conversion: name them in
model.encoder.pretrained_audioencoder_path and set model.encoder.use_pretrained_audioencoder true.

examples:
  mellow-ds convert --from-mellow v0.ckpt --out mellow-converted
  mellow-ds convert --from-mellow run.ckpt --out converted --config mellow-gpt2
  mellow-ds convert --from-mellow v0.ckpt --out converted --model.decoder.text_decoder /models/SmolLM2-135M
"""


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    options, config = parse_arguments(arguments, program)
    if not options.from_mellow.is_file():
        raise ConfigError(f"--from-mellow {options.from_mellow} is not there")
    if options.out.exists() and any(options.out.iterdir()):
        raise ConfigError(f"--out {options.out} is there and not empty: choose a new folder")
    from mellow_ds.model.convert import convert_mellow

    print(convert_mellow(options.from_mellow, options.out, config.model, config.data))
    return EXIT_DONE


def parse_arguments(arguments: list[str], program: str) -> tuple[argparse.Namespace, RunConfig]:
    """The options, and the run configuration that names the decoder."""
    parser = OptionParser(
        prog=program,
        description="Write a checkpoint of the original Mellow as a model folder of this project.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--from-mellow", required=True, type=Path, metavar="CKPT", help="checkpoint that Mellow saved")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--config", default="mellow", help="recipe or YAML file that names the decoder")
    known, rest = parser.parse_known_args(arguments)
    return known, load_run_config(known.config, read_overrides(rest))
