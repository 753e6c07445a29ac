"""Findings about what is trained: phases and features, optimizers, tied weights, BatchNorm, LoRA."""

from mellow_ds.config.train_keys import PARTS, PYTORCH_OPTIMIZERS
from mellow_ds.doctor.facts import Case, ModelFacts
from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.doctor.memory import back_end_of, setup_of, stays_gathered
from mellow_ds.doctor.steps import stage_of


def check_parts(case: Case) -> list[Finding]:
    """Parts of the model against data, optimizer and stage."""
    found = [*_features(case), *_untrained_encoder(case), *_optimizer(case)]
    if case.model is not None:
        found += [*_nothing_trained(case.model), *_tied(case, case.model), *_batchnorm(case, case.model)]
        found += _idle_rates(case, case.model)
    return found


def _features(case: Case) -> list[Finding]:
    if case.shards is None or not case.shards.has_features:
        return []
    config = case.config
    if not config.trains_encoder:
        return []
    phases = [phase for phase in config.train.phases if "encoder" in phase.train]
    key = f"train.phases trains the encoder from step {phases[0].from_step}" if phases else (
        "model.encoder.freeze_audio_encoder_weights is false"
    )  # fmt: skip
    return [
        Finding(
            STOPS, "features-with-trained-encoder", f"{key}, but the shards hold features of a frozen encoder",
            "stored features are what the encoder gave before; training it would change nothing that is read",
            "keep the encoder frozen, or train on the shards of the audio",
        )
    ]  # fmt: skip


def _untrained_encoder(case: Case) -> list[Finding]:
    config = case.config
    if not config.keeps_random_encoder or (case.shards is not None and case.shards.has_features):
        return []
    return [
        Finding(
            SLOW, "untrained-encoder", "the encoder is frozen, and no weights are named for it",
            "it stays as it was drawn at random, and projector and decoder train on noise",
            "set model.encoder.use_pretrained_audioencoder and pretrained_audioencoder_path, or "
            "model.encoder.freeze_audio_encoder_weights to false",
        )
    ]  # fmt: skip


def _optimizer(case: Case) -> list[Finding]:
    train, stage = case.config.train, stage_of(case)
    if train.optimizer_type == "Lamb":
        if stage and back_end_of(case) == "deepspeed":
            return [
                Finding(
                    STOPS, "lamb-needs-whole-layers", f"train.optimizer_type is Lamb, at ZeRO stage {stage}",
                    "Lamb scales each layer by its own norm, and ZeRO flattens layers and cuts them",
                    "take stage 0 (ds_configs/zero0.json), or train.optimizer_type AdamW",
                )
            ]  # fmt: skip
        if not case.machine.on_gpus or back_end_of(case) != "deepspeed":
            return [
                Finding(
                    SLOW, "lamb-replaced", "train.optimizer_type is Lamb, which only DeepSpeed on GPUs has",
                    "torch's fused AdamW takes its place: another optimizer with the same learning rate",
                    "set train.optimizer_type to AdamW, and its own learning rate",
                )
            ]  # fmt: skip
    if train.optimizer_type in PYTORCH_OPTIMIZERS and back_end_of(case) == "deepspeed":
        return [
            Finding(
                STOPS, "muon-needs-whole-matrices",
                f"train.optimizer_type is {train.optimizer_type}, and engine is deepspeed",
                "ZeRO flattens and cuts the matrices that it multiplies", "set engine to auto or fsdp",
            )
        ]  # fmt: skip
    if train.optimizer_type == "Muon" and train.max_grad_norm:
        return [
            Finding(
                NOTE, "muon-not-clipped",
                f"train.max_grad_norm is {train.max_grad_norm}, but train.optimizer_type Muon does not clip",
                "the size of its updates does not depend on the gradient's",
                "set train.max_grad_norm to 0, so that the configuration says what happens",
            )
        ]  # fmt: skip
    return []


def _nothing_trained(model: ModelFacts) -> list[Finding]:
    if model.num_trained:
        return []
    return [
        Finding(
            STOPS, "nothing-trained", "encoder, projector and decoder are all frozen",
            "there is no parameter to train",
            "free one: model.encoder.freeze_projector_weights false, or train.phases",
        )
    ]  # fmt: skip


def _tied(case: Case, model: ModelFacts) -> list[Finding]:
    """Only where something follows from it."""
    if not model.is_tied:
        return []
    found = []
    setup = setup_of(case)
    if setup.stage == 3 and setup.world > 1 and setup.back_end == "deepspeed" and not stays_gathered(model, setup):
        found.append(
            Finding(
                NOTE, "tied-under-stage-3",
                f"the decoder's head is its token embedding: {model.largest_parameter / 1e6:.1f} M numbers",
                "at stage 3 it is gathered at both ends of the model and in both passes, four times a micro-batch; "
                "other weights twice",
                "nothing to do where the network keeps up; else raise stage3_max_reuse_distance, if memory allows",
            )
        )  # fmt: skip
    lora = case.config.model.decoder.lora
    if lora.rank and {"lm_head", "embed_tokens", "wte"} & set(lora.target_modules):
        found.append(
            Finding(
                STOPS, "adapter-on-tied-head",
                f"model.decoder.lora.target_modules {', '.join(lora.target_modules)} names head or embedding, which "
                "are one weight",
                "an adapter on one of them cannot be merged at export without changing the other",
                "leave them out; all-linear does so",
            )
        )  # fmt: skip
    return found


def _batchnorm(case: Case, model: ModelFacts) -> list[Finding]:
    train, world = case.config.train, case.machine.world
    if not model.has_batchnorm or model.part("encoder").is_frozen or train.sync_batchnorm or world == 1:
        return []
    return [
        Finding(
            NOTE, "batchnorm-by-rank",
            f"an encoder with BatchNorm is trained on {world} ranks, and train.sync_batchnorm is false",
            f"each rank normalises over its own {train.batch_size} examples: results depend on the number of ranks",
            "set train.sync_batchnorm to true",
        )
    ]  # fmt: skip


def _idle_rates(case: Case, model: ModelFacts) -> list[Finding]:
    rates = case.config.train.learning_rates
    idle = [part for part in PARTS if getattr(rates, part) and model.part(part).is_frozen]
    return [
        Finding(
            NOTE, "rate-of-frozen-part", f"train.learning_rates.{part} is set, but the {part} is frozen",
            "it has no effect", "drop it, or free the part",
        )
        for part in idle
    ]  # fmt: skip
