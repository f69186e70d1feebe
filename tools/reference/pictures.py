"""Goldens of what starts from a picture, and of how prompts are weighed: diffusers' own img2img and inpainting pipelines without
SAG, and the same loops with it, which diffusers never had."""
import math

import numpy as np
import torch
from diffusers import (EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, UNet2DConditionModel)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from common import PROMPT, MassHook, Schedule, embedded, random_weights, save
from networks import CROSS_DOWN, CROSS_UP, DOWN, UP, config
from sag import degrade

WIDTH, HEIGHT = 72, 96
STEPS = 6                                       # steps made; denoise 0.6 of a schedule of 10
NINE = dict(in_channels=9, block_out_channels=(32, 64), layers_per_block=1, down_block_types=(DOWN, CROSS_DOWN),
            up_block_types=(CROSS_UP, UP), attention_head_dim=[4, 8], cross_attention_dim=192, sample_size=64)


def picture():
    """Red, green, blue of every pixel by a formula that the Rust test has too."""
    y, x, c = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), np.arange(3), indexing="ij")
    return ((x * 7 + y * 3 + c * 50 + (x * y) // 5) % 256).astype(np.uint8)


def mask():
    """Blocks of eight pixels, so that every way of making it smaller agrees."""
    y, x = np.meshgrid(np.arange(HEIGHT) // 8, np.arange(WIDTH) // 8, indexing="ij")
    return (((x + y) % 3 == 0) | (x > 5)).astype(np.float32)


class Loop:
    """Guidance with ComfyUI's semantics from a picture's latents; `kept` blends outside the mask, `shown` is seen by nine channels."""

    def __init__(self, parts, unet):
        self.tokenizer, self.text, _, self.vae = parts
        self.unet, self.hook, self.schedule = unet, MassHook(unet), Schedule()
        ids = self.tokenizer(["", PROMPT], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        self.context = self.text(ids).last_hidden_state
        self.levels = len(unet.config.block_out_channels)

    def denoised(self, x, sigma, context, shown):
        c_in = 1 / math.sqrt(sigma**2 + 1)
        seen = x * c_in if shown is None else torch.cat([x * c_in, shown.repeat(len(x), 1, 1, 1)], 1)
        return x - sigma * self.unet(seen, self.schedule.timestep(sigma), encoder_hidden_states=context).sample

    def run(self, sigmas, z, noise, kept=None, shown=None, cfg=7.0, sag=0.75, blur=3.0):
        x = z + noise * sigmas[0]
        mid = [-(-n // 2 ** (self.levels - 1)) for n in z.shape[2:]]
        for s, t in zip(sigmas, sigmas[1:]):
            given = x if kept is None else x * kept + (z + noise * s) * (1 - kept)
            uncond, cond = self.denoised(given.repeat(2, 1, 1, 1), s, self.context, shown).chunk(2)
            d = uncond + cfg * (cond - uncond)
            if sag:
                degraded, _ = degrade(uncond, self.hook.mass()[:1], mid, blur, 1.0)
                d = d + sag * (degraded - self.denoised(degraded + (given - uncond), s, self.context[:1], shown))
            if kept is not None:
                d = d * kept + z * (1 - kept)
            x = x + (x - d) / s * (t - s)
        return x


def relative(a, b):
    return float((a - b).norm() / b.norm())


def main():
    torch.set_num_threads(2)
    # diffusers draws from the encoder's distribution; ComfyUI takes its mean, and so do we.
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mean
    parts = embedded()
    tokenizer, text, unet, vae = parts
    schedule = Schedule()
    sigmas = schedule.simple(10)[-STEPS - 1:]
    whole = schedule.simple(10)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace")
    rgb, hole = picture(), mask()
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = lambda image: vae.encode(image).latent_dist.mean * vae.config.scaling_factor
    z = latents(x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(42))
    kept = torch.from_numpy(hole[::8, ::8].copy())[None, None]
    shown = torch.cat([kept, latents(x * (1 - torch.from_numpy(hole)[None, None]))], 1)
    nine = random_weights(UNet2DConditionModel(**NINE))
    config("../pictures/unet_nine", nine)
    four_loop, nine_loop = Loop(parts, unet), Loop(parts, nine)
    out = dict(encoded=z, img2img_sag=four_loop.run(sigmas, z, noise), masked_sag=four_loop.run(sigmas, z, noise, kept=kept),
               nine_sag=nine_loop.run(sigmas, z, noise, shown=shown))

    common = dict(prompt=PROMPT, negative_prompt="", strength=0.6, guidance_scale=7.0, output_type="latent", sigmas=None)
    extra = dict(vae=vae, text_encoder=text, tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for name, pipeline, net in (("img2img", StableDiffusionImg2ImgPipeline, unet), ("masked", StableDiffusionInpaintPipeline, unet),
                                ("nine", StableDiffusionInpaintPipeline, nine)):
        pipe = pipeline(unet=net, scheduler=EulerDiscreteScheduler.from_config(scheduler.config), **extra)
        pipe.set_progress_bar_config(disable=True)
        inner = pipe.scheduler.set_timesteps
        # Our sigmas are trained ones, so that diffusers' timesteps for them are whole numbers too.
        pipe.scheduler.set_timesteps = lambda n=None, device=None, inner=inner, **kw: inner(sigmas=whole, device=device)
        args = dict(common, image=x, generator=torch.Generator().manual_seed(42), num_inference_steps=10)
        args.pop("sigmas")
        if name != "img2img":
            args |= dict(mask_image=torch.from_numpy(hole)[None, None], height=HEIGHT, width=WIDTH)
        out[name] = pipe(**args).images
        loop = nine_loop if name == "nine" else four_loop
        ours = loop.run(sigmas, z, noise, kept=kept if name == "masked" else None, shown=shown if name == "nine" else None, sag=0)
        print(f"{name}: the loop without SAG is {relative(ours, out[name]):.1e} from diffusers' pipeline")
    save("pictures/loops.safetensors", out)

    # Weights as ComfyUI applies them: away from the empty prompt's states; as A1111 does: scaled, the mean restored.
    def states(prompt):
        ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return text(ids).last_hidden_state[0]

    plain, empty = states("a red fox"), states("")
    weights = torch.ones(77, 1)
    weights[2] = 1.5                            # a, (red:1.5), fox: one token each
    comfy = (plain - empty) * weights + empty
    scaled = plain * weights
    save("pictures/weights.safetensors", dict(comfy=comfy, a1111=scaled * (plain.mean() / scaled.mean())))
    assert len(tokenizer("a red fox").input_ids) == 5


if __name__ == "__main__":
    main()
