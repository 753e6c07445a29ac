"""Finding out all that the rules judge: shards, texts, sizes of the model, the machine. What cannot be found out is
said, and judged no further."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mellow_ds.config.schema import RunConfig
from mellow_ds.data.mixture import epochs_from_config
from mellow_ds.data.reader import ShardReader
from mellow_ds.doctor.facts import Case, Machine, ModelFacts, ShardFacts, TextFacts
from mellow_ds.doctor.findings import NOTE, STOPS, Finding
from mellow_ds.doctor.machine import look_at_machine
from mellow_ds.doctor.memory import small_threshold
from mellow_ds.doctor.sizes import PUBLISHED_SIZES, model_facts
from mellow_ds.doctor.steps import precision_of
from mellow_ds.doctor.texts import sample_questions, text_facts, texts_of
from mellow_ds.errors import ConfigError, MellowError
from mellow_ds.model.assemble import load_tokenizer
from mellow_ds.model.decoder import FROM_CONFIG, is_gguf


@dataclass
class Gathered:
    """A case, and what was found while it was put together."""

    case: Case
    findings: list[Finding] = field(default_factory=list)


def gather(config: RunConfig, engine_json: dict[str, Any], world: int = 0, gpu_gigabytes: float = 0.0) -> Gathered:
    """All facts of a training run; fetches nothing but manifests of remote shards."""
    findings: list[Finding] = []
    machine = look_at_machine(config, engine_json, world, gpu_gigabytes)
    reader = _open_shards(config, findings)
    shards = _shard_facts(reader, config) if reader is not None else None
    eval_shards = _eval_shards(config, findings)
    model = _model(config, engine_json, machine, findings)
    texts = _texts(reader, config, model, findings) if reader is not None and model is not None else None
    if reader is not None:
        reader.close()
    return Gathered(Case(config, engine_json, machine, shards, eval_shards, texts, model), findings)


def refused(error: MellowError) -> Finding:
    """What the run itself would refuse, as a finding."""
    return Finding(STOPS, "refused", str(error), "the run ends with this line", "as it says")


def _open_shards(config: RunConfig, findings: list[Finding]) -> ShardReader | None:
    if not config.data.train_shards:
        findings.append(_without_shards(config))
        return None
    try:
        return ShardReader.from_config(config.data.train_shards, config.data)
    except MellowError as error:
        findings.append(refused(error))
        return None


def _without_shards(config: RunConfig) -> Finding:
    if config.data.datafiles and config.data.datapath:
        return Finding(
            NOTE, "packed-first", "no shards are named: data.datafiles are packed first, into the cache of each node",
            "their number of examples is not known before, so nothing is said of steps, texts and shards",
            "pack them once with mellow-shards build, and name data.shards",
        )  # fmt: skip
    return Finding(
        STOPS, "no-shards", "data.shards is empty", "there is nothing to train on",
        "name shard folders (--data.shards DIR ...), made with mellow-shards build",
    )  # fmt: skip


def _shard_facts(reader: ShardReader, config: RunConfig) -> ShardFacts:
    remote = [
        sum(shard.num_bytes for shard in manifest.shards)
        for folder, manifest in zip(config.data.train_shards, reader.manifests, strict=True)
        if "://" in folder
    ]
    return ShardFacts(
        folders=config.data.train_shards,
        num_epoch_examples=epochs_from_config(reader, config.data, config.train.seed).num_examples,
        shard_bytes=tuple(shard.num_bytes for _, shard in reader.shards),
        num_clips=sum(manifest.num_clips for manifest in reader.manifests),
        remote_bytes=sum(remote),
        has_features=reader.features is not None,
    )


def _eval_shards(config: RunConfig, findings: list[Finding]) -> ShardFacts | None:
    if not config.data.eval_shards:
        return None
    try:
        reader = ShardReader.from_config(config.data.eval_shards, config.data)
    except MellowError as error:
        findings.append(refused(error))
        return None
    sizes = tuple(shard.num_bytes for _, shard in reader.shards)
    return ShardFacts(config.data.eval_shards, reader.num_examples, sizes, sum(m.num_clips for m in reader.manifests))


def _model(
    config: RunConfig, engine_json: dict[str, Any], machine: Machine, findings: list[Finding]
) -> ModelFacts | None:
    precision = precision_of(Case(config, engine_json, machine))
    try:
        return model_facts(config, precision, small_threshold(engine_json))
    except ConfigError as error:
        if not _is_on_hub(config) or config.model.decoder.text_decoder in PUBLISHED_SIZES:
            findings.append(refused(error))
        else:
            findings.append(
                Finding(
                    NOTE, "sizes-unknown",
                    f"the sizes of the decoder {config.model.decoder.text_decoder} are not in the hub's cache here",
                    "nothing is said of memory, checkpoints and positions, and the run will fetch it",
                    "fetch it once where the run will be (hf download), then ask again",
                )
            )  # fmt: skip
        return None


def _texts(reader: ShardReader, config: RunConfig, model: ModelFacts, findings: list[Finding]) -> TextFacts | None:
    if reader.is_remote:
        findings.append(
            Finding(
                NOTE, "texts-not-read", "the lengths of texts were not looked at: the shards are remote",
                "reading them would download whole shards", "ask with a local copy of one shard folder",
            )
        )  # fmt: skip
        return None
    try:
        questions = sample_questions(reader)
        tokenizer = _tokenizer(config, questions)
    except MellowError as error:
        findings.append(refused(error))
        return None
    return text_facts(questions, config, model.audio_tokens, tokenizer)


def _tokenizer(config: RunConfig, questions: list[Any]) -> Any | None:
    """The run's, or one made from the sample alike; None where it is on a hub and not here."""
    saved = Path(config.save_dir) / "tokenizer"
    try:
        return load_tokenizer(config.model, config.data, lambda: texts_of(questions), saved)
    except ConfigError:
        if _is_on_hub(config) and not config.data.tokenizer_type:
            return None
        raise


def _is_on_hub(config: RunConfig) -> bool:
    named = config.model.decoder.text_decoder
    return named != FROM_CONFIG and not is_gguf(named) and not Path(named).exists()
