"""What the reference scripts share: paths, the embedded model, the noise schedule, and weights that both sides can make."""
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"
DATA = ROOT / "tests" / "data"
PROMPT = "a fox in a pine forest at night"
torch.set_grad_enabled(False)


def save(name, tensors):
    """Tensors as f32 safetensors under tests/data."""
    path = DATA / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().float().contiguous() for k, v in tensors.items()}, str(path))
    print(path.relative_to(ROOT), path.stat().st_size, "bytes")


def save_json(name, value):
    """JSON under tests/data."""
    path = DATA / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\n")
    print(path.relative_to(ROOT), path.stat().st_size, "bytes")


def embedded():
    """(tokenizer, text encoder, UNet, VAE) of the embedded model: f16 weights, computed in f32."""
    return (CLIPTokenizer.from_pretrained(ASSETS / "tokenizer"), CLIPTextModel.from_pretrained(ASSETS, subfolder="text_encoder").float().eval(),
            UNet2DConditionModel.from_pretrained(ASSETS, subfolder="unet").float().eval(),
            AutoencoderKL.from_pretrained(ASSETS, subfolder="vae").float().eval())


def canonical(name):
    """Newer transformers leave CLIP's prefix out; scumble's canonical names have it."""
    return "text_model." + name if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")) else name


def random_weights(model):
    """Fill a model with weights that tests/common/networks.rs makes too, so that none are stored.

    Tensor i of the canonical names in order is torch.randn(numel) of a generator seeded 1000 + i, then: 1 + 0.1 v for the
    weights of norms, 0.1 v for biases, 0.5 v for embedding tables, else v / sqrt(fan in); all in f32.
    """
    state = {canonical(k): (k, v) for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    for i, name in enumerate(sorted(state)):
        key, old = state[name]
        v = torch.randn(old.numel(), generator=torch.Generator().manual_seed(1000 + i))
        if name.endswith(".bias"):
            v = v * np.float32(0.1)
        elif "norm" in name:
            v = 1 + v * np.float32(0.1)
        elif "embedding.weight" in name:
            v = v * np.float32(0.5)
        else:
            v = v * np.float32(1 / math.sqrt(old.numel() / old.shape[0]))
        old.copy_(v.view(old.shape))
    return model.eval()


class MassHook:
    """The attention mass per key of the mid block's first self-attention: column sums of the head-mean softmax, [B, T]."""

    def __init__(self, unet):
        self.attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
        self.attn.to_q.register_forward_hook(lambda m, i, o: setattr(self, "q", o))
        self.attn.to_k.register_forward_hook(lambda m, i, o: setattr(self, "k", o))

    def mass(self):
        b, t, c = self.q.shape
        split = lambda x: x.view(b, t, self.attn.heads, -1).transpose(1, 2)
        q, k = split(self.q), split(self.k)
        return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1).mean(1).sum(1)


class Schedule:
    """Stable Diffusion's noise levels, with ComfyUI's semantics: sigma = sqrt((1 - abar) / abar), nearest timestep in log sigma."""

    def __init__(self):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)
        exact = ((1 - abar) / abar).sqrt()
        self.table, self.log = exact.float(), exact.log().float()

    def timestep(self, sigma):
        return int((torch.log(torch.tensor(sigma, dtype=torch.float32)) - self.log).abs().argmin())

    def sigma(self, t):
        low, high, w = int(t.floor()), int(t.ceil()), t.frac()
        return float(((1 - w) * self.log[low] + w * self.log[high]).exp())

    def normal(self, n):
        return [self.sigma(t) for t in torch.linspace(999, 0, n)] + [0.0]

    def karras(self, n, rho=7):
        low, high = float(self.table[0]) ** (1 / rho), float(self.table[-1]) ** (1 / rho)
        return [float(np.float32((high + r * (low - high)) ** rho)) for r in np.linspace(0, 1, n)] + [0.0]

    def exponential(self, n):
        low, high = math.log(float(self.table[0])), math.log(float(self.table[-1]))
        return [float(np.float32(math.exp(high + r * (low - high)))) for r in np.linspace(0, 1, n)] + [0.0]

    def simple(self, n):
        return [float(self.table[-(1 + int(i * (1000 / n)))]) for i in range(n)] + [0.0]

    def ddim_uniform(self, n):
        return ([0.0] + [float(self.table[i]) for i in range(1, 1000, max(1000 // n, 1))])[::-1]
