"""Findings about memory: what a rank needs by formula against what it has, and stages that are too low or too high."""

from dataclasses import dataclass, replace

from mellow_ds.doctor.facts import Case, ModelFacts
from mellow_ds.doctor.findings import NOTE, SLOW, STOPS, Finding
from mellow_ds.doctor.lengths import longest_possible_row
from mellow_ds.doctor.memory import GIGABYTE, Setup, StateBytes, readable, setup_of, state_bytes

_CONTEXT_BYTES = 1.0 * GIGABYTE  # CUDA context, NCCL and kernels, before the first tensor
_FRAGMENTS = 0.07  # of what is allocated: blocks of the caching allocator that nothing fits into
_TIGHT = 0.9  # of the memory; beyond, one long batch ends the run
_ROOMY = 1 / 3  # of the memory; a lower stage that needs less than that is better
_BUCKET_SHARE = 0.05  # of the memory that reduction buckets larger than the model may take unmentioned


@dataclass(frozen=True)
class RankMemory:
    """What a rank needs at its peak."""

    state: StateBytes
    activations: int
    other: int  # context and fragments; on GPUs

    @property
    def peak(self) -> int:
        """Bytes of the device: within a micro-batch, or during the optimizer step, whichever is more."""
        within = max(self.activations + self.state.gathered + self.state.buckets, self.state.step_copy)
        return max(self.state.lasting, 0) + within + self.other


def rank_memory(case: Case, setup: Setup | None = None, recomputes: bool | None = None) -> RankMemory:
    """By formula, for another setup or with activation checkpointing where they are given. Needs the model's sizes."""
    assert case.model is not None
    setup = setup_of(case) if setup is None else setup
    recomputes = case.config.train.activation_checkpointing if recomputes is None else recomputes
    state = state_bytes(case.model, setup)
    activations = activation_bytes(case, recomputes)
    if not case.machine.on_gpus:
        # what is set aside and not written takes no memory of a host; of the buckets that is all beyond the model
        state = replace(state, buckets=min(state.buckets, 2 * setup.number_bytes * case.model.num_trained))
        return RankMemory(state, activations, 0)
    held = max(state.lasting, 0) + activations + state.gathered + state.buckets
    return RankMemory(state, activations, round(_CONTEXT_BYTES + _FRAGMENTS * held))


def activation_bytes(case: Case, recomputes: bool) -> int:
    """Of a micro-batch whose rows are all as long as the longest of the sample; at most, where parts are frozen."""
    model, texts, batch_size = case.model, case.texts, case.config.train.batch_size
    assert model is not None
    found = model.activations
    row = texts.longest_row if texts else longest_possible_row(case)
    answer = min(texts.longest_answer, case.config.data.op_text_len) if texts else case.config.data.op_text_len
    clips = texts.mean_clips if texts else 2.0
    layers = model.num_layers * (found.block_token_bytes if recomputes else found.layer_token_bytes)
    # one layer more: its gradients while they are made, or its activations while they are made again
    token = layers + found.layer_token_bytes + found.base_token_bytes
    clip = found.projector_clip_bytes + found.encoder_clip_bytes
    return round(batch_size * (row * token + clips * clip + answer * found.answer_token_bytes))


def check_fit(case: Case) -> list[Finding]:
    """Needs the model's sizes; against the memory, where that is known."""
    if case.model is None or not case.machine.memory_bytes:
        return []
    found = [*_device(case), *_host(case, case.model)]
    return [*(found or [*_roomy(case, case.model), *_buckets(case, case.model)]), *_last_evaluation(case, case.model)]


def _device(case: Case) -> list[Finding]:
    needed, room = rank_memory(case).peak, case.machine.memory_bytes
    what = f"a rank needs about {readable(needed)} by formula, and has {readable(room)}"
    if needed > room:
        state = rank_memory(case).state
        return [
            Finding(
                STOPS, "memory-too-small", what,
                f"weights, gradients and optimizer take {readable(state.lasting)}, activations and logits of a "
                f"micro-batch of {case.config.train.batch_size} {readable(rank_memory(case).activations)}",
                _cure(case),
            )
        ]  # fmt: skip
    if needed > _TIGHT * room:
        return [
            Finding(
                SLOW, "memory-tight", what, "one micro-batch of long rows more than the sample had, and the run ends",
                f"leave a tenth of it free: {_cure(case, _TIGHT)}",
            )
        ]  # fmt: skip
    return []


def _cure(case: Case, part: float = 1.0) -> str:
    """The first of the usual measures, from cheap to expensive, after which it would fit."""
    setup, room, train = setup_of(case), part * case.machine.memory_bytes, case.config.train
    for batch_size in range(train.batch_size - 1, 0, -1):
        smaller = replace(case, config=replace(case.config, train=replace(train, batch_size=batch_size)))
        if 2 * batch_size >= train.batch_size and rank_memory(smaller).peak <= room:
            return f"set train.batch_size to {batch_size} (with train.global_batch_size the step stays the same)"
    for stage in range(setup.stage + 1, 4):
        if setup.world > 1 and rank_memory(case, replace(setup, stage=stage)).peak <= room:
            return f"take ZeRO stage {stage} (ds_configs/zero{stage}.json)"
    if not train.activation_checkpointing and rank_memory(case, recomputes=True).peak <= room:
        return "set train.activation_checkpointing to true"
    offloaded = replace(setup, stage=max(setup.stage, 2), offload_optimizer="cpu")
    if rank_memory(case, offloaded).peak <= room:
        return "offload the optimizer (ds_configs/zero2_offload.json)"
    alone = replace(case, config=replace(case.config, train=replace(train, batch_size=1)))
    everything = replace(setup, stage=3, offload_optimizer="cpu", offload_param="cpu", max_live=0)
    if rank_memory(alone, everything, recomputes=True).peak <= room:
        return (
            "set train.batch_size to 1 and train.activation_checkpointing to true, and offload parameters and "
            "optimizer (ds_configs/zero3_offload.json)"
        )
    return "take GPUs with more memory, more of them at stage 3, a smaller decoder, or LoRA"


def _host(case: Case, model: ModelFacts) -> list[Finding]:
    machine = case.machine
    if not machine.on_gpus or machine.is_remote or not machine.host_memory_bytes:
        return []
    needed = state_bytes(model, setup_of(case)).host * machine.ranks_per_host
    if needed <= machine.host_memory_bytes:
        return []
    return [
        Finding(
            STOPS, "host-memory-too-small",
            f"{machine.ranks_per_host} ranks offload {readable(needed)} to a host that has "
            f"{readable(machine.host_memory_bytes)}",
            "optimizer states, gradients and float32 weights of all ranks of a host lie in its memory",
            "offload to NVMe (ds_configs/zero3_nvme.json), or take more hosts",
        )
    ]  # fmt: skip


def _roomy(case: Case, model: ModelFacts) -> list[Finding]:
    """A stage or an offload that is not needed, and costs time."""
    setup, room = setup_of(case), case.machine.memory_bytes
    offloads = setup.stage and (setup.offload_optimizer != "none" or setup.offload_param != "none")
    plain = replace(setup, offload_optimizer="none", offload_param="none")
    if offloads:
        needed = rank_memory(case, plain).peak
        if needed < _TIGHT * room:
            return [
                Finding(
                    SLOW, "offload-not-needed",
                    f"the engine JSON offloads, but without it a rank needs {readable(needed)} of {readable(room)}",
                    "every step moves gradients and weights between device and host",
                    f"take ds_configs/zero{setup.stage}.json",
                )
            ]  # fmt: skip
    if setup.stage == 3 and not offloads:
        lower = replace(plain, stage=2)
        needed = rank_memory(case, lower).peak
        if needed < _ROOMY * room:
            held = max(state_bytes(model, lower).lasting, 1)
            return [
                Finding(
                    SLOW, "stage-too-high",
                    f"ZeRO stage 3 for a model of {model.num_parameters / 1e6:.1f} M parameters, whose state at stage "
                    f"2 ({readable(held)}) fits {room / held:.0f} times into {readable(room)}",
                    "stage 3 gathers the weights for every micro-batch, where stage 2 sends them once a step",
                    "take stage 2 (ds_configs/zero2.json)",
                )
            ]  # fmt: skip
    return []


def _last_evaluation(case: Case, model: ModelFacts) -> list[Finding]:
    """At stage 3 it is made by gathering the weights for each token, or once, where all of them fit."""
    setup, room, config = setup_of(case), case.machine.memory_bytes, case.config
    if setup.stage < 3 or setup.world == 1 or not config.train.evaluate_at_end:
        return []
    whole = setup.number_bytes * model.num_parameters
    needed = rank_memory(case).peak + whole
    if config.evaluation.gather_weights and needed > room:
        return [
            Finding(
                STOPS, "evaluation-too-large",
                f"evaluation.gather_weights brings {readable(whole)} to every rank, which then needs about "
                f"{readable(needed)} and has {readable(room)}",
                "train.evaluate_at_end comes when all of the training is done",
                "set evaluation.gather_weights to false: the weights are gathered for each token, a block at a time",
            )
        ]  # fmt: skip
    if not config.evaluation.gather_weights and needed < _TIGHT * room:
        return [
            Finding(
                SLOW, "evaluation-gathers",
                f"train.evaluate_at_end sends {readable(whole)} to every rank for each token of an answer at stage 3",
                f"evaluation.gather_weights is false, though all of them would fit into {readable(room)} with the rest",
                "set evaluation.gather_weights to true",
            )
        ]  # fmt: skip
    return []


def _buckets(case: Case, model: ModelFacts) -> list[Finding]:
    setup = setup_of(case)
    if not case.machine.on_gpus or not setup.stage or setup.back_end != "deepspeed":
        return []
    held = state_bytes(model, setup).buckets
    if setup.bucket_numbers <= model.num_trained or held < _BUCKET_SHARE * case.machine.memory_bytes:
        return []
    return [
        Finding(
            NOTE, "bucket-beyond-model",
            f"zero_optimization.reduce_bucket_size is {setup.bucket_numbers} numbers, more than the "
            f"{model.num_trained} that are trained",
            f"DeepSpeed sets aside {readable(held)} for it all the same",
            f"set it to {max(model.num_trained // 4, 1)}: reduction then overlaps with the backward pass, too",
        )
    ]  # fmt: skip
