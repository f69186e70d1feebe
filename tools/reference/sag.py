"""Goldens of self-attention guidance: the degraded picture in f64 by its definition, and the whole loop on the embedded model."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import DATA, PROMPT, MassHook, Schedule, embedded, save, save_json


def gaussian(sigma, dtype):
    t = torch.arange(-4, 5).to(dtype)
    w = torch.exp(-0.5 * (t / sigma) ** 2) if sigma > 0 else (t == 0).to(dtype)
    return w / w.sum()


def degrade(denoised, mass, mid, sigma, threshold):
    """(degraded, mask): denoised [B, 4, h, w] blurred where mass [B, T] on the grid `mid` is above the threshold."""
    w = gaussian(sigma, denoised.dtype)
    mask = (mass > threshold).to(denoised.dtype).view(-1, 1, *mid)
    mask = F.interpolate(mask.float(), size=denoised.shape[2:], mode="nearest").to(denoised.dtype)
    kernel = (w[:, None] * w[None, :]).expand(4, 1, 9, 9)
    blurred = F.conv2d(F.pad(denoised, (4, 4, 4, 4), mode="reflect"), kernel, groups=4)
    return mask * blurred + (1 - mask) * denoised, mask


def vectors():
    """The worked example of the specification, with its printed numbers asserted, and awkward sizes."""
    heads, tokens, d = 2, 6, 4
    idx = torch.arange(heads * tokens * d, dtype=torch.float64).view(heads, tokens, d)
    attention = torch.softmax(torch.sin(0.37 * idx) @ torch.cos(0.53 * idx).transpose(1, 2) / math.sqrt(d), -1)
    mass = attention.mean(0).sum(0)[None]
    assert np.allclose(mass, [1.033983, 1.100898, 0.867001, 0.999338, 1.102617, 0.896163], atol=1e-6)
    u = torch.sin(0.1 * torch.arange(4 * 16 * 24, dtype=torch.float64)).view(1, 4, 16, 24)
    for sigma, total in ((1.0, 461.7202621), (2.0, 493.7213574)):
        degraded, mask = degrade(u, mass, (2, 3), sigma, 1.0)
        assert int(mask.sum()) == 192 and abs(float((degraded - u).abs().sum()) - total) < 1e-6
    cases = []

    def case(x, m, mid, sigma, threshold):
        out, mask = degrade(x, m, mid, sigma, threshold)
        flat = lambda t: [float(str(np.float32(v))) for v in t.flatten()]       # f32's shortest decimals
        cases.append(dict(shape=list(x.shape), denoised=flat(x), mass=flat(m), mid=list(mid), blur_sigma=sigma,
                          threshold=threshold, mask=[int(v) for v in mask.flatten()], degraded=flat(out)))

    for sigma in (0.3, 1.0, 2.0, 3.0):
        for threshold in (1.0, 0.95):
            case(u, mass, (2, 3), sigma, threshold)
    g = torch.Generator().manual_seed(3)
    sizes = [(9, 13, 2, 2), (5, 5, 1, 1), (5, 7, 2, 3), (13, 5, 4, 2), (61, 6, 8, 1), (122, 5, 16, 1)]
    for h, w, mid_h, mid_w in sizes:
        for sigma in (0.0, 0.3, 1.0, 3.0, 10.0):
            for threshold in (1.0, 0.95):
                x = torch.randn(2, 4, h, w, generator=g).double()
                m = 1 + 0.2 * torch.randn(2, mid_h * mid_w, generator=g).double()
                if h * w <= 130 or sigma == 1.0 and threshold == 1.0:
                    case(x, m, (mid_h, mid_w), sigma, threshold)
    save_json("sag.json", cases)


class Loop:
    """Classifier-free and self-attention guidance with ComfyUI's semantics, x = x0 + sigma eps."""

    def __init__(self, v_prediction=False):
        self.tokenizer, self.text, self.unet, self.vae = embedded()
        self.hook, self.schedule, self.v = MassHook(self.unet), Schedule(), v_prediction

    def prepare(self, prompt, negative=""):
        ids = self.tokenizer([negative, prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        self.context = self.text(ids).last_hidden_state

    def denoised(self, x, sigma, context):
        out = self.unet(x / math.sqrt(sigma**2 + 1), self.schedule.timestep(sigma), encoder_hidden_states=context).sample
        if self.v:
            return x / (sigma**2 + 1) - out * sigma / math.sqrt(sigma**2 + 1)
        return x - sigma * out

    def guided(self, x, sigma, cfg, sag, blur, threshold=1.0):
        uncond, cond = self.denoised(x.repeat(2, 1, 1, 1), sigma, self.context.to(x.dtype)).chunk(2)
        result = uncond + cfg * (cond - uncond)
        if sag:
            self.mass.append(self.hook.mass()[:1])
            degraded, mask = degrade(uncond, self.mass[-1], (8, 8), blur, threshold)
            self.masks.append(mask[0])
            again = self.denoised(degraded + (x - uncond), sigma, self.context[:1].to(x.dtype))
            result = result + sag * (degraded - again)
        return result

    def run(self, sampler, sigmas, cfg=7.0, sag=0.75, blur=3.0, dtype=torch.float32):
        self.mass, self.masks = [], []
        noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(42))
        x = (noise * math.sqrt(1 + sigmas[0] ** 2)).to(dtype)
        old, last = None, None
        for s, t in zip(sigmas, sigmas[1:]):
            d = self.guided(x, s, cfg, sag, blur)
            if sampler == "euler" or t == 0:
                x = x + (x - d) / s * (t - s)
            else:
                h = math.log(s / t)
                mixed = d if old is None else d + (d - old) * h / (2 * math.log(last / s))
                x = t / s * x - math.expm1(-h) * mixed
            old, last = d, s
        return x, noise


def report(name, latents, mass, exact_latents, exact_mass):
    """How far f32's rounding moves a loop, and how near that brings a token of the map to the threshold of 1."""
    margin, drift = (exact_mass - 1).abs(), (mass - exact_mass).abs()
    print(f"{name}: latents f32 against f64 {float((latents - exact_latents).norm() / exact_latents.norm()):.1e};",
          f"tokens within 1e-4 of the threshold {int((margin < 1e-4).sum())}, nearest {float(margin.min()):.1e};",
          f"largest part of its margin that a token's mass moved {float((drift / margin).max()):.3f}")


def main():
    vectors()
    torch.set_num_threads(2)
    loop, exact = Loop(), Loop()
    loop.prepare(PROMPT), exact.prepare(PROMPT)
    exact.unet.double()
    for name, sampler, sigmas in (("euler", "euler", loop.schedule.normal(20)), ("dpmpp_2m_karras", "dpmpp_2m", loop.schedule.karras(20))):
        latents, noise = loop.run(sampler, sigmas)
        mass, masks = torch.cat(loop.mass), torch.cat(loop.masks)
        plain = loop.run(sampler, sigmas, sag=0)[0]
        save(f"loop_{name}.safetensors", dict(noise=noise, latents=latents, masks=masks, mass=mass, latents_nosag=plain))
        report(name, latents, mass, exact.run(sampler, sigmas, dtype=torch.float64)[0], torch.cat(exact.mass))
        if name == "euler":
            picture = loop.vae.decode(latents / loop.vae.config.scaling_factor).sample
            levels = ((picture[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(levels).save(DATA / "fox.png", optimize=True)
    v = Loop(v_prediction=True)
    v.prepare(PROMPT)
    save("loop_v.safetensors", dict(latents=v.run("euler", v.schedule.normal(6), cfg=3.0, sag=0.5, blur=2.0)[0]))


if __name__ == "__main__":
    main()
