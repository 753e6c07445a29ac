"""A checkpoint of the original Mellow, converted, computes what the original computed."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mellow_ds.config.schema import DataConfig, DecoderConfig, ModelConfig
from mellow_ds.errors import CheckpointError
from mellow_ds.model.convert import convert_mellow
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.model.processing import MellowProcessor
from mellow_ds.model.tokenizer import train_tokenizer

DECODER = LlamaConfig(  # of the parity arrays
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
HEAD, EMBEDDINGS = "caption_decoder.lm.lm_head.weight", "caption_decoder.lm.model.embed_tokens.weight"


@pytest.fixture
def decoder_config(tmp_path) -> ModelConfig:
    """A folder with the decoder's configuration and a tokenizer; the weights are in the checkpoint."""
    DECODER.save_pretrained(tmp_path / "lm")
    train_tokenizer(["what is it ?", "no !"], 160).save_pretrained(tmp_path / "lm")
    return ModelConfig(decoder=DecoderConfig(text_decoder=str(tmp_path / "lm")))


@pytest.fixture
def parity(shared_dir):
    """The module that rebuilds weights and inputs, its folder, and what the original computed."""
    folder = shared_dir / "parity"
    spec = importlib.util.spec_from_file_location("parity_state", folder / "state.py")
    state = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(state)
    return state, folder, np.load(folder / "expected.npz")


def write_checkpoint(state, folder, tag, file) -> None:
    tensors = {
        name: torch.from_numpy(np.array(array)) for name, array in state.state_dict(folder / f"{tag}_keys.json").items()
    }
    tensors[HEAD] = tensors[EMBEDDINGS]
    computed = json.loads((folder / f"{tag}_computed_keys.json").read_text())
    tensors.update({name: torch.zeros(shape) for name, shape in computed.items()})
    torch.save({"state_dict": tensors, "epoch": 1}, file)


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "audio_tokens"), [("htsat_llama", 129), ("cnn14_llama", 32)])
def test_a_converted_checkpoint_computes_what_the_original_did(parity, decoder_config, tmp_path, tag, audio_tokens):
    state, folder, expected = parity
    write_checkpoint(state, folder, tag, tmp_path / "mellow.ckpt")
    out = convert_mellow(tmp_path / "mellow.ckpt", tmp_path / "out", decoder_config, DataConfig())
    model = MellowForConditionalGeneration.from_pretrained(out).eval()
    layout = MellowProcessor.from_pretrained(out).row_layout
    assert (layout.audio_tokens, layout.num_clips) == (audio_tokens, 2)

    waveforms = torch.from_numpy(state.waveforms())
    prompt, answer = state.token_ids(160)
    separators = np.zeros((2, 2 * (audio_tokens + 1)), dtype=np.int64)
    input_ids = torch.from_numpy(np.concatenate([separators, prompt, answer], axis=1))
    prefix_length = input_ids.shape[1] - answer.shape[1]
    assert prefix_length == expected[f"{tag}.prefix_length"]
    labels = input_ids.clone()
    labels[:, :prefix_length] = -100
    with torch.no_grad():
        clips = model.encoder.clip_posteriors(waveforms)
        tokens = model.projector(model.encode(waveforms))
        output = model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            waveforms=waveforms,
            clip_row=torch.tensor([0, 0, 1, 1]),
            clip_start=torch.tensor([0, audio_tokens + 1, 0, audio_tokens + 1]),
            clip_index=torch.tensor([0, 1, 1, 0]),
            labels=labels,
        )

    def difference(found, name) -> float:
        return float(np.abs(found.numpy() - expected[f"{tag}.{name}"]).max())

    assert difference(clips, "clipwise_output") < 1e-4
    assert difference(tokens, "audio_tokens") < 1e-3
    assert difference(output.logits.reshape(2, answer.shape[1], 160), "answer_logits") < 1e-3
    assert difference(output.loss, "loss") < 1e-3


def cnn14_checkpoint(num_classes=5) -> dict:
    """A checkpoint of the original's names in the published sizes of Cnn14, random."""
    channels = (64, 128, 256, 512, 1024, 2048)
    shapes = {
        "fc1.weight": (2048, 2048),
        "fc1.bias": (2048,),
        "fc_audioset.weight": (num_classes, 2048),
        "fc_audioset.bias": (num_classes,),
    }
    norms = [("bn0", 64)]
    for block, (before, after) in enumerate(zip((1, *channels), channels, strict=False), start=1):
        shapes[f"conv_block{block}.conv1.weight"] = (after, before, 3, 3)
        shapes[f"conv_block{block}.conv2.weight"] = (after, after, 3, 3)
        norms += [(f"conv_block{block}.bn1", after), (f"conv_block{block}.bn2", after)]
    for name, width in norms:
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})
    tensors = {
        f"audio_encoder.base.cnn14.{name}": torch.empty(shape).uniform_(0, 0.1) for name, shape in shapes.items()
    }
    tensors.update({f"audio_encoder.base.cnn14.{name}.num_batches_tracked": torch.tensor(0) for name, _ in norms})
    tensors["audio_encoder.base.c2l.weight"] = torch.randn(2048, num_classes)
    tensors["audio_encoder.base.c2l.bias"] = torch.randn(2048)
    tensors["audio_encoder.projection.linear1.weight"] = torch.randn(64, 2048)
    tensors["audio_encoder.projection.linear2.weight"] = torch.randn(64, 64)
    tensors["audio_encoder.projection.layer_norm.weight"] = torch.ones(64)
    tensors["audio_encoder.projection.layer_norm.bias"] = torch.zeros(64)
    decoder = LlamaForCausalLM(DECODER)
    tensors.update({f"caption_decoder.lm.{name}": value for name, value in decoder.state_dict().items()})
    return tensors


@pytest.mark.slow
def test_names_go_where_they_belong_and_a_head_apart_from_its_embeddings_is_not_taken(decoder_config, tmp_path, caplog):
    tensors = cnn14_checkpoint()
    tensors[HEAD] = tensors[HEAD] + 1
    for file in (tmp_path / "lm").glob("tokenizer*"):
        file.unlink()  # a decoder that is known by its configuration alone
    torch.save({"model": tensors}, tmp_path / "mellow.ckpt")
    convert_mellow(tmp_path / "mellow.ckpt", tmp_path / "out", decoder_config, DataConfig())
    assert "lm_head.weight differs" in caplog.text
    assert "without a processor" in caplog.text
    assert not (tmp_path / "out" / "processor_config.json").exists()
    converted = MellowForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    for theirs, ours in (
        ("audio_encoder.base.cnn14.conv_block6.bn2.running_var", "encoder.net.conv_block6.bn2.running_var"),
        ("audio_encoder.base.c2l.weight", "projector.c2l.weight"),
        ("audio_encoder.projection.layer_norm.bias", "projector.layer_norm.bias"),
        (EMBEDDINGS, "decoder.lm_head.weight"),
        ("caption_decoder.lm.model.layers.1.mlp.down_proj.weight", "decoder.model.layers.1.mlp.down_proj.weight"),
    ):
        assert torch.equal(tensors[theirs], converted[ours]), theirs


@pytest.mark.slow
def test_a_checkpoint_with_a_name_too_few_is_refused(decoder_config, tmp_path):
    tensors = cnn14_checkpoint()
    tensors.pop("caption_decoder.lm.model.norm.weight")
    torch.save(tensors, tmp_path / "mellow.ckpt")
    with pytest.raises(CheckpointError, match=r"1 missing \(decoder.model.norm.weight\)"):
        convert_mellow(tmp_path / "mellow.ckpt", tmp_path / "out", decoder_config, DataConfig())
    assert not (tmp_path / "out").exists()


def test_another_kind_of_checkpoint_is_refused(decoder_config, tmp_path):
    torch.save({"state_dict": {"visual.weight": torch.zeros(1)}}, tmp_path / "clip.ckpt")
    with pytest.raises(CheckpointError, match=r"clip\.ckpt is not a Mellow checkpoint"):
        convert_mellow(tmp_path / "clip.ckpt", tmp_path / "out", decoder_config, DataConfig())
