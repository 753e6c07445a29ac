"""The run configuration: what a recipe may say, with units and defaults. Nothing here imports torch.

Values are checked on construction (`__post_init__`), so a `RunConfig` that exists is consistent in itself. What needs
files or the world (shards that are there, a batch that divides) is checked where those are opened. The keys of `train`
stand in `train_keys.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from mellow_ds.config.checks import at_least, one_of
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.errors import ConfigError

MODES = ("train", "evaluate_checkpoint")


def _first_double(names: list[str]) -> str:
    return next(name for number, name in enumerate(names) if name in names[:number])


@dataclass(frozen=True)
class MixtureSet:
    """One shard set of a mixture."""

    shards: tuple[str, ...] = ()
    """Folders with a manifest.json, trained on together."""
    name: str = ""
    """What its loss is logged under; empty: the name of its first folder."""
    weight: float = 0.0
    """Share of the examples; an epoch of the mixture then has as many examples as all sets together."""
    epochs: float = 0.0
    """Times that each of its examples comes up in an epoch of the mixture; 0.5: each in every second one."""

    def __post_init__(self) -> None:
        at_least("data.mixture", self, 0, "weight", "epochs")
        if not self.shards:
            raise ConfigError("data.mixture has a set without shards: give each set its folders")
        if (self.weight > 0) == (self.epochs > 0):
            raise ConfigError(
                f"data.mixture: the set {self.label} has weight {self.weight} and epochs {self.epochs}; give one"
            )

    @property
    def label(self) -> str:
        """What the set is called in logs."""
        return self.name or self.shards[0].rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how a clip becomes a waveform."""

    shards: tuple[str, ...] = ()
    """Folders with a manifest.json, or addresses of some (https://, s3://, ...), trained on together."""
    mixture: tuple[MixtureSet, ...] = ()
    """Shard sets with a share each, in place of shards: [{shards: A, weight: 0.7}, {shards: B, weight: 0.3}]."""
    eval_shards: tuple[str, ...] = ()
    """Folders evaluated on; with --mode evaluate_checkpoint, empty means data.shards."""
    datapath: str = ""
    """Folder that the paths in datafiles are relative to (Mellow's key; used for packing)."""
    datafiles: tuple[str, ...] = ()
    """ReasonAQA-style JSON files (Mellow's key; used for packing)."""
    sampling_rate: int = 32_000
    """Hz; the shards must have been packed at this rate."""
    segment_seconds: float = 10.0
    """Seconds of audio a clip gives: longer is cropped, shorter is padded with zeros."""
    tokenizer_type: str = ""
    """Hub name or folder of the tokenizer; empty: the decoder's own."""
    ip_text_len: int = 129
    """Most prompt tokens; a longer prompt is cut and counted."""
    op_text_len: int = 250
    """Most answer tokens, end-of-text included; a longer answer is cut and counted."""
    shuffle: bool = True
    """Visit the training examples in a new order each epoch."""
    shuffle_window: int = 4
    """Shards whose examples are permuted together."""
    order_runs: int = 64
    """Equal runs that the order of an epoch is cut into; a global batch takes its share of each."""
    questions_per_clip: int = 1
    """Questions of a clip that stand next to each other in the order, so that a micro-batch shares their audio."""
    shuffle_options: bool = False
    """Draw the order of the options of multiple-choice questions anew each epoch, with the letters rewritten."""
    max_bad_fraction: float = 0.0
    """Fraction of the samples read that may be unreadable in training before the run stops; 0 stops at the first."""

    cache_folder: str = ""
    """Where remote shards are kept on this node; empty: $MELLOW_CACHE/shards, else mellow-ds/shards in ~/.cache."""
    cache_gigabytes: float = 50.0
    """GB that remote shards may take there, over all processes of the node; 0: no bound."""

    def __post_init__(self) -> None:
        at_least("data", self, 1, "sampling_rate", "ip_text_len", "op_text_len", "shuffle_window", "order_runs")
        at_least("data", self, 1, "questions_per_clip")
        at_least("data", self, 0, "max_bad_fraction", "cache_gigabytes")
        if self.mixture and self.shards:
            raise ConfigError("data.shards and data.mixture are both given: name the shards in one of them")
        if len({bool(part.weight) for part in self.mixture}) > 1:
            raise ConfigError("data.mixture gives a weight for some sets and epochs for others: give all the same")
        labels = [part.label for part in self.mixture]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"data.mixture has two sets called {_first_double(labels)}: give each a name of its own")
        if self.segment_seconds <= 0:
            raise ConfigError(f"data.segment_seconds is {self.segment_seconds}; it must be above 0")

    @property
    def train_shards(self) -> tuple[str, ...]:
        """All folders trained on, of a mixture those of its sets one after the other."""
        return self.shards or tuple(folder for part in self.mixture for folder in part.shards)

    @property
    def clip_samples(self) -> int:
        """Samples of one clip as the encoder sees it."""
        return round(self.segment_seconds * self.sampling_rate)


@dataclass(frozen=True)
class EncoderConfig:
    """The audio encoder. Sizes matter where it is trained from nothing; a pretrained one brings its own."""

    audioenc_name: str = "HTSAT"
    """HTSAT, Cnn14, or the hub name or local folder of an audio encoder of transformers."""
    out_emb: int = 768
    """Width of the frame embeddings: 768 for HTSAT, 2048 for Cnn14, the last of `channels` for a narrow one."""
    d_proj: int = 576
    """Width after the projector; equals the decoder's hidden size."""
    projector_dropout: float = 0.5
    """Dropout of the projector while training."""
    use_pretrained_audioencoder: bool = False
    """Load the weights in pretrained_audioencoder_path."""
    pretrained_audioencoder_path: str = ""
    """HTSAT_AudioSet_Saved_1.ckpt or Cnn14_mAP=0.431.pth, or the folder that holds it."""
    freeze_audio_encoder_weights: bool = True
    """Keep the encoder as it is: eval mode, no gradients, no optimizer state."""
    freeze_projector_weights: bool = False
    """Keep the projector as it is."""
    audio_tokens: int = 33
    """Tokens of a clip in the decoder. HTSAT: 33, or 129 (Mellow's: each frame 4 times); 0: what the encoder gives."""
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Channels of Cnn14's blocks; each but the last halves time and mel bins. Fewer or narrower makes it small."""
    num_classes: int = 527
    """Classes of the token-semantic or tagging head."""
    dropout: float = 0.2
    """Dropout between Cnn14's blocks while it is trained."""
    mel_bins: int = 64
    """Mel bands of the front end."""
    window_size: int = 1024
    """Samples of a Fourier window."""
    hop_size: int = 320
    """Samples between frames."""
    fmin: float = 50.0
    """Hz, lower edge of the lowest mel band."""
    fmax: float = 14_000.0
    """Hz, upper edge of the highest mel band."""

    def __post_init__(self) -> None:
        at_least("model.encoder", self, 1, "out_emb", "d_proj", "num_classes", "mel_bins", "window_size", "hop_size")
        at_least("model.encoder", self, 0, "audio_tokens", "fmin", "dropout", "projector_dropout")
        if self.fmax <= self.fmin:
            raise ConfigError(f"model.encoder.fmax is {self.fmax}; it must be above fmin ({self.fmin})")
        if self.audioenc_name == "HTSAT" and self.audio_tokens not in (0, 33, 129):
            raise ConfigError(
                f"model.encoder.audio_tokens is {self.audio_tokens}; HTSAT gives 33 (or 129, Mellow's layout)"
            )
        if self.use_pretrained_audioencoder and not self.pretrained_audioencoder_path:
            raise ConfigError(
                "model.encoder.use_pretrained_audioencoder is true but pretrained_audioencoder_path is empty: "
                "name the file, or set use_pretrained_audioencoder to false"
            )
        narrow = self.audioenc_name == "Cnn14" and self.channels != EncoderConfig.channels
        if narrow and self.freeze_audio_encoder_weights and not self.use_pretrained_audioencoder:
            raise ConfigError(
                "model.encoder.freeze_audio_encoder_weights is true for a Cnn14 of its own sizes that has no weights: "
                "set it to false, so that the encoder is trained"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the decoder, whose own weights then stay as they are (through peft)."""

    rank: int = 0
    """Rank of the adapters; 0: none."""
    alpha: float = 16.0
    """What the adapters give is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapters while training."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the decoder's layers that get adapters, such as q_proj; all-linear: every linear layer but the head."""

    def __post_init__(self) -> None:
        at_least("model.decoder.lora", self, 0, "rank", "dropout")
        if self.alpha <= 0:
            raise ConfigError(f"model.decoder.lora.alpha is {self.alpha}; it must be above 0")
        if self.rank and not self.target_modules:
            raise ConfigError("model.decoder.lora.target_modules is empty: name layers, or all-linear")


@dataclass(frozen=True)
class DecoderConfig:
    """The causal language model."""

    text_decoder: str = "HuggingFaceTB/SmolLM2-135M"
    """Hub name, local folder, path of a GGUF file, or `from-config`: made small, from nothing, by the sizes below."""
    freeze_gpt_weights: bool = False
    """Keep the decoder as it is: eval mode, no gradients."""
    hidden_size: int = 128
    """from-config: width."""
    intermediate_size: int = 384
    """from-config: width of the feed-forward layers."""
    num_hidden_layers: int = 3
    """from-config: layers."""
    num_attention_heads: int = 4
    """from-config: attention heads."""
    vocab_size: int = 2048
    """from-config: most tokens of the tokenizer that is trained on the corpus; words as tokens."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        at_least(
            "model.decoder",
            self,
            1,
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        if not self.text_decoder:
            raise ConfigError(
                "model.decoder.text_decoder is empty: name a model, a folder, a GGUF file, or 'from-config'"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Encoder, projector and decoder."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    layout: Literal["compact", "mellow"] = "compact"
    """compact: nothing padded; mellow: the sequence that Mellow's published weights expect."""

    def __post_init__(self) -> None:
        one_of("model", self, "layout", ("compact", "mellow"))
        decoder, encoder = self.decoder, self.encoder
        if decoder.text_decoder == "from-config" and decoder.hidden_size != encoder.d_proj:
            raise ConfigError(
                f"model.encoder.d_proj is {encoder.d_proj} but model.decoder.hidden_size is {decoder.hidden_size}: "
                "make them equal"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """Scoring of held-out examples."""

    batch_size: int = 16
    """Examples generated together on one rank."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    max_examples: int = 0
    """Evaluate only the first so many; 0: all."""
    compare_silence: bool = False
    """Evaluate a second time with every clip silenced: what is left of the score does not come from listening."""
    captions: bool = True
    """Report caption metrics for caption and description subtypes."""
    gather_weights: bool = False
    """For train.evaluate_at_end where parameters are sharded (stage 3): hold all weights on every rank, which is faster
    where they fit. Otherwise they are gathered for each token, a block at a time."""

    def __post_init__(self) -> None:
        at_least("evaluation", self, 1, "batch_size", "max_new_tokens")
        at_least("evaluation", self, 0, "max_examples")


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    mode: str = "train"
    """train or evaluate_checkpoint."""
    engine: Literal["auto", "deepspeed", "fsdp"] = "auto"
    """auto: DeepSpeed, and FSDP2 where DeepSpeed cannot be used."""
    deepspeed_config: str = ""
    """Engine JSON (ds_configs/*.json); empty: ZeRO-2."""
    save_dir: str = "runs/default"
    """Run folder: configuration, metrics, logs, checkpoints, evaluation results."""
    resume_checkpoint: str = ""
    """Start from these weights: a step folder of a run, or an exported model. Not a resume: step 0, new optimizer."""
    distributed_backend: str = ""
    """nccl or gloo; empty: nccl on GPUs, gloo on CPUs."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is '{self.mode}'; choose one of {', '.join(MODES)}")
        one_of("", self, "engine", ("auto", "deepspeed", "fsdp"))
        if self.distributed_backend not in ("", "nccl", "gloo"):
            raise ConfigError(f"distributed_backend is '{self.distributed_backend}'; choose nccl or gloo")

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder is trained at some step."""
        if self.train.phases:
            return any("encoder" in phase.train for phase in self.train.phases)
        return not self.model.encoder.freeze_audio_encoder_weights

    @property
    def keeps_random_encoder(self) -> bool:
        """Whether the encoder stays as it is drawn: never trained, with weights of nobody."""
        encoder = self.model.encoder
        brings_weights = encoder.use_pretrained_audioencoder or encoder.audioenc_name not in ("HTSAT", "Cnn14")
        return not (self.trains_encoder or brings_weights or self.resume_checkpoint)
