"""A decoder built on the meta device and filled from files, against transformers' own loading; and its memory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from mellow_ds.config.schema import LoraConfig
from mellow_ds.errors import ConfigError
from mellow_ds.model.assemble import build_model
from mellow_ds.model.lora import is_adapter
from mellow_ds.model.meta import DecoderWeights, materialise, parameters_on_meta

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 80, "rope_theta": 5000.0}  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent.parent


def save_llama(folder: Path, tied: bool = False, shard: str = "20KB") -> Path:
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def config_of(model_config, folder, rank=0):
    decoder = dataclasses.replace(model_config.decoder, text_decoder=str(folder), lora=LoraConfig(rank=rank))
    return dataclasses.replace(model_config, decoder=decoder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_filled_from_files_it_is_the_model_that_is_built_whole(
    model_config, data_config, tokenizer, lay_out, tmp_path, tied, rank
):
    config = config_of(model_config, save_llama(tmp_path, tied), rank)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole = build_model(config, data_config, tokenizer, seed=5).eval()
    model = build_model(config, data_config, tokenizer, seed=5, on_meta=True).eval()
    for name, parameter in model.named_parameters():
        real = not name.startswith("decoder.") or is_adapter(name)
        assert parameter.is_meta != real, name
    assert all(not buffer.is_meta for buffer in model.buffers())
    assert torch.equal(model.decoder.model.rotary_emb.inv_freq, whole.decoder.model.rotary_emb.inv_freq)
    names = [name for name, _ in DecoderWeights(model.decoder, str(tmp_path))]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.is_meta)  # each once
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    materialise(model, model, DecoderWeights(model.decoder, str(tmp_path)).read)
    expected = whole.state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert (model.decoder.lm_head.weight is model.decoder.model.embed_tokens.weight) == tied
    batch = lay_out([((0, 1), "is it a bell? a) yes b) no", "yes")]).model_inputs()
    assert torch.equal(model(**batch).logits, whole(**batch).logits)


def test_names_of_a_bare_model_and_half_precision(tmp_path):
    """As GPT-2 lies on the hub: without the prefix `transformer.`, without the tied head, with masks that are gone."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    saved = GPT2LMHeadModel(config).half()
    bare = {n.removeprefix("transformer."): t.clone() for n, t in saved.state_dict().items() if n != "lm_head.weight"}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path)
    with parameters_on_meta():
        decoder = GPT2LMHeadModel(config)
    found = dict(DecoderWeights(decoder, str(tmp_path)))
    expected = dict(saved.named_parameters())
    assert found.keys() == {f"decoder.{name}" for name in expected}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name.removeprefix("decoder.")])
    whole = torch.nn.ModuleDict({"decoder": decoder})
    materialise(whole, whole, found.__getitem__)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    ids = torch.arange(5)[None]
    assert torch.equal(decoder.eval()(ids).logits, saved.float().eval()(ids).logits)


def test_a_tied_weight_under_its_other_name(tmp_path):
    folder = save_llama(tmp_path, tied=True, shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    decoder = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert "decoder.model.embed_tokens.weight" in dict(DecoderWeights(decoder, str(folder)))


def test_from_sizes_for_a_step_folder_and_from_nothing(model_config, data_config, tokenizer, model):
    resumed = build_model(model_config, data_config, tokenizer, seed=1, load_pretrained=False, on_meta=True)
    assert all(parameter.is_meta for parameter in resumed.decoder.parameters())
    drawn = build_model(model_config, data_config, tokenizer, seed=1, on_meta=True)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in drawn.state_dict().items())


def lose(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / index["weight_map"]["model.layers.1.mlp.up_proj.weight"]).unlink()


def rename(folder):
    for file in folder.glob("*.safetensors"):
        save_file({name.replace("mlp", "ff"): t for name, t in load_file(file).items()}, file, {"format": "pt"})


def resize(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def drop_all(folder):
    for file in folder.glob("model*"):
        file.unlink()


def escape(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose, "cannot be read.*missing or damaged"),
        (rename, r"lack model\.layers\.0\.mlp\.\w+.*load and save it once with transformers"),
        (resize, r"mlp\.\w+\.weight in .* is \[.*\], but its config.json asks for \["),
        (drop_all, "no model.safetensors and no readable"),
        (escape, "names files outside"),
    ],
)
def test_files_that_are_not_the_decoders_are_refused_before_anything_is_read(
    model_config, data_config, tokenizer, tmp_path, damage, said
):
    config = config_of(model_config, save_llama(tmp_path))
    damage(tmp_path)
    model = build_model(config, data_config, tokenizer, seed=5, on_meta=True)
    with pytest.raises(ConfigError, match=said):
        DecoderWeights(model.decoder, str(tmp_path))


def test_a_gguf_file_is_refused():
    with pytest.raises(ConfigError, match="can only be read whole"):
        DecoderWeights(torch.nn.Linear(1, 1), "some.gguf")


MEASURE = """
import resource, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from mellow_ds.model.meta import DecoderWeights, parameters_on_meta

def anonymous():  # what is not a mapped file
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

config = AutoConfig.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", hidden_size=8, num_hidden_layers=1,
    num_attention_heads=1, intermediate_size=8, vocab_size=8))  # what a first model brings in
before = anonymous()
with parameters_on_meta():
    decoder = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
built = anonymous() - before
share, most, total = [], 0.0, 0
for number, (name, tensor) in enumerate(DecoderWeights(decoder, sys.argv[1])):
    total += tensor.nbytes * 2  # of float32
    most = max(most, anonymous() - before)
    share.append(tensor.flatten()[: tensor.numel() // 8].float())  # what one of 8 ranks keeps
    del tensor
print(total / 2**20, built, most)
"""


@pytest.mark.slow
def test_no_more_than_a_share_and_a_block_is_ever_in_memory(tmp_path):
    """260 MB of weights in blocks of 28 MB, in a process of its own that keeps an eighth of them."""
    config = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=7, num_attention_heads=8,
                         num_key_value_heads=8, vocab_size=12_000)  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path, max_shard_size="20MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total, built, most = map(float, done.stdout.split())
    block = (4 * 768 * 768 + 3 * 768 * 2048) * 4 / 2**20
    assert total > 200
    assert built < 10
    assert most < total / 8 + block
