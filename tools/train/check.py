#!/usr/bin/env python3
"""A smoke test of every step of the training on the CPU, far too small to learn anything: about two minutes on two cores.

    python3 check.py [--model ../../assets] [--keep DIR]      --keep: leave the backgrounds, sheets and the tiny run there

It draws backgrounds, learns a tokenizer, trains a VAE, a UNet and a text encoder for a few steps at 64 x 64, exports them, and
samples from that export and from the embedded model. A step that fails stops it with that step's own error.
"""
import argparse, contextlib, filecmp, glob, os, subprocess, sys, tempfile, time

HERE = os.path.dirname(os.path.abspath(__file__))


def run(what, script, *args):
    t = time.time()
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{what}: {script} failed with status {done.returncode}\n{done.stdout}")
    print(f"ok  {what}  ({time.time() - t:.0f} s)", flush=True)
    return done.stdout


def expect(what, true):
    if not true:
        sys.exit(f"{what}: not so")
    print(f"ok  {what}", flush=True)


def check(model, out):
    for script in glob.glob(os.path.join(HERE, "*.py")):
        with open(script) as f:
            compile(f.read(), script, "exec")
    size = ("--size", 64)
    run("backgrounds", "backgrounds.py", "--out", f"{out}/bg", "--count", 64, "--shard", 32, "--procs", 2, *size)
    run("a tokenizer from captions", "tokenizer.py", "--backgrounds", f"{out}/bg", "--out", f"{out}/tokenizer", "--captions", 2000,
        "--words", f"{HERE}/data/words.txt")
    for name in ("vocab.json", "merges.txt"):
        expect(f"data/tokenizer/{name} is the model's own",
               filecmp.cmp(f"{HERE}/data/tokenizer/{name}", f"{model}/tokenizer/{name}", shallow=False))
    log = run("training and export", "train.py", "--backgrounds", f"{out}/bg", "--run", f"{out}/run", "--device", "cpu", *size, "--subjects", 12,
              "--vae-seconds", 12, "--gan-seconds", 4, "--vae-batch", 8, "--batch", 8, "--cache", 32, "--encode-batch", 16, "--encode-chunks", 1,
              "--backgrounds-max", 64, "--backgrounds-min", 1, "--feeders", 1, "--log-every", 2, "--preview-every", 1e9, "--save-every", 2,
              "--seconds", 60)
    expect("the losses are numbers", "unet 2: loss" in log and "nan" not in log)
    run("export of a checkpoint", "models.py", "--vae", f"{out}/run/vae.pt", "--ema", f"{out}/run/ema.pt", "--out", f"{out}/exported")
    few = ("--device", "cpu", "--steps", 2, "--count", 1, "--sag", .75)
    run("a sample of that export, with SAG", "sample.py", "--model", f"{out}/run/model", "--out", f"{out}/tiny.png", *few)
    run("a sample of the embedded model, with SAG", "sample.py", "--model", model, "--out", f"{out}/embedded.png", *few)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default=os.path.join(HERE, "../../assets"))
    ap.add_argument("--keep")
    a = ap.parse_args()
    if a.keep:
        os.makedirs(a.keep, exist_ok=True)
    with contextlib.nullcontext(a.keep) if a.keep else tempfile.TemporaryDirectory() as out:
        check(a.model, out)
    print("all steps work")


if __name__ == "__main__":
    main()
