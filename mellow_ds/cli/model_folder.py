"""Opening a model folder: a step folder of a run, what `mellow-ds convert` wrote, or an exported model."""

from pathlib import Path
from typing import TYPE_CHECKING

from mellow_ds.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from mellow_ds.model.modeling import MellowForConditionalGeneration
    from mellow_ds.model.processing import MellowProcessor


def load_model_folder(
    folder: Path, device: "torch.device | str"
) -> "tuple[MellowForConditionalGeneration, MellowProcessor]":
    """Model (eval mode, float32) and processor of a folder; raises `CheckpointError` naming what is missing or damaged.

    A step folder's files are checked against their hashes first.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from mellow_ds.checkpoint.files_list import is_step_folder, verify_checkpoint
    from mellow_ds.checkpoint.step_folder import MODEL
    from mellow_ds.checkpoint.tensor_files import TensorFiles
    from mellow_ds.model.modeling import MellowForConditionalGeneration
    from mellow_ds.model.processing import MellowProcessor

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: name a step folder, such as RUN/checkpoints/step-000200")
    if is_step_folder(folder):
        verify_checkpoint(folder)
    with TensorFiles(folder, MODEL):  # says what is missing or is no safetensors file
        pass
    disable_progress_bar()
    try:
        model = MellowForConditionalGeneration.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = MellowProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder} cannot be loaded as a model ({reason})") from None
    return torch.nn.Module.to(model, device).eval(), processor
