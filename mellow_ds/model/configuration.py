"""What a model is made of, as transformers saves it: front end and encoder, projector, decoder. No weights here."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

HTSAT = "HTSAT"
CNN14 = "Cnn14"
WAVEFORM = "waveform"  # an encoder of transformers that takes the raw waveform

HTSAT_TOKENS = 33  # one latent and 32 frames, whatever the clip's length
HTSAT_REPEATED_TOKENS = 129  # the same with each frame 4 times


class MellowEncoderConfig(PretrainedConfig):
    """The audio encoder and its front end: everything that turns a waveform into features."""

    model_type = "mellow_encoder"

    def __init__(
        self,
        kind: str = HTSAT,
        sampling_rate: int = 32_000,
        clip_samples: int = 320_000,
        window_size: int = 1024,
        hop_size: int = 320,
        mel_bins: int = 64,
        fmin: float = 50.0,
        fmax: float = 14_000.0,
        num_classes: int = 527,
        out_emb: int = 768,
        channels: tuple[int, ...] | list[int] = (64, 128, 256, 512, 1024, 2048),
        dropout: float = 0.2,
        audio_tokens: int = 0,
        trunk: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """`kind`: HTSAT, Cnn14 or waveform. `sampling_rate`, `fmin`, `fmax` in Hz; `clip_samples`, `window_size` and
        `hop_size` in samples. `out_emb` is the width of the embeddings, `channels` and `dropout` are Cnn14's.
        `audio_tokens`: tokens of a clip, 0 for what the encoder gives. `trunk`: HTSAT: fields of ClapAudioConfig that
        differ from AudioSet's; waveform: the whole configuration of the transformers model.
        """
        self.kind = kind
        self.sampling_rate = sampling_rate
        self.clip_samples = clip_samples
        self.window_size = window_size
        self.hop_size = hop_size
        self.mel_bins = mel_bins
        self.fmin = fmin
        self.fmax = fmax
        self.num_classes = num_classes
        self.out_emb = out_emb
        self.channels = list(channels)
        self.dropout = dropout
        self.audio_tokens = audio_tokens
        self.trunk = dict(trunk or {})
        super().__init__(**kwargs)


class MellowConfig(PretrainedConfig):
    """The whole model. `text_config` is the decoder's own configuration, under the name that generation looks for."""

    model_type = "mellow"
    sub_configs = {"encoder_config": MellowEncoderConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        encoder_config: MellowEncoderConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        projector_dropout: float = 0.5,
        end_token_id: int = 0,
        lora: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """`end_token_id` ends an answer and pads what is generated. The projector's width is the decoder's.

        `lora`: rank, alpha, dropout and target_modules of the decoder's adapters, where it has some.
        """
        # the embeddings are the decoder's; the outer value would only be read for weights tied across its border
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)  # first: it would reset how a decoder that is already there attends
        if not isinstance(encoder_config, MellowEncoderConfig):
            encoder_config = MellowEncoderConfig(**(encoder_config or {}))
        if not isinstance(text_config, PretrainedConfig):
            fields = dict(text_config or {"model_type": "llama"})
            text_config = AutoConfig.for_model(**fields)
        self.encoder_config = encoder_config
        self.text_config = text_config
        self.projector_dropout = projector_dropout
        self.end_token_id = end_token_id
        self.lora = dict(lora) if lora else None
