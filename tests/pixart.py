"""Small transformers and pipelines of PixArt, random weights, and their tensors under PixArt's own names."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from edm.text.pixart_files import load_transformer
from toy.files import UserError

CONFIG = dict(num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=2,
              in_channels=4, out_channels=8, caption_channels=32, sample_size=8)  # fmt: skip


def random_(network, seed=0, std=0.2):
    torch.manual_seed(seed)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=std)
    return network.eval().requires_grad_(False)


def tiny(seed=0, **changes):
    return random_(PixArtTransformer2DModel(**CONFIG | changes), seed)


def make_pipeline(folder, seed=0, width=32, **changes):
    """A whole pipeline of random weights, in diffusers' layout."""
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz.,"]
    words = [("▁" + word, -3.0) for word in ("red", "fox", "blue", "boat", "in", "the", "snow", "a")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -4.0), *letters, *words]
    encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=2,
                                      num_heads=2, feed_forward_proj="gated-gelu"))  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
                        down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    PixArtAlphaPipeline(
        T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=120), random_(encoder, 1),
        random_(vae, 2), tiny(seed, **changes), DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Read only."""
    return make_pipeline(tmp_path_factory.mktemp("pixart") / "teacher")


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == torch.float32 and torch.equal(a[name], b[name]), name


def original_by_hand(network):
    """The inverse of the conversion for one block's names, written out here."""
    state, found = network.state_dict(), {}
    pairs = {
        "x_embedder.proj": "pos_embed.proj", "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2", "t_block.1": "adaln_single.linear",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2", "final_layer.linear": "proj_out",
    }  # fmt: skip
    for i in range(network.config.num_layers):
        new, old = f"transformer_blocks.{i}.", f"blocks.{i}."
        found[old + "scale_shift_table"] = state[new + "scale_shift_table"]
        pairs |= {old + "attn.proj": new + "attn1.to_out.0", old + "cross_attn.q_linear": new + "attn2.to_q",
                  old + "cross_attn.proj": new + "attn2.to_out.0", old + "mlp.fc1": new + "ff.net.0.proj",
                  old + "mlp.fc2": new + "ff.net.2"}  # fmt: skip
        for w in (".weight", ".bias"):
            qkv = [state[f"{new}attn1.to_{x}{w}"] for x in "qkv"]
            kv = [state[f"{new}attn2.to_{x}{w}"] for x in "kv"]
            found[f"{old}attn.qkv{w}"], found[f"{old}cross_attn.kv_linear{w}"] = torch.cat(qkv), torch.cat(kv)
    found |= {f"{old}.{w}": state[f"{new}.{w}"] for old, new in pairs.items() for w in ("weight", "bias")}
    found["final_layer.scale_shift_table"] = state["scale_shift_table"]
    found["y_embedder.y_embedding"] = torch.randn(120, network.config.caption_channels)
    found["pos_embed"] = network.pos_embed.pos_embed
    return found


def refused(source, *words, named=None, **how):
    """named: with what its one line begins, if not with the source."""
    with pytest.raises(UserError) as error:
        load_transformer(source, **how)
    text = str(error.value)
    assert text.startswith(named or str(source)) and "\n" not in text and len(text) < 400, text
    for word in words:
        assert word in text, text
