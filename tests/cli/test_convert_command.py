"""`mellow-ds convert` by its command line on a checkpoint with the original's names, and an answer from the result."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from mellow_ds.model.tokenizer import train_tokenizer
from tests.cli.runs import forked

WORDS = [f"word{number}" for number in range(157)]  # with end-of-text, unknown and `!` the 160 that the decoder knows


@pytest.fixture
def decoder_folder(tmp_path: Path) -> Path:
    """What `--model.decoder.text_decoder` names: the decoder's configuration and tokenizer. No weights."""
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=160, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=100000.0,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    ).save_pretrained(tmp_path / "lm")  # fmt: skip
    train_tokenizer([*WORDS, "!"], 160).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def mellow_checkpoint(shared_dir: Path, tmp_path: Path) -> Path:
    """A file as the original saves it, of HTSAT: the recorded weights and what is computed beside them."""
    parity = shared_dir / "parity"
    tensors = {
        name: torch.from_numpy(np.array(array))
        for name, array in parity_module(parity).state_dict(parity / "htsat_llama_keys.json").items()
    }
    tensors["caption_decoder.lm.lm_head.weight"] = tensors["caption_decoder.lm.model.embed_tokens.weight"]
    computed = json.loads((parity / "htsat_llama_computed_keys.json").read_text())
    tensors |= {name: torch.zeros(shape) for name, shape in computed.items()}
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "v0.ckpt")
    return tmp_path / "v0.ckpt"


def parity_module(folder: Path) -> ModuleType:
    """The module that makes the recorded weights again."""
    spec = importlib.util.spec_from_file_location("parity_state", folder / "state.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_converted_checkpoint_answers_a_question(
    mellow_checkpoint: Path, decoder_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "converted"
    arguments = ["--from-mellow", mellow_checkpoint, "--out", out, "--model.decoder.text_decoder", decoder_folder]
    (converted,) = forked("mellow-ds", "convert", *arguments)
    assert converted.returncode == 0, converted.stderr[-3000:]
    assert converted.stdout.strip() == str(out)
    saved = torch.load(mellow_checkpoint, weights_only=True)["state_dict"]
    with safe_open(out / "model.safetensors", framework="pt") as model:
        for theirs, ours in (
            ("audio_encoder.base.c2l.weight", "projector.c2l.weight"),
            ("caption_decoder.lm.model.embed_tokens.weight", "decoder.model.embed_tokens.weight"),
            ("audio_encoder.base.htsat.tscam_conv.weight", "encoder.net.tscam_conv.weight"),
        ):
            assert torch.equal(model.get_tensor(ours), saved[theirs]), ours

    tones = np.random.default_rng(0).normal(0, 0.1, (2, 32_000))
    audio: list[object] = []
    for number, tone in enumerate(tones):
        soundfile.write(tmp_path / f"{number}.wav", tone, 32_000)
        audio += ["--audio", tmp_path / f"{number}.wav"]
    ask = ["generate", "--checkpoint", out, "--prompt", "word3 word7", "--max-new-tokens", 6]
    (answered,) = forked("mellow-ds", *ask, *audio)
    assert answered.returncode == 0, answered.stderr[-3000:]
    assert answered.stdout.count("\n") == 1
    said = answered.stdout.split()
    assert 1 <= len(said) <= 6
    assert set(said) <= {*WORDS, "<unk>", "!"}

    # a folder that is there is not written over
    (again,) = forked("mellow-ds", "convert", *arguments)
    assert again.returncode == 2
    assert f"--out {out} is there and not empty" in again.stderr
