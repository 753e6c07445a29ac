"""What the doctor knows of machine, shards, texts and model before it judges: plain numbers, so that rules are pure."""

from dataclasses import dataclass, field
from typing import Any

from mellow_ds.config.schema import RunConfig


@dataclass(frozen=True)
class Machine:
    """The machine that the run is meant for; this one, as far as nothing else was said."""

    world: int = 1  # ranks meant
    ranks_per_host: int = 1
    num_gpus: int = 0  # seen here
    gpu_name: str = ""
    is_remote: bool = False  # GPUs are meant that are not here: cores, host memory and ops of this machine say nothing
    memory_bytes: int = 0  # of a rank: its GPU's, or its share of the host's memory on CPUs; 0: unknown
    host_memory_bytes: int = 0  # of this host
    num_cores: int = 1
    has_bfloat16: bool = True
    has_float16: bool = True
    free_disk_bytes: int = 0  # where save_dir is or will be
    deepspeed_problem: str = ""  # why it cannot be imported; empty: it can
    op_problems: dict[str, str] = field(default_factory=dict)  # by op that the run compiles; empty text: none
    compiled_ops: frozenset[str] = frozenset()  # of those, what an earlier run compiled
    stale_locks: tuple[str, ...] = ()  # what is said of locks that killed compilations left

    @property
    def on_gpus(self) -> bool:
        """Whether the run is meant for GPUs."""
        return bool(self.num_gpus) or self.is_remote


@dataclass(frozen=True)
class ShardFacts:
    """What the manifests of a run's shard folders add up to."""

    folders: tuple[str, ...]
    num_epoch_examples: int  # of the mixture, where there is one
    shard_bytes: tuple[int, ...]
    num_clips: int
    remote_bytes: int = 0  # of those behind an address
    has_features: bool = False

    @property
    def num_shards(self) -> int:
        """Tars of all folders."""
        return len(self.shard_bytes)


@dataclass(frozen=True)
class TextFacts:
    """Lengths of a sample of the questions, in tokens."""

    num_sampled: int
    is_estimate: bool  # no tokenizer was at hand: characters over a stated ratio
    num_cut_prompts: int  # longer than data.ip_text_len
    num_cut_answers: int  # longer than data.op_text_len, end-of-text included
    longest_prompt: int
    longest_answer: int  # end-of-text included
    mean_row: float  # tokens of a whole row, cut as the run cuts it
    longest_row: int
    mean_answer: float
    mean_clips: float


@dataclass(frozen=True)
class PartFacts:
    """Encoder, projector or decoder."""

    name: str
    num_parameters: int
    num_trained: int  # ever: in any of the phases; of LoRA the adapters
    num_trained_matrices: int = 0  # of the trained: those that Muon takes
    num_small: int = 0  # parameters in tensors up to stage3_param_persistence_threshold, which ZeRO-3 keeps whole
    num_adapters: int = 0  # LoRA's, counted in num_parameters too

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of it is ever trained."""
        return not self.num_trained


@dataclass(frozen=True)
class ActivationFacts:
    """What autograd keeps from forward to backward, as bytes that grow with the micro-batch."""

    layer_token_bytes: float  # of one decoder layer, a token
    block_token_bytes: float  # of a layer's input alone, which activation checkpointing keeps, a token
    base_token_bytes: float  # of the decoder outside its layers, a token
    projector_clip_bytes: float  # a clip
    encoder_clip_bytes: float  # a clip; 0 where it is not trained
    answer_token_bytes: float  # logits and their gradient, an answer token


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the model, without any weight of it."""

    parts: tuple[PartFacts, ...]
    num_layers: int  # of the decoder
    vocab_size: int
    audio_tokens: int  # of a clip
    max_positions: int  # of the decoder; 0: no limit is known
    has_position_table: bool  # positions beyond the limit have no embedding at all (GPT-2)
    is_tied: bool  # the decoder's head is its token embedding
    largest_parameter: int  # numbers of the largest tensor
    largest_block: int  # parameters of the decoder's largest layer
    has_batchnorm: bool  # in the encoder
    activations: ActivationFacts
    origin: str = ""  # where sizes come from, when not from what the configuration names

    @property
    def num_parameters(self) -> int:
        """All."""
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_trained(self) -> int:
        """Those with a gradient and optimizer state."""
        return sum(part.num_trained for part in self.parts)

    def part(self, name: str) -> PartFacts:
        """Of PARTS."""
        return next(part for part in self.parts if part.name == name)


@dataclass(frozen=True)
class Case:
    """All that a rule may look at. What could not be found out is None, and rules that need it say nothing."""

    config: RunConfig
    engine_json: dict[str, Any]
    machine: Machine = Machine()
    shards: ShardFacts | None = None
    eval_shards: ShardFacts | None = None
    texts: TextFacts | None = None
    model: ModelFacts | None = None
