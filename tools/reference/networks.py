"""Goldens of the networks: small ones of every shape that a config can ask for, and the embedded model's own."""
import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from common import DATA, PROMPT, MassHook, canonical, embedded, random_weights, save, save_json

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
UNETS = {
    # heads of 12 channels, linear projections, two transformer blocks at the inner level, an odd latent, a timestep an image
    "unet_linear": (dict(block_out_channels=(32, 96), layers_per_block=1, down_block_types=(DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, UP),
                         attention_head_dim=[2, 8], cross_attention_dim=24, use_linear_projection=True, transformer_layers_per_block=[1, 2]),
                    dict(batch=2, h=7, w=5, tokens=77, timesteps=[999.0, 3.0])),
    # convolutional projections, attention on the outer levels, seven tokens of context
    "unet_conv": (dict(block_out_channels=(32, 64, 64), layers_per_block=2, down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN),
                       up_block_types=(UP, CROSS_UP, CROSS_UP), attention_head_dim=[4, 8, 8], cross_attention_dim=40),
                  dict(batch=1, h=9, w=12, tokens=7, timesteps=[500.0])),
    # Stable Diffusion 1.5's four levels on the smallest latent
    "unet_deep": (dict(block_out_channels=(32, 32, 64, 64), layers_per_block=2, down_block_types=(CROSS_DOWN,) * 3 + (DOWN,),
                       up_block_types=(UP,) + (CROSS_UP,) * 3, attention_head_dim=8, cross_attention_dim=32),
                  dict(batch=1, h=5, w=5, tokens=77, timesteps=[1.0])),
    # nine channels in, wide heads
    "unet_inpaint": (dict(in_channels=9, block_out_channels=(64, 128), layers_per_block=1, down_block_types=(DOWN, CROSS_DOWN),
                          up_block_types=(CROSS_UP, UP), attention_head_dim=[4, 2], cross_attention_dim=32),
                     dict(batch=1, h=16, w=16, tokens=77, timesteps=[250.0])),
}
VAES = {
    "vae_two": (dict(block_out_channels=(32, 64), layers_per_block=1), dict(h=7, w=5)),
    "vae_four": (dict(block_out_channels=(32, 32, 64, 64), layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False), dict(h=5, w=6)),
}
CLIPS = {
    "clip_quick": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, hidden_act="quick_gelu"),
    "clip_gelu": dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu"),
}


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(name, model):
    """The config that the model was made from, and its tensors' canonical names and shapes."""
    shapes = {canonical(k): list(v.shape) for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    save_json(f"networks/{name}.shapes.json", dict(sorted(shapes.items())))
    path = DATA / "networks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = model.config.to_json_string() if hasattr(model.config, "to_json_string") else json.dumps(dict(model.config))
    path.write_text(json.dumps({k: v for k, v in json.loads(text).items() if not k.startswith(("_name", "_use_default"))}, indent=1, sort_keys=True) + "\n")


def unet_case(name, unet, sample, timestep, context):
    hook = MassHook(unet)
    out = unet(sample, timestep, encoder_hidden_states=context).sample
    save(f"networks/{name}.safetensors", dict(sample=sample, timestep=timestep, encoder_hidden_states=context, out=out, mass=hook.mass()))


def main():
    for name, (kw, at) in UNETS.items():
        unet = random_weights(UNet2DConditionModel(sample_size=16, **kw))
        config(name, unet)
        b, c = at["batch"], kw.get("in_channels", 4)
        unet_case(name, unet, noise(1, b, c, at["h"], at["w"]), torch.tensor(at["timesteps"]), noise(2, b, at["tokens"], kw["cross_attention_dim"]))
    for name, (kw, at) in VAES.items():
        n = len(kw["block_out_channels"])
        vae = random_weights(AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n, **kw))
        config(name, vae)
        f = 2 ** (n - 1)
        latent, image = noise(1, 1, 4, at["h"], at["w"]), noise(2, 1, 3, at["h"] * f, at["w"] * f) * 0.5
        dist = vae.encode(image).latent_dist
        save(f"networks/{name}.safetensors", dict(latent=latent, decoded=vae.decode(latent).sample, image=image, mean=dist.mean, logvar=dist.logvar))
    for name, kw in CLIPS.items():
        clip = random_weights(CLIPTextModel(CLIPTextConfig(vocab_size=100, projection_dim=32, bos_token_id=98, eos_token_id=99, pad_token_id=99, **kw)))
        config(name, clip)
        ids = torch.randint(0, 98, (2, 77), generator=torch.Generator().manual_seed(1))
        ids[:, 0], ids[0, 20:], ids[1, 76] = 98, 99, 99
        out = clip(ids)
        save(f"networks/{name}.safetensors", dict(ids=ids.float(), hidden_states=out.last_hidden_state, pooled=out.pooler_output))

    tokenizer, text, unet, vae = embedded()
    prompts = ["", PROMPT, "a red car on a road at sunset, on the left"]
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    out = text(ids)
    save("networks/embedded_clip.safetensors", dict(ids=ids.float(), hidden_states=out.last_hidden_state[1:2], pooled=out.pooler_output))
    unet_case("embedded_unet", unet, noise(1, 1, 4, 32, 32), torch.tensor([500.0]), out.last_hidden_state[1:2])
    latent, image = noise(1, 1, 4, 8, 8) * 5, torch.nn.functional.avg_pool2d(noise(2, 1, 3, 128, 128), 3, 2, 1).clamp(-1, 1)
    dist = vae.encode(image).latent_dist
    save("networks/embedded_vae.safetensors", dict(latent=latent, decoded=vae.decode(latent).sample, image=image, mean=dist.mean, logvar=dist.logvar))


if __name__ == "__main__":
    main()
