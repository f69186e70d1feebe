"""Goldens of schedules and samplers: ComfyUI's sigmas, and k-diffusion's own trajectories on a denoiser that needs no network."""
import importlib.util
import sys
import types
from pathlib import Path

import torch

from common import Schedule, save_json


def k_diffusion_sampling():
    """k_diffusion.sampling without the package's __init__, which imports training code and its dependencies."""
    folder = Path(importlib.util.find_spec("k_diffusion").origin).parent
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = [str(folder)]
    package.utils = utils
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    sys.modules.update({"k_diffusion": package, "k_diffusion.utils": utils})
    return importlib.import_module("k_diffusion.sampling")


def denoiser(x, sigma, **_):
    """Any smooth function of x and sigma that no sampler is exact for."""
    sigma = sigma.view(-1, 1, 1, 1)
    return torch.tanh(0.3 * x + 0.1) / (1 + 0.5 * sigma) + 0.2 * torch.sin(sigma)


def ddim(model, x, sigmas, callback, **_):
    """k-diffusion has none: Song et al. 2020, equation 12 with eta 0, for x = x0 + sigma eps."""
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        d = model(x, s[None])
        callback(dict(x=x, i=i))
        x = d + t * (x - d) / s
    return x


def trajectory(name, sampler, sigmas):
    generator, noise, seen = torch.Generator().manual_seed(7), [], []

    def draw(*_):
        noise.append(torch.randn(1, 4, 2, 2, generator=generator))
        return noise[-1].double()

    # 16 numbers of seed 5, in f32 as a latent is; the ancestral noise is that of seed 7
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(5)).double() * sigmas[0]
    more = dict(noise_sampler=draw) if "ancestral" in name else {}
    end = sampler(denoiser, x, torch.tensor(sigmas, dtype=torch.float64), callback=lambda c: seen.append(c["x"]), disable=True, **more)
    steps = [t.flatten().tolist() for t in seen[1:] + [end]]
    return dict(sampler=name, sigmas=sigmas, start=x.flatten().tolist(), steps=steps, noise=[n.flatten().tolist() for n in noise])


def main():
    schedule = Schedule()
    cases = []
    for name in ("normal", "karras", "exponential", "simple", "ddim_uniform"):
        for steps, denoise in [(n, 1.0) for n in (1, 2, 3, 5, 7, 10, 20, 50, 100)] + [(10, 0.5), (20, 0.75), (7, 0.3)]:
            sigmas = getattr(schedule, name)(steps if denoise == 1.0 else int(steps / denoise))[-(steps + 1):] if denoise < 1.0 else getattr(schedule, name)(steps)
            cases.append(dict(scheduler=name, steps=steps, denoise=denoise, sigmas=sigmas, timesteps=[schedule.timestep(s) for s in sigmas if s > 0]))
    save_json("schedules.json", cases)
    runs = [schedule.karras(8), schedule.normal(10), schedule.simple(5)]
    k = k_diffusion_sampling()
    samplers = {name: getattr(k, "sample_" + name) for name in ("euler", "euler_ancestral", "heun", "dpmpp_2m")} | {"ddim": ddim}
    save_json("trajectories.json", [trajectory(name, sampler, sigmas) for name, sampler in samplers.items() for sigmas in runs])


if __name__ == "__main__":
    main()
