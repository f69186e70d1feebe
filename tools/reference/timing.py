"""Times PyTorch on the CPU for the demo's picture: 256x256, 20 Euler steps, CFG and SAG, f32. Prints seconds by part.

    python3 timing.py [--threads 2]
"""
import argparse
import time

import torch

from common import PROMPT
from sag import Loop


def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(ap.parse_args().threads)
    for layout in (torch.contiguous_format, torch.channels_last):
        loop = Loop()
        loop.unet.to(memory_format=layout), loop.vae.to(memory_format=layout)
        text = timed(lambda: loop.prepare(PROMPT))
        sigmas = loop.schedule.normal(20)
        loop.run("euler", sigmas[:2] + [0.0])                       # warm up
        sample = timed(lambda: setattr(loop, "x", loop.run("euler", sigmas)[0]))
        loop.vae.decode(loop.x / loop.vae.config.scaling_factor)
        decode = timed(lambda: loop.vae.decode(loop.x / loop.vae.config.scaling_factor))
        print(f"{str(layout):28} text {text:.2f} s, sample {sample:.2f} s, decode {decode:.2f} s, total {text + sample + decode:.2f} s")


if __name__ == "__main__":
    main()
