"""`mellow-shards features`: shards of a frozen encoder's features, from shards of audio."""

import argparse
import time
from pathlib import Path

from mellow_ds.errors import EXIT_DONE, ConfigError
from shards.command import Commands, add_command, num_workers

_EXAMPLES = """A run on feature shards (as data.shards) trains projector and decoder, and does not run the encoder.
The encoder is that of a run's step folder, or of a run configuration with pretrained weights, whose keys may follow
as for train.py. A build that was stopped goes on when it is started again.

examples:
  mellow-shards features --shards shards/train --checkpoint RUN/checkpoints/step-002000 --out shards/train-features
  mellow-shards features --shards shards/train --config mellow --out shards/train-features --crops 3 --device cuda \\
    --model.encoder.use_pretrained_audioencoder true --model.encoder.pretrained_audioencoder_path weights"""


def add_parser(commands: Commands) -> None:
    """Add the command to `mellow-shards`."""
    parser = add_command(commands, "features", "run a frozen encoder over audio shards, once", _EXAMPLES, _run)
    parser.add_argument("--shards", required=True, metavar="DIR", help="shard folder or address with the audio")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="shard folder to write")
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument("--checkpoint", type=Path, metavar="DIR", help="step folder or model folder with the encoder")
    encoder.add_argument("--config", metavar="NAME", help="YAML file or recipe that names a pretrained encoder")
    parser.add_argument(
        "--crops", type=int, default=1, metavar="K", help="most crops of a clip longer than the window (default: 1)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="windows at once (default: 16)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; 0: one a CPU (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.set_defaults(takes_overrides=True)


def _run(options: argparse.Namespace) -> int:
    import torch

    from mellow_ds.feature_shards import FeatureSettings, build_feature_shards, describe

    started = time.monotonic()
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and found == "cpu":
        raise ConfigError("--device is cuda, but no GPU can be used here: use --device cpu")
    device = found if options.device == "auto" else options.device
    settings = FeatureSettings(options.crops, options.batch_size, num_workers(options), device, progress=True)
    encoder, config, name = _open_encoder(options)
    manifest = build_feature_shards(options.shards, options.out, encoder, config, name, settings)
    print(describe(options.out, manifest, started))
    return EXIT_DONE


def _open_encoder(options: argparse.Namespace) -> tuple:
    """(encoder, its configuration, what people call it)."""
    if options.checkpoint is not None:
        if options.overrides:
            raise ConfigError(f"'{options.overrides[0]}' is no option beside --checkpoint, which has its own encoder")
        from mellow_ds.cli.model_folder import load_model_folder

        model, _ = load_model_folder(options.checkpoint, "cpu")
        config = model.config.encoder_config
        return model.encoder, config, f"{config.kind} of {options.checkpoint.name}"
    from mellow_ds.cli.arguments import read_overrides
    from mellow_ds.config.load import load_run_config
    from mellow_ds.model.assemble import build_pretrained_encoder

    run = load_run_config(options.config, read_overrides(options.overrides))
    return build_pretrained_encoder(run.model, run.data)
