"""Goldens of schedules and samplers: ComfyUI's sigmas, and k-diffusion's trajectories on a denoiser that needs no network.

The samplers are written here from their papers, in f64, in k-diffusion's own form (to_d, get_ancestral_step), one step a line.
"""
import math

import torch

from common import Schedule, save_json


def denoiser(x, sigma):
    """Any smooth function of x and sigma that no sampler is exact for."""
    return torch.tanh(0.3 * x + 0.1) / (1 + 0.5 * sigma) + 0.2 * math.sin(sigma)


def euler(x, s, t, d, memory):
    return x + (x - d) / s * (t - s)


def ddim(x, s, t, d, memory):
    return d + t * (x - d) / s


def euler_ancestral(x, s, t, d, memory):
    up = min(t, math.sqrt(t**2 * (s**2 - t**2) / s**2))
    down = math.sqrt(t**2 - up**2)
    x = x + (x - d) / s * (down - s)
    if t > 0:
        memory["noise"].append(torch.randn(x.shape, generator=memory["generator"]).double())
        x = x + memory["noise"][-1] * up
    return x


def heun(x, s, t, d, memory):
    slope = (x - d) / s
    if t == 0:
        return x + slope * (t - s)
    landed = x + slope * (t - s)
    again = (landed - denoiser(landed, t)) / t
    return x + (slope + again) / 2 * (t - s)


def dpmpp_2m(x, s, t, d, memory):
    old, last = memory.get("denoised"), memory.get("sigma")
    memory.update(denoised=d, sigma=s)
    if t == 0:
        return d
    h = math.log(s) - math.log(t)
    if old is None:
        return t / s * x - math.expm1(-h) * d
    r = (math.log(last) - math.log(s)) / h
    return t / s * x - math.expm1(-h) * ((1 + 1 / (2 * r)) * d - 1 / (2 * r) * old)


def trajectory(step, sigmas):
    memory = dict(noise=[], generator=torch.Generator().manual_seed(7))
    # 16 numbers of seed 5, in f32 as a latent is; the ancestral noise is that of seed 7
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(5)).double() * sigmas[0]
    start, out = x.flatten().tolist(), []
    for s, t in zip(sigmas, sigmas[1:]):
        x = step(x, s, t, denoiser(x, s), memory)
        out.append(x.flatten().tolist())
    return dict(sampler=step.__name__, sigmas=sigmas, start=start, steps=out, noise=[n.flatten().tolist() for n in memory["noise"]])


def main():
    schedule = Schedule()
    cases = []
    for name in ("normal", "karras", "exponential", "simple", "ddim_uniform"):
        for steps, denoise in [(n, 1.0) for n in (1, 2, 3, 5, 7, 10, 20, 50, 100)] + [(10, 0.5), (20, 0.75), (7, 0.3)]:
            sigmas = getattr(schedule, name)(steps if denoise == 1.0 else int(steps / denoise))[-(steps + 1):] if denoise < 1.0 else getattr(schedule, name)(steps)
            cases.append(dict(scheduler=name, steps=steps, denoise=denoise, sigmas=sigmas, timesteps=[schedule.timestep(s) for s in sigmas if s > 0]))
    save_json("schedules.json", cases)
    runs = [schedule.karras(8), schedule.normal(10), schedule.simple(5)]
    save_json("trajectories.json", [trajectory(step, sigmas) for step in (euler, euler_ancestral, heun, dpmpp_2m, ddim) for sigmas in runs])


if __name__ == "__main__":
    main()
