#!/usr/bin/env python3
"""The first inputs of the fuzzers (see README.md): tiny models in every family's key layout, LoRAs, embeddings, hostile headers, prompts.

Writes models/, the dictionaries, and the seeds into the folder that is named (python3 seeds.py FOLDER).
"""
import json
import pathlib
import struct
import sys

HERE = pathlib.Path(__file__).parent
P = "model.diffusion_model."


def dims(*shape):
    return "x".join(map(str, shape)) or "-"


def line(name, *shape, dtype="F16", fill=None):
    return f"{name} {dtype} {dims(*shape)}" + (f" {fill}" if fill else "")


def transformer(at, c, cross, depth=1, linear=False, all_of_it=False):
    out = [line(f"{at}.proj_in.weight", 4, 4, *([] if linear else [1, 1]))]
    for k in range(depth):
        b = f"{at}.transformer_blocks.{k}"
        out += [line(f"{b}.norm1.weight", c), line(f"{b}.attn2.to_k.weight", 4 if cross > 512 else c, cross)]
        if all_of_it:
            out += [line(f"{b}.attn1.to_q.weight", c, c), line(f"{b}.attn1.to_out.0.weight", c, c), line(f"{b}.ff.net.0.proj.weight", 2, c)]
    return out


def resnet(at, c):
    return [line(f"{at}.out_layers.3.weight", c, 4, 3, 3)]


def unet(channels, depths, cross, layers=1, linear=False, inputs=4, added=None, prefix=P, bias=None):
    """depths: by level, transformer blocks (0: none)."""
    out, block = [line("input_blocks.0.0.weight", channels[0], inputs, 3, 3)], 1
    for i, c in enumerate(channels):
        for _ in range(layers):
            out += resnet(f"input_blocks.{block}.0", c)
            if depths[i]:
                out += transformer(f"input_blocks.{block}.1", c, cross, depths[i], linear, block == 1)
            block += 1
        if i < len(channels) - 1:
            out += [line(f"input_blocks.{block}.0.op.weight", c, 4, 3, 3)]
            block += 1
    out += transformer("middle_block.1", channels[-1], cross, max(depths[-1], 1), linear, True)
    block = 0
    for i in reversed(range(len(channels))):
        for _ in range(layers + 1):
            if depths[i]:
                out += [line(f"output_blocks.{block}.1.transformer_blocks.{k}.norm1.weight", channels[i]) for k in range(depths[i])]
            block += 1
    if bias:
        out += [line(f"output_blocks.{block - 1}.1.transformer_blocks.0.norm1.bias", channels[0], fill=bias)]
    if added:
        out += [line("label_emb.0.0.weight", 4, added)]
    out += [line("out.2.weight", 4, channels[0], 3, 3), line("time_embed.0.weight", 8, channels[0])]
    return [prefix + text for text in out]


def clip(at, width, layers=1, projection=None):
    out = [line(f"{at}embeddings.token_embedding.weight", 2, width), line(f"{at}embeddings.position_embedding.weight", 77, 1)]
    for i in range(layers):
        out += [line(f"{at}encoder.layers.{i}.mlp.fc1.weight", 64, 1), line(f"{at}encoder.layers.{i}.self_attn.q_proj.weight", 4, width)]
    return out + ([line(f"{at}text_projection.weight", projection, 1)] if projection else [])


def open_clip(at, width, layers=1, projection=None):
    out = [line(f"{at}token_embedding.weight", 2, width), line(f"{at}positional_embedding", 77, 1), line(f"{at}ln_final.weight", width)]
    for i in range(layers):
        b = f"{at}transformer.resblocks.{i}"
        out += [line(f"{b}.mlp.c_fc.weight", 64, 1), line(f"{b}.attn.in_proj_weight", 6, 4), line(f"{b}.attn.in_proj_bias", 6), line(f"{b}.ln_1.bias", 4)]
    return out + ([line(f"{at}text_projection", 2, projection)] if projection else [])


def vae(at="first_stage_model.", levels=4, names="original"):
    out = [line(f"{at}decoder.conv_in.weight", 32, 4, 3, 3), line(f"{at}quant_conv.weight", 8, 8, 1, 1), line(f"{at}post_quant_conv.weight", 4, 4, 1, 1)]
    for i in range(levels):
        for j in range(2):
            block = f"up.{i}.block.{j}" if names == "original" else f"up_blocks.{i}.resnets.{j}"
            out += [line(f"{at}decoder.{block}.conv1.weight", 32, 1, 3, 3)]
    return out + [line(f"{at}encoder.down.0.downsample.conv.weight", 4, 1), line(f"{at}decoder.mid.attn_1.q.weight", 4, 4, 1, 1)]


SD1 = unet((32, 32), (1, 0), 32) + clip("cond_stage_model.transformer.text_model.", 32) + vae()
XL = (unet((64, 64, 64), (0, 1, 2), 96, linear=True, added=256) + clip("conditioner.embedders.0.transformer.text_model.", 32)
      + open_clip("conditioner.embedders.1.model.", 64, projection=64) + vae())
SD2 = unet((64, 64, 64, 64), (1, 1, 1, 0), 1024, layers=2, linear=True, bias="003c00bc") + open_clip("cond_stage_model.model.", 1024, 2, 1024) + vae()


def table(lines):
    return "#\n" + "\n".join(lines) + "\n"


def lora(module, n, k, ends=("lora_up.weight", "lora_down.weight"), rank=2, alpha=True, taps=(), mid=()):
    out = [line(f"{module}.{ends[0]}", n, rank, *[1] * len(taps), fill="003c"), line(f"{module}.{ends[1]}", rank, k, *taps, fill="0038")]
    out += [line(f"{module}.lora_mid.weight", rank, rank, *mid)] if mid else []
    return out + ([line(f"{module}.alpha", dtype="F32", fill="0000803f")] if alpha else [])


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
KOHYA = lora("lora_unet_" + (ATTENTION + "to_q").replace(".", "_"), 32, 32) + lora("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 4, 32)
OTHERS = ["double_blocks.0.x", "joint_blocks.0.x", "down_blocks.0.0.0.x", "control_model.x", "input_hint_block.0.weight", "down_blocks.0.resnets.0.norm1.weight",
          "model_ema.x", "token_embedding.weight", "decoder.conv_in.weight"]
REFUSED = ["dora_scale", "lora_magnitude_vector", "a1.weight", "diff", "on_input", "hada_w1_a", "lokr_w1", "oft_blocks", "ia3_l.weight", "lora_B.bias"]


def header(**tensors):
    return json.dumps(tensors, separators=(",", ":"))


def tensor(shape, *offsets, dtype="F32"):
    return dict(dtype=dtype, shape=shape, data_offsets=offsets)


MAX = 2 ** 64 - 1
CHECKPOINT = {
    "sd1": table(SD1),
    "sd1-diffusers-vae": table(unet((32, 32), (1, 0), 32) + clip("cond_stage_model.transformer.text_model.", 32) + vae(names="diffusers")),
    "sd1-inpaint": table(unet((32, 32), (1, 0), 768, inputs=9) + clip("cond_stage_model.transformer.", 768)),
    "sd1-unet": table(unet((32,), (1,), 768, prefix="")),
    "sd2": table(SD2),
    "sdxl": table(XL),
    "sdxl-v": table(XL + [line("v_pred"), line("ztsnr")]),
    "refiner": table(unet((384, 384), (0, 1), 1280, linear=True, added=2560)[:2]),
    "no-text": table(unet((32, 32), (1, 0), 32)[:6] + [line(P + "middle_block.1.qkv.weight", 4, 4)]),
    "vae": table(vae("")),
    "clip": table(clip("text_model.", 32)),
    "open-clip": table(open_clip("", 64, projection=64)),
    "others": table(line(name, 4) for name in OTHERS),
    "lora-kohya": table(KOHYA),
    "lora-model": table(SD1) + "--\n" + table(KOHYA),
    "lora-xl": table(XL) + "--\n" + table(lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", 64, 1) + lora("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 64, 64)),
    "lora-mid": table(lora("lora_unet_input_blocks_1_0_out_layers_3", 32, 4, taps=(1, 1), mid=(3, 3))),
    "lora-peft": '#lora_adapter_metadata {"unet.lora_alpha":8,"unet.use_rslora":true,"unet.alpha_pattern":{"^mid.to_q":2}}\n'
    + "\n".join(lora("base_model.model.unet." + ATTENTION + "to_q", 32, 32, ("lora_B.weight", "lora_A.default.weight"), alpha=False)) + "\n",
    "lora-diffusers": table([line("unet." + ATTENTION + "processor.to_out_lora.up.weight", 32, 2), line("unet." + ATTENTION + "processor.to_out_lora.down.weight", 2, 32),
                             line("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight", 4, 2, dtype="F32"),
                             line("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight", 2, 32)]),
    "lora-refused": table(line(f"lora_unet_x.{end}", 4) for end in REFUSED),
    "lora-bad-alpha": table(lora("lora_unet_" + (ATTENTION + "to_q").replace(".", "_"), 32, 32, alpha=False) + [line("lora_unet_x.alpha", 2, 2)]),
    "embedding": table([line("emb_params", 2, 8, dtype="F32", fill="0000803f")]),
    "embedding-xl": table([line("clip_l", 2, 8), line("clip_g", 2, 16, dtype="BF16")]),
    "embedding-named": table([line("<fox>", 8, dtype="F64", fill="000000000000f07f")]),
    "types": table(line(t, 2, 4, dtype=t) for t in "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64 C64 F4 F6_E2M3 F6_E3M2".split()),
    "header": header(__metadata__={"format": "pt"}, a=tensor([2], 0, 8), b=tensor([], 8, 12)),
    "twice": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "overlap": header(a=tensor([2], 0, 8), b=tensor([2], 4, 12)),
    "hole": header(a=tensor([2], 0, 8), b=tensor([2], 12, 20)),
    "backwards": header(a=tensor([2], 8, 0)),
    "huge": header(a=tensor([MAX, MAX], 0, 8)),
    "negative": header(a=tensor([-1], 0, 8), b=tensor([1e30], 8, 8)),
    "no-rows": header(a=tensor([0, MAX, MAX], 0, 0), b=tensor([MAX, 0], 0, 0)),
    "far": header(**{f"a{i}": tensor([2 ** 61 - 1], i * (2 ** 61 - 1), (i + 1) * (2 ** 61 - 1), dtype="U8") for i in range(7)}),
    "nothing": table([line("emb_params", 0, MAX), line("a", MAX, 0), line(P + "input_blocks.0.0.weight", 0, 0, MAX)]),
    "metadata": header(__metadata__={"format": 1}, a=tensor([1], 0, 4)),
    "nested": '{"a":' + "[" * 200 + "]" * 200 + "}",
    "empty": "{}",
    "raw": struct.pack("<Q", 2) + b"{}",
    "raw-swapped": struct.pack(">Q", 64) + b"{}",
    "raw-short": struct.pack("<Q", 9) + b"{}",
    "raw-pickle": b"PK\x03\x04archive/data.pkl",
}
PROMPT = {
    "plain": "a fox in a pine forest at night, masterpiece!",
    "round": "a (fox) ((in)) (the: 1.25 ) (sno:w:-.5) (:1.2) ((a:1.5) b) (unclosed",
    "square": "[a] [[b]] (a [b) c] ] ) [a:1.2]",
    "escapes": r"\(a\) \[b\] \\ c (a \(b\):1.3) C:\fox" + "\\",
    "break": "a BREAK b,BREAK,c BREAK BREAK (d BREAK e:1.2) OUTBREAK BREAKS BREAK",
    "embeddings": "embedding:a, (embedding:b fox:1.5) embedding:b.safetensors re:embedding:a embedding: embedding:c",
    "long": "fox " * 74 + "(a b c d e f g:1.2) " + "(a b c d e f g h i:0.9)",
    "numbers": "(a:1e2)(b:1e-3)(c:+1.)(d:nan)(e:inf)(f:1.2.3)(g:100)(h:-100)(i:0x1)(j:1 2)",
    "absurd": "(a:1e40)",
    "deep": "(" * 40 + "a" + ")" * 40 + "[" * 40 + "b" + "]" * 40,
    "words": "it's we'll I'd <|startoftext|> <|endoftext|> 2024 ½ ٣ !!?? x_y ÀÉ ſ İ ŉ",
    "unicode": "e\u0301\u0323 \u1112\u1161\u11ab 狐\u3000狐 🦊\u200d🔥 \ufeff\u202e\u0000\u2028 ﬃ Ω",
    "bytes": b"\xff\xfe\xc3(\xe2\x82 \xf0\x9f\xa6",
}
WORDS = [P, "input_blocks.", "output_blocks.", "middle_block.1.", "transformer_blocks.0.", "attn1.to_q.weight", "attn2.to_k.weight", "norm1.weight", "norm1.bias",
         "proj_in.weight", "out_layers.3.weight", "0.op.weight", "label_emb.0.0.weight", "out.2.weight", "input_blocks.0.0.weight", "qkv.weight", "cond_stage_model.",
         "transformer.text_model.", "conditioner.embedders.0.", "embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.0.",
         "mlp.fc1.weight", "text_projection", "text_projection.weight", "token_embedding.weight", "positional_embedding", "transformer.resblocks.0.", "attn.in_proj_weight",
         "mlp.c_fc.weight", "ln_final.weight", "first_stage_model.", "decoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight",
         "quant_conv.weight", "post_quant_conv.weight", "v_pred", "ztsnr", "emb_params", "clip_l", "clip_g", "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_",
         ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".alpha", ".lora_A.weight", ".lora_B.weight", ".default", "_lora.up.weight", "_lora.down.weight",
         ".processor.", "base_model.model.", "text_encoder_2.", "lora_adapter_metadata", "lora_alpha", "alpha_pattern", "use_rslora", *OTHERS, *REFUSED]
TYPES = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64 C64 F4 F6_E2M3".split()
TOKENS = ['"__metadata__":{', '"dtype":"', '"shape":[', '"data_offsets":[', '"},"', "},", "]}", "[]", "null", "\n--\n", "\n", " F16 ", " F32 - ", "x0", "x1", "x4", "x32x",
          "768", "1024", "1280", "320", "77", "384", str(MAX), str(2 ** 63), str(2 ** 61), str(2 ** 32), "0"]
PROMPTS = ["(", ")", "[", "]", ":1.1)", ":0)", ":-1)", ":1e2)", ":100)", "\\", "\\(", "\\\\", " BREAK ", "BREAK", "embedding:a", " embedding:b ", "embedding:", ".safetensors",
           "<|startoftext|>", "<|endoftext|>", "'s", "'ll", "!", "\u3000", "\u0301", "\u200d", "\u0130", "\U0001f98a", "\u2028", "fox fox fox fox fox fox fox fox "]


def dictionary(words):
    quoted = lambda word: "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\' else f"\\x{b:02X}" for b in word.encode())
    return "".join(f'"{quoted(word)}"\n' for word in dict.fromkeys(words))


if __name__ == "__main__":
    (HERE / "models").mkdir(exist_ok=True)
    for name, lines in (("sd1", SD1), ("sdxl", XL)):
        (HERE / f"models/{name}.table").write_text(table(lines))
    (HERE / "checkpoint.dict").write_text(dictionary(WORDS + TYPES + TOKENS))
    (HERE / "prompt.dict").write_text(dictionary(PROMPTS))
    for target, seeds in (("checkpoint", CHECKPOINT), ("prompt", PROMPT)):
        folder = pathlib.Path(sys.argv[1]) / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, seed in seeds.items():
            (folder / name).write_bytes(seed if isinstance(seed, bytes) else seed.encode())
