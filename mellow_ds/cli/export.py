"""`mellow-ds export`: a step of a run as a model folder for others."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mellow_ds.errors import EXIT_DONE, CheckpointError, ConfigError
from mellow_ds.option_parser import OptionParser

if TYPE_CHECKING:
    import torch

    from mellow_ds.model.configuration import MellowConfig

_EXAMPLES = """
The folder holds weights (safetensors, tied ones once, adapters of model.decoder.lora merged), configuration,
generation configuration, tokenizer and processor: what MellowForConditionalGeneration.from_pretrained, MellowProcessor
and mellow-ds generate read. Before it gets its name it is opened again, and its logits on a probe batch are compared
with those of the checkpoint: equal bit for bit, or within 1e-4 where adapters were merged in float32.

examples:
  mellow-ds export --checkpoint RUN/checkpoints/step-000200 --out my-model
  mellow-ds export --checkpoint RUN/checkpoints/step-000200 --out my-model-bf16 --dtype bfloat16
"""
_MERGED_TOLERANCE = 1e-4  # of a logit, float32
_BFLOAT16_TOLERANCE = 0.05  # of the largest logit: merged weights are rounded to 8 bits once more


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments, program)
    if not options.checkpoint.is_dir():
        raise ConfigError(f"--checkpoint {options.checkpoint} is not there: name a step folder of a run")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out {options.out} is there and not empty: choose a new folder")
    print(export(options.checkpoint, options.out, options.dtype))
    return EXIT_DONE


def parse_arguments(arguments: list[str], program: str) -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(
        prog=program,
        description="Write a step of a run as a model folder, merged, and prove that it computes the same.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="step folder of a run, or a converted model")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not be there yet")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="number format (default float32)"
    )
    return parser.parse_args(arguments)


def export(checkpoint: Path, out: Path, dtype: str) -> str:
    """Write the folder and return what was proved about it.

    Raises `CheckpointError` where the checkpoint is not whole, the folder cannot be written, or what was written
    computes something else; nothing is left behind then.
    """
    from safetensors import SafetensorError

    from mellow_ds.checkpoint.failure import reason_of

    aside = out.absolute().parent / f".writing-{out.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        proof = _write_and_prove(checkpoint, aside, dtype)
        if out.exists():
            out.rmdir()  # empty, or this raises
        aside.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} was not written: {reason_of(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return f"{out}: {proof}"


def _write_and_prove(checkpoint: Path, folder: Path, dtype: str) -> str:
    import torch

    from mellow_ds.checkpoint.load import check_shapes
    from mellow_ds.checkpoint.step_folder import MODEL
    from mellow_ds.checkpoint.tensor_files import TensorFiles
    from mellow_ds.cli.model_folder import load_model_folder
    from mellow_ds.model.export import DTYPES, probe_logits, skeleton, write_weights

    # loaded one after the other, so that one whole model is in memory at a time
    model, processor = load_model_folder(checkpoint, "cpu")
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = cast("MellowConfig", model.config)
    exact = probe_logits(model)
    # what the same weights give in the format that is written
    expected = exact if dtype == "float32" or config.lora else probe_logits(torch.nn.Module.to(model, DTYPES[dtype]))
    del model
    with TensorFiles(checkpoint, MODEL) as tensors:
        check_shapes(tensors, skeleton(config).state_dict(keep_vars=True))
        write_weights(tensors, config, folder, dtype)
    written = probe_logits(load_model_folder(folder, "cpu")[0])
    said = _compare(expected, written, dtype, merged=config.lora is not None)
    if expected is not exact:
        said += f"; from the logits of float32 they differ by up to {float((written - exact).abs().max()):.2g}"
    return said


def _compare(expected: "torch.Tensor", written: "torch.Tensor", dtype: str, merged: bool) -> str:
    """Raise `CheckpointError` where the logits differ by more than they may; else say by how much they do."""
    import torch

    number = f"{written.numel():,} logits of {len(written)} positions of a probe batch"
    largest = float((written - expected).abs().max())
    if not merged:
        if not torch.equal(written, expected):
            raise CheckpointError(f"what was written computes something else: {number} differ by up to {largest:.3g}")
        return f"{number} are those of the checkpoint bit for bit, in {dtype}"
    allowed = _MERGED_TOLERANCE if dtype == "float32" else _BFLOAT16_TOLERANCE * float(expected.abs().max())
    if not largest <= allowed:
        raise CheckpointError(
            f"what was written computes something else: {number} differ by up to {largest:.3g}; with merged adapters "
            f"in {dtype} they may by {allowed:.3g}"
        )
    return f"{number} are those of the checkpoint with its adapters, within {largest:.2g} ({allowed:.2g} allowed)"
