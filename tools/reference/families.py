"""Goldens of whole models: tiny networks with the structure of every family, in the names of single files and of diffusers folders.

Weights are not stored: tests/families.rs draws them again and writes the files by the names and places that are listed here. How
the original layout names things is written down here independently of the Rust side.
"""
import json
import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common import DATA, MassHook, Schedule, canonical, random_weights, save
from networks import CROSS_DOWN, CROSS_UP, DOWN, UP, noise
from sag import degrade

PROMPT = "a fox in a pine forest at night, masterpiece!"
IDS = [49406, 320, 3240, 530, 320, 7374, 4167, 536, 930, 267, 12066, 256, 49407]       # Hugging Face's, of that prompt
TEXTS = {
    "L": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, hidden_act="quick_gelu", projection_dim=32),
    "H": dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, hidden_act="gelu", projection_dim=48),
    "G": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, hidden_act="gelu", projection_dim=64),
}
FOUR = dict(layers_per_block=2, down_block_types=(CROSS_DOWN,) * 3 + (DOWN,), up_block_types=(UP,) + (CROSS_UP,) * 3, sample_size=64)
UNETS = {
    "sd15": dict(FOUR, block_out_channels=(32, 64, 64, 64), attention_head_dim=8, cross_attention_dim=32),
    "sd15-inpaint": dict(FOUR, block_out_channels=(32, 64, 64, 64), attention_head_dim=8, cross_attention_dim=32, in_channels=9),
    "sd21": dict(FOUR, block_out_channels=(64, 64, 64, 64), attention_head_dim=[1, 1, 1, 1], cross_attention_dim=48, use_linear_projection=True),
    "sdxl": dict(layers_per_block=2, down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP, UP), sample_size=128,
                 block_out_channels=(64, 64, 128), attention_head_dim=[1, 1, 2], transformer_layers_per_block=[1, 1, 2], cross_attention_dim=96,
                 use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=32, projection_class_embeddings_input_dim=64 + 6 * 32),
}
KINDS = {"sd15": "L", "sd15-inpaint": "L", "sd21": "H", "sdxl": "LG"}


def rename(name, pairs):
    for a, b in pairs:
        if name.startswith(a):
            return b + name[len(a):]
    return name


def unet_name(name, levels, attends_up):
    """A UNet's parameter in the original layout; every level has two residual blocks on the way down, three on the way up."""
    head = [("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"), ("add_embedding.linear_1", "label_emb.0.0"),
            ("add_embedding.linear_2", "label_emb.0.2"), ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
            ("mid_block.attentions.0", "middle_block.1"), ("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2")]
    for i in range(levels):
        for j in range(3):
            head += [(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{3 * i + j + 1}.0"), (f"down_blocks.{i}.attentions.{j}", f"input_blocks.{3 * i + j + 1}.1"),
                     (f"up_blocks.{i}.resnets.{j}", f"output_blocks.{3 * i + j}.0"), (f"up_blocks.{i}.attentions.{j}", f"output_blocks.{3 * i + j}.1")]
        head += [(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 * i + 3}.0.op"),
                 (f"up_blocks.{i}.upsamplers.0", f"output_blocks.{3 * i + 2}.{2 if attends_up[i] else 1}")]
    out = rename(name, head)
    if "resnets" in name:
        for a, b in (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
                     ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")):
            out = out.replace(a, b)
    return "model.diffusion_model." + out


def vae_name(name):
    for i in range(4):
        for j in range(3):
            name = name.replace(f"down_blocks.{i}.resnets.{j}", f"down.{i}.block.{j}").replace(f"up_blocks.{i}.resnets.{j}", f"up.{3 - i}.block.{j}")
        name = name.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample").replace(f"up_blocks.{i}.upsamplers.0", f"up.{3 - i}.upsample")
    for a, b in (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
                 ("mid_block.attentions.0.to_q", "mid.attn_1.q"), ("mid_block.attentions.0.to_k", "mid.attn_1.k"), ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
                 ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")):
        name = name.replace(a, b)
    return "first_stage_model." + name


def open_clip_name(name):
    """(name, which third of it)."""
    for a, b in (("text_model.embeddings.position_embedding.weight", "positional_embedding"), ("text_model.embeddings.token_embedding", "token_embedding"),
                 ("text_model.final_layer_norm", "ln_final"), ("text_projection.weight", "text_projection"), ("text_model.encoder.layers", "transformer.resblocks"),
                 ("self_attn.out_proj", "attn.out_proj"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
        name = name.replace(a, b)
    for i, p in enumerate("qkv"):
        if f"self_attn.{p}_proj." in name:
            return name.replace(f"self_attn.{p}_proj.", "attn.in_proj_"), i
    return name, None


def tensors(model, place):
    """[canonical name, shape, name in the single file, how]: how is "" (as it is), "0" to "2" (that third of the rows), "t"
    (transposed) or "4" (a matrix written as a 1x1 convolution)."""
    state = {canonical(k): v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    return [[name, list(state[name].shape), *place(name)] for name in sorted(state)]


def config(model):
    text = model.config.to_json_string() if hasattr(model.config, "to_json_string") else json.dumps(dict(model.config))
    return {k: v for k, v in json.loads(text).items() if not k.startswith(("_name", "_use_default"))}


def hidden(models, kinds, penultimate, prompt=IDS):
    """(hidden states as the UNet receives them, pooled) of PROMPT, padded as each encoder was trained."""
    states, pooled = [], None
    for model, kind in zip(models, kinds):
        ids = torch.tensor([prompt + [49407 if kind == "L" else 0] * (77 - len(prompt))])
        out = model(ids, output_hidden_states=True)
        norm = (model.text_model if hasattr(model, "text_model") else model).final_layer_norm
        if kinds == "LG":
            states.append(out.hidden_states[-2])
            pooled = getattr(out, "text_embeds", None)
        else:
            states.append(norm(out.hidden_states[-2 if penultimate else -1]))
            pooled = states[0][:, len(IDS) - 1]
    return torch.cat(states, -1), pooled


def loop(unet, hook, states, pooled, sizes, h, w):
    """Three Euler steps with CFG 7 and SAG 0.75 (blur 3) of SDXL's kind, uncond first; seed 42."""
    schedule = Schedule()
    sigmas = schedule.simple(3)
    x = noise(42, 1, 4, h, w) * math.sqrt(1 + sigmas[0] ** 2)
    ids = torch.tensor([sizes] * 2)
    mid = [-(-n // 4) for n in (h, w)]

    def denoised(x, s, rows):
        added = dict(text_embeds=pooled[rows], time_ids=ids[rows])
        return x - s * unet(x / math.sqrt(s * s + 1), schedule.timestep(s), encoder_hidden_states=states[rows], added_cond_kwargs=added).sample

    for s, t in zip(sigmas, sigmas[1:]):
        uncond, cond = denoised(x.repeat(2, 1, 1, 1), s, slice(0, 2)).chunk(2)
        degraded, _ = degrade(uncond, hook.mass()[:1], mid, 3.0, 1.0)
        d = uncond + 7 * (cond - uncond) + 0.75 * (degraded - denoised(degraded + (x - uncond), s, slice(0, 1)))
        x = x + (x - d) / s * (t - s)
    return x


def main():
    for family, kw in UNETS.items():
        kinds = KINDS[family]
        unet = random_weights(UNet2DConditionModel(**kw))
        levels, attends = len(kw["block_out_channels"]), ["Cross" in t for t in kw["up_block_types"]]
        parts = {"unet": dict(config=config(unet), tensors=tensors(unet, lambda n: (unet_name(n, levels, attends), "")))}
        golden = {}
        hook, xl = MassHook(unet), family == "sdxl"
        for case, (h, w, batch, tokens) in {"even": (8, 8, 1, 77), "odd": (11, 9, 2, 154)}.items():
            given = dict(sample=noise(1, batch, unet.config.in_channels, h, w), encoder_hidden_states=noise(2, batch, tokens, kw["cross_attention_dim"]))
            added = dict(text_embeds=noise(3, batch, 64), time_ids=torch.tensor([[1024.0, 768, 0, 8, 1024, 1024]] * batch)) if xl else None
            out = unet(given["sample"], torch.tensor(500), encoder_hidden_states=given["encoder_hidden_states"], added_cond_kwargs=added).sample
            golden |= {f"{case}.out": out, f"{case}.mass": hook.mass()}
        if family != "sd15-inpaint":
            vae = random_weights(AutoencoderKL(block_out_channels=(32, 32, 32, 64), layers_per_block=2, latent_channels=4, sample_size=512,
                                               down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                               scaling_factor=0.13025 if xl else 0.18215))
            matrix = lambda n: "4" if "mid_block.attentions" in n and n.endswith("weight") and "group_norm" not in n else ""
            parts["vae"] = dict(config=config(vae), tensors=tensors(vae, lambda n: (vae_name(n), matrix(n))))
            dist = vae.encode(noise(5, 1, 3, 40, 24)).latent_dist
            golden |= dict(decoded=vae.decode(noise(4, 2, 4, 3, 5)).sample, mean=dist.mean, logvar=dist.logvar)
            texts = []
            for i, kind in enumerate(kinds):
                setting = CLIPTextConfig(**TEXTS[kind], vocab_size=49408, max_position_embeddings=77, num_attention_heads=4, bos_token_id=49406, eos_token_id=49407)
                model = random_weights((CLIPTextModelWithProjection if kind == "G" else CLIPTextModel)(setting))
                texts.append(model)
                prefix = {"sd15": "cond_stage_model.transformer.", "sd21": "cond_stage_model.model."}.get(family, f"conditioner.embedders.{i}." + ("transformer." if kind == "L" else "model."))

                def place(name, kind=kind, prefix=prefix):
                    if kind == "L":
                        return prefix + name, ""
                    new, third = open_clip_name(name)
                    return prefix + new, "t" if new == "text_projection" else "" if third is None else str(third)

                parts["text_encoder" + ("_2" if i else "")] = dict(config=config(model), tensors=tensors(model, place))
            states, pooled = hidden(texts, kinds, False)
            golden |= dict(hidden_states=states, pooled=pooled)
            if xl:
                nothing, none = hidden(texts, kinds, False, [49406, 49407])
                both = torch.cat([nothing, states]), torch.cat([none, pooled])
                # original height and width, crop from the top and the left, target height and width
                golden["loop"] = loop(unet, hook, *both, [1024.0, 768.0, 16.0, 8.0, 72.0, 96.0], 9, 12)
            if family == "sd21":
                # A single file of SD 2.x holds all layers, of which the last but one is read.
                golden["single.hidden_states"], golden["single.pooled"] = hidden(texts, kinds, True)
        path = DATA / "families" / f"{family}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if family == "sd15-inpaint":
            parts["unet"].pop("tensors")        # sd15's but for conv_in
        path.write_text(json.dumps(parts, separators=(",", ":")).replace('],["', '],\n["') + "\n")
        print(path.name, path.stat().st_size, "bytes")
        save(f"families/{family}.safetensors", golden)


if __name__ == "__main__":
    main()
