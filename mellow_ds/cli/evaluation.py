"""Mode evaluate_checkpoint: score a checkpoint on held-out shards, on all ranks."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellow_ds.config.schema import RunConfig
from mellow_ds.world import World

if TYPE_CHECKING:
    import torch

    from mellow_ds.prompt import Layout

_log = logging.getLogger("mellow_ds.cli")


def evaluate_checkpoint(config: RunConfig, world: World, device: "torch.device") -> None:
    """Evaluate the step folder or model folder `config.resume_checkpoint`; needs no engine."""
    from mellow_ds.cli.model_folder import load_model_folder

    checkpoint = Path(config.resume_checkpoint)
    model, processor = load_model_folder(checkpoint, device)
    if (config.model.layout == "mellow") != bool(processor.row_layout.num_clips):
        _log.info("model.layout %s has no effect: the checkpoint keeps the layout of its training", config.model.layout)
    out = Path(config.save_dir) / "evaluation" / checkpoint.name
    evaluate_model(
        model, processor.tokenizer, processor.row_layout, config, world, device, out, {"checkpoint": str(checkpoint)}
    )


def evaluate_model(
    model: Any,
    tokenizer: Any,
    layout: "Layout",
    config: RunConfig,
    world: World,
    device: "torch.device",
    out: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Score `model` on the configured shards; rank 0 prints the table and returns the results."""
    import torch.distributed as dist

    from mellow_ds.data.reader import ShardReader
    from mellow_ds.data.stream import EvalStream
    from mellow_ds.evaluation.evaluate import evaluate
    from mellow_ds.evaluation.results import format_results
    from mellow_ds.model.fingerprint import check_features

    folders = config.data.eval_shards or config.data.train_shards
    reader = ShardReader.from_config(folders, config.data)
    if reader.features is not None:
        check_features(reader.features, model.encoder, model.config.encoder_config)

    def open_stream(silent: bool) -> EvalStream:
        return EvalStream(
            reader, tokenizer, layout, config.data, config.evaluation.batch_size, world,
            max_examples=config.evaluation.max_examples, silence_audio=silent, num_workers=config.train.num_workers,
        )  # fmt: skip

    num_examples = min(config.evaluation.max_examples or reader.num_examples, reader.num_examples)
    _log.info("evaluating %d examples of %s", num_examples, ", ".join(folders))
    results = evaluate(
        model, open_stream, tokenizer, world, config.evaluation, out,
        num_expected=num_examples, end_id=layout.end_id, device=device, barrier=dist.barrier,
        about={**about, "shards": list(folders), "fingerprint": reader.fingerprint},
    )  # fmt: skip
    if world.is_main:
        print(format_results(results), flush=True)
        _log.info("results: %s", out / "results.json")
    return results
