"""Mode evaluate_checkpoint: score a checkpoint on held-out shards, on all ranks."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellow_ds.config.schema import RunConfig
from mellow_ds.monitor.heartbeat import Heartbeat
from mellow_ds.world import World

if TYPE_CHECKING:
    import torch

    from mellow_ds.data.batch import Batch
    from mellow_ds.data.examples import EvalExample
    from mellow_ds.data.stream import EvalStream
    from mellow_ds.engine.protocol import Engine
    from mellow_ds.evaluation.eval_loss import EvalLoss
    from mellow_ds.prompt import Layout

_SCORING_SECONDS = 3600.0  # that caption metrics may take on rank 0 without a sign of life
_log = logging.getLogger("mellow_ds.cli")


def evaluate_checkpoint(
    config: RunConfig, world: World, device: "torch.device", heartbeat: Heartbeat | None = None
) -> None:
    """Evaluate the step folder or model folder `config.resume_checkpoint`; needs no engine."""
    from mellow_ds.cli.model_folder import load_model_folder

    checkpoint = Path(config.resume_checkpoint)
    model, processor = load_model_folder(checkpoint, device)
    if (config.model.layout == "mellow") != bool(processor.row_layout.num_clips):
        _log.info("model.layout %s has no effect: the checkpoint keeps the layout of its training", config.model.layout)
    out = Path(config.save_dir) / "evaluation" / checkpoint.name
    evaluate_model(
        model, processor.tokenizer, processor.row_layout, config, world, device, out, {"checkpoint": str(checkpoint)},
        heartbeat,
    )  # fmt: skip


def evaluate_model(
    model: Any,
    tokenizer: Any,
    layout: "Layout",
    config: RunConfig,
    world: World,
    device: "torch.device",
    out: Path,
    about: dict[str, Any],
    heartbeat: Heartbeat | None = None,
    in_step: bool = False,
) -> dict[str, Any]:
    """Score `model` on the configured shards; rank 0 prints the table and returns the results.

    `in_step`: the ranks make every pass through the model together.
    """
    import torch.distributed as dist

    from mellow_ds.data.reader import ShardReader
    from mellow_ds.data.stream import EvalStream
    from mellow_ds.evaluation.evaluate import evaluate
    from mellow_ds.evaluation.results import format_results
    from mellow_ds.model.fingerprint import check_features

    beating = heartbeat or Heartbeat()
    folders = config.data.eval_shards or config.data.train_shards
    reader = ShardReader.from_config(folders, config.data)
    if reader.features is not None:
        check_features(reader.features, model.encoder, model.config.encoder_config)

    def open_stream(silent: bool) -> _BeatingStream:
        stream = EvalStream(
            reader, tokenizer, layout, config.data, config.evaluation.batch_size, world,
            max_examples=config.evaluation.max_examples, silence_audio=silent, num_workers=config.train.num_workers,
        )  # fmt: skip
        return _BeatingStream(stream, beating)

    def barrier() -> None:
        beating.beat()
        dist.barrier()
        beating.at("score", grace_seconds=_SCORING_SECONDS)

    num_examples = min(config.evaluation.max_examples or reader.num_examples, reader.num_examples)
    _log.info("evaluating %d examples of %s", num_examples, ", ".join(folders))
    results = evaluate(
        model, open_stream, tokenizer, world, config.evaluation, out,
        num_expected=num_examples, end_id=layout.end_id, device=device, in_step=in_step, barrier=barrier,
        about={**about, "shards": list(folders), "fingerprint": reader.fingerprint},
    )  # fmt: skip
    if world.is_main:
        print(format_results(results), flush=True)
        _log.info("results: %s", out / "results.json")
    return results


@dataclass(frozen=True)
class _BeatingStream:
    """Evaluation batches, each of which is progress."""

    stream: "EvalStream"
    heartbeat: Heartbeat

    def __iter__(self) -> Iterator[tuple["Batch", Sequence["EvalExample"]]]:
        for batch, examples in self.stream:
            self.heartbeat.at("evaluate", batches=(batch.example_ids,))
            yield batch, examples

    def close(self) -> None:
        """End the loader processes."""
        self.stream.close()


def measure_engine(
    engine: "Engine", tokenizer: Any, layout: "Layout", config: RunConfig, world: World, heartbeat: Heartbeat
) -> "EvalLoss":
    """The loss of the model in training on data.eval_shards, as it is now; a collective call."""
    from mellow_ds.data.reader import ShardReader
    from mellow_ds.data.stream import EvalStream
    from mellow_ds.evaluation.eval_loss import measure_loss

    reader = ShardReader.from_config(config.data.eval_shards, config.data)
    stream = EvalStream(
        reader, tokenizer, layout, config.data, config.evaluation.batch_size, world,
        max_examples=config.evaluation.max_examples, with_answers=True, num_workers=config.train.num_workers,
    )  # fmt: skip
    with engine.model_in_step() as model:
        return measure_loss(model, _BeatingStream(stream, heartbeat), world, engine.device)
