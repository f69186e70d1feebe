"""Goldens of LoRAs: small files in every naming, and what diffusers makes of them on the small networks of networks.py."""
import json

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as SD
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as XL
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from common import DATA, random_weights, save, save_json
from networks import CLIPS, CROSS_DOWN, CROSS_UP, DOWN, UNETS, UP, noise

FOLDER = DATA / "lora"
# SDXL's shape: no attention on the outer level, two transformer blocks on the inner, text and sizes added to the time embedding
XL_UNET = dict(block_out_channels=(32, 64), layers_per_block=1, down_block_types=(DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, UP),
               attention_head_dim=[2, 4], cross_attention_dim=40, use_linear_projection=True, transformer_layers_per_block=[1, 2],
               addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24)
# What each kind of layer is called below a transformer, and below a residual block, in both layouts.
INNER = ["attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "ff.net.0.proj", "ff.net.2"]
PROCESSOR = {"attn1.to_q": "attn1.processor.to_q_lora", "attn1.to_out.0": "attn1.processor.to_out_lora", "attn2.to_k": "attn2.processor.to_k_lora",
             "attn2.to_v": "attn2.processor.to_v_lora"}


def unet(name):
    return random_weights(UNet2DConditionModel(sample_size=16, **(XL_UNET if name == "unet_xl" else UNETS[name][0])))


def clip():
    return random_weights(CLIPTextModel(CLIPTextConfig(vocab_size=100, projection_dim=32, bos_token_id=98, eos_token_id=99, pad_token_id=99, **CLIPS["clip_quick"])))


class File:
    """A LoRA in the making: factors of modules of a model, about half as large as the weights that they are added to.

    What diffusers reads has one alpha for all modules: of several, it loses those of attention (their names in its
    alpha_pattern still end in _lora.down.weight, which PEFT then warns of). tucker() has several.
    """

    def __init__(self, model, seed):
        self.modules, self.seed, self.tensors = dict(model.named_modules()), seed, {}

    def draw(self, *shape):
        self.seed += 1
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed))

    def add(self, module, key, rank, ends=(".lora_up.weight", ".lora_down.weight"), alpha=None, tucker=False):
        """Factors of `module` under the name `key`."""
        shape = self.modules[module].weight.shape
        n, c, kernel = shape[0], shape[1], shape[2:]
        ones = (1,) * len(kernel)
        fan = c * kernel.numel()
        self.tensors[key + ends[0]] = self.draw(n, rank, *ones) * 0.5 * rank**-0.5
        if tucker:
            self.tensors[key + ends[1]] = self.draw(rank, c, *ones) * fan**-0.5
            self.tensors[key + ".lora_mid.weight"] = self.draw(rank, rank, *kernel) * rank**-0.5
        else:
            self.tensors[key + ends[1]] = self.draw(rank, c, *kernel) * fan**-0.5
        if alpha is not None:
            self.tensors[key + ".alpha"] = torch.tensor(float(alpha))

    def write(self, name, dtype, metadata=None):
        """As `dtype`, to tests/data/lora; the tensors as they are read back."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        path = FOLDER / f"{name}.lora.safetensors"
        save_file({k: v.to(dtype).contiguous() for k, v in self.tensors.items()}, str(path), metadata and {"lora_adapter_metadata": json.dumps(metadata)})
        print(path.name, path.stat().st_size, "bytes,", len(self.tensors), "tensors")
        return {k: v.float() for k, v in load_file(str(path)).items()}


def kohya(model):
    """kohya's names after diffusers' modules, with an alpha each; LoCon's convolutions."""
    file, t = File(model, 100), "down_blocks.0.attentions.0.transformer_blocks.0"
    names = [f"{t}.{x}" for x in INNER]
    names += ["mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_v", "down_blocks.0.attentions.0.proj_in"]
    names += ["up_blocks.1.attentions.0.proj_out", "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut", "up_blocks.2.resnets.0.time_emb_proj"]
    names += ["down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"]
    for i, name in enumerate(names):
        file.add(name, "lora_unet_" + name.replace(".", "_"), 2 + i % 3, alpha=3)
    return file


def original(model):
    """kohya's names for SDXL, after the modules of the original checkpoint."""
    file, d, u = File(model, 200), "down_blocks.1.attentions.0", "up_blocks.0.attentions.1"
    names = {f"{d}.transformer_blocks.1.{x}": f"input_blocks.3.1.transformer_blocks.1.{x}" for x in INNER}
    names |= {f"{u}.transformer_blocks.0.attn2.to_v": "output_blocks.1.1.transformer_blocks.0.attn2.to_v", f"{u}.proj_in": "output_blocks.1.1.proj_in"}
    names |= {"mid_block.attentions.0.transformer_blocks.0.attn1.to_k": "middle_block.1.transformer_blocks.0.attn1.to_k", "mid_block.attentions.0.proj_out": "middle_block.1.proj_out"}
    names |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "time_embedding.linear_1": "time_embed.0"}
    names |= {"down_blocks.0.resnets.0.conv2": "input_blocks.1.0.out_layers.3", "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1"}
    names |= {"down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op"}
    names |= {"up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv", "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2"}
    for i, (name, theirs) in enumerate(names.items()):
        file.add(name, "lora_unet_" + theirs.replace(".", "_"), 2 + i % 3, alpha=3)
    return file


def peft(model):
    """diffusers' names since PEFT, the scale in the metadata."""
    file, metadata = File(model, 300), {"unet.r": 4, "unet.lora_alpha": 3, "unet.target_modules": []}
    for name in [f"down_blocks.1.attentions.0.transformer_blocks.1.{x}" for x in INNER] + ["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]:
        file.add(name, f"unet.{name}", 4, (".lora_B.weight", ".lora_A.weight"))
        metadata["unet.target_modules"].append(name)
    return file, metadata


def processors(model):
    """diffusers' names before PEFT, without a scale."""
    file, t = File(model, 400), "mid_block.attentions.0.transformer_blocks.0"
    for x, key in PROCESSOR.items():
        file.add(f"{t}.{x}", f"unet.{t}.{key}", 3, (".up.weight", ".down.weight"))
    file.add(f"{t}.ff.net.2", f"unet.{t}.ff.net.2", 3, (".lora.up.weight", ".lora.down.weight"))
    return file


def tucker(model):
    """LyCORIS' LoCon with a core, which diffusers does not read; one plain module beside."""
    file = File(model, 500)
    for i, name in enumerate(["down_blocks.1.resnets.0.conv1", "up_blocks.0.resnets.2.conv2", "up_blocks.1.resnets.0.conv1"]):
        file.add(name, "lora_unet_" + name.replace(".", "_"), 3, alpha=2 + i, tucker=True)
    file.add("mid_block.resnets.0.time_emb_proj", "lora_unet_mid_block_resnets_0_time_emb_proj", 2, alpha=2)
    return file


def text(model, prefix, ends, dots, alpha):
    """A text encoder's modules."""
    file = File(model, 600)
    for i in range(2):
        for x in ["self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]:
            name = f"encoder.layers.{i}.{x}"
            ours = name if name in file.modules else "text_model." + name
            file.add(ours, prefix + (name if dots else name.replace(".", "_")), 3, ends, alpha)
    return file


def patch(model, tensors, adapter, mixin=SD, metadata=None):
    """Load by diffusers; every module of the file must have been taken."""
    state, alphas = mixin.lora_state_dict(dict(tensors), **({"unet_config": model.config} if mixin is XL else {}))
    if isinstance(model, UNet2DConditionModel):
        mixin.load_lora_into_unet(state, alphas, model, adapter_name=adapter, metadata=metadata)
    else:
        mixin.load_lora_into_text_encoder(state, alphas, model, prefix="text_encoder", adapter_name=adapter, metadata=metadata)
    taken = sum(isinstance(m, BaseTunerLayer) and adapter in m.scaling for m in model.modules())
    expected = sum(k.endswith(("up.weight", "lora_B.weight")) for k in tensors)
    assert taken == expected, (adapter, taken, expected)


def hook(model, tensors, strength):
    """The modules' own forward plus the file's three convolutions one after the other."""
    modules = {"lora_unet_" + n.replace(".", "_"): m for n, m in model.named_modules()}
    for key in {k.split(".")[0] for k in tensors}:
        part = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(key + ".")}
        up, down, mid = part["lora_up.weight"], part["lora_down.weight"], part.get("lora_mid.weight")
        scale = strength * float(part["alpha"]) / down.shape[0]

        def add(m, x, out, up=up, down=down, mid=mid, scale=scale):
            if mid is None:
                return out + scale * (x[0] @ down.T @ up.T)
            h = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x[0], down), mid, stride=m.stride, padding=m.padding)
            return out + scale * torch.nn.functional.conv2d(h, up)

        modules[key].register_forward_hook(add)


def ask(name):
    """What networks.py asks of that network."""
    kw, at = UNETS[name]
    return noise(1, at["batch"], 4, at["h"], at["w"]), torch.tensor(at["timesteps"]), noise(2, at["batch"], at["tokens"], kw["cross_attention_dim"])


def out(model, sample, timestep, context, **added):
    return model(sample, timestep, encoder_hidden_states=context, added_cond_kwargs=added or None).sample


def unet_goldens():
    model = unet("unet_conv")
    plain = out(model, *ask("unet_conv"))
    tensors = tucker(model).write("tucker", torch.float16)
    patch(model, kohya(model).write("kohya", torch.float16), "a")
    set_weights_and_activate_adapters(model, ["a"], [0.8])
    save("lora/kohya.safetensors", dict(out=out(model, *ask("unet_conv"))))
    model = unet("unet_conv")
    hook(model, tensors, -1.5)
    save("lora/tucker.safetensors", dict(out=out(model, *ask("unet_conv"))))
    for name in ["kohya", "tucker"]:
        print(name, "moves the output by", distance(load_file(FOLDER / f"{name}.safetensors")["out"], plain))

    model = unet("unet_linear")
    plain = out(model, *ask("unet_linear"))
    file, metadata = peft(model)
    tensors, old = file.write("peft", torch.float32, metadata), processors(model).write("processors", torch.bfloat16)
    patch(model, tensors, "a", metadata=metadata)
    patch(model, old, "b")
    for name, weights in {"peft": [1.0, 0.0], "processors": [0.0, 1.0], "two": [0.75, -1.25]}.items():
        set_weights_and_activate_adapters(model, ["a", "b"], weights)
        save(f"lora/{name}.safetensors", dict(out=out(model, *ask("unet_linear"))))
        print(name, "moves the output by", distance(load_file(FOLDER / f"{name}.safetensors")["out"], plain))


def xl_golden():
    model = unet("unet_xl")
    save_json("lora/unet_xl.shapes.json", dict(sorted((k, list(v.shape)) for k, v in model.state_dict().items())))
    config = {k: v for k, v in dict(model.config).items() if not k.startswith(("_name", "_use_default"))}
    (FOLDER / "unet_xl.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    asked = dict(sample=noise(1, 2, 4, 6, 5), timestep=torch.tensor([700.0]), encoder_hidden_states=noise(2, 2, 7, 40), text_embeds=noise(3, 2, 24),
                 time_ids=torch.tensor([[1024.0, 768, 0, 0, 1024, 768], [512, 512, 16, 32, 1024, 1024]]))
    run = lambda: out(model, asked["sample"], asked["timestep"], asked["encoder_hidden_states"], text_embeds=asked["text_embeds"], time_ids=asked["time_ids"])
    plain = run()
    patch(model, original(model).write("original", torch.float16), "a", XL)
    set_weights_and_activate_adapters(model, ["a"], [0.9])
    save("lora/original.safetensors", dict(asked, plain=plain, out=run()))
    print("original moves the output by", distance(run(), plain))


def text_goldens():
    ids = torch.randint(0, 98, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[0, 20:], ids[1, 76] = 98, 99, 99
    plain = clip()(ids).last_hidden_state
    kinds = {"text_kohya": ("lora_te_text_model_", (".lora_up.weight", ".lora_down.weight"), False, 2.0),
             "text_layers": ("text_encoder.text_model.", (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"), True, None)}
    for name, kind in kinds.items():
        model = clip()
        patch(model, text(model, *kind).write(name, torch.float16), "a")
        set_weights_and_activate_adapters(model, ["a"], [0.7])
        states = model(ids).last_hidden_state
        save(f"lora/{name}.safetensors", dict(ids=ids.float(), hidden_states=states))
        print(name, "moves the output by", distance(states, plain))


def distance(a, b):
    return f"{float((a - b).norm() / b.norm()):.3f}"


def main():
    unet_goldens()
    xl_golden()
    text_goldens()


if __name__ == "__main__":
    main()
