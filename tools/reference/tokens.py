"""Goldens of the tokenizers: prompts of every awkward kind and of daily life, and Hugging Face's ids of the embedded vocabulary and OpenAI's."""
from transformers import AddedToken, CLIPTokenizer

from common import ASSETS, PROMPT, ROOT, save_json

PROMPTS = [
    "", " ", "   ", "\n", "\t", PROMPT, PROMPT.upper(), "A Fox", "fox fox fox", " fox", "fox ", "  fox   in \t a\nforest ", "fox,bear;wolf",
    "a fox, (masterpiece:1.2), [blurry]", "don't", "it's we've I'm they'll you'd can't DON'T", "o'clock rock'n'roll ’s don’t", "3.14159", "1 22 333",
    "a1b2c3", "2026-11-23", "well-kept", "snake_case __init__", "!!!", "!?.,;:", "...", "a...b", "#@$%^&*", "\"quoted\" 'single'", "C:\\path\\file",
    "https://example.com/a?b=c&d=e", "caf\u00e9", "cafe\u0301", "na\u00efve r\u00e9sum\u00e9 \u00fcber stra\u00dfe", "\u0130stanbul", "\u0398\u03ac\u03bb\u03b1\u03c3\u03c3\u03b1", "\u0416\u0438\u0432\u043e\u043f\u0438\u0441\u044c",
    "\u72d0\u72f8 \u6797", "\u30ad\u30c4\u30cd", "\uc5ec\uc6b0", "\u0627\u0644\u062b\u0639\u0644\u0628", "\U0001f98a", "a \U0001f98a in \U0001f332", "\u2764\ufe0f", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "a\u00a0b", "a\u3000b", "a\u200bb", "\ufeffa",
    "&amp; &lt;b&gt;", "<b>bold</b>", "<|endoftext|>", "a<|endoftext|>b", "<|startoftext|> fox", "<|STARTOFTEXT|>", "<|endoftext", "\u00bd \u2163 \u0661\u0662", "e=mc\u00b2", "\u2014 dash \u2013 and \u2026",
    "x" * 300, "fox " * 200, "a red car on a road at sunset, on the left, " * 12, "word" + "!" * 100, "\x00", "a\x07b", "\u0301", "\ud7a3\u1100\u1161",
]


# As people write them; the syntax of weights is text to the tokenizer.
LIFE = [
    "a photo of a cat", "a photograph of an astronaut riding a horse", "portrait of an old fisherman, 85mm, f/1.8, golden hour, film grain",
    "masterpiece, best quality, 1girl, solo, long hair, looking at viewer, smile, blue eyes, school uniform, cherry blossoms",
    "(masterpiece:1.2), (best quality), ultra-detailed, 8k uhd, dslr, soft lighting, high quality, Fujifilm XT3",
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, jpeg artifacts, signature, watermark, username, blurry",
    "deformed, disfigured, poorly drawn face, mutation, mutated, extra limb, ugly, disgusting, floating limbs, disconnected limbs, out of focus, long neck",
    "A highly detailed matte painting of a castle on a cliff, by greg rutkowski and thomas kinkade, trending on artstation", "isometric low-poly render of a tiny kitchen, blender 3d, pastel colors",
    "cyberpunk city street at night, neon signs, rain, reflections, octane render, unreal engine 5, ray tracing, volumetric fog", "steampunk owl made of brass gears :: intricate :: macro photo --ar 16:9 --v 5",
    "oil painting of a sailboat in a storm in the style of J.M.W. Turner", "Ukiyo-e woodblock print of Mt. Fuji & the great wave, Hokusai (1831)", "studio ghibli style meadow w/ fluffy clouds, hand-painted background",
    "watercolor sketch of Z\u00fcrich's Altstadt, caf\u00e9 umbrellas, cr\u00e8me br\u00fbl\u00e9e", "un renard roux dans une for\u00eat de pins enneig\u00e9e, au cr\u00e9puscule", "ein F\u00fcchslein im M\u00e4rchenwald, \u00d6lgem\u00e4lde, 19. Jahrhundert",
    "una fotograf\u00eda de un ni\u00f1o so\u00f1ando \u00bfpor qu\u00e9? \u00a1ol\u00e9!", "\u043f\u043e\u0440\u0442\u0440\u0435\u0442 \u043a\u043e\u0441\u043c\u043e\u043d\u0430\u0432\u0442\u0430, \u043c\u0430\u0441\u043b\u043e, \u0445\u043e\u043b\u0441\u0442", "\u685c\u306e\u6728\u306e\u4e0b\u306e\u72d0\u3001\u6c34\u5f69\u753b", "\u4e00\u53ea\u5728\u96ea\u5730\u91cc\u7684\u7ea2\u72d0\u72f8\uff0c\u6c34\u58a8\u753b\uff0c\u9ad8\u6e05", "\ub208 \ub0b4\ub9ac\ub294 \uc232\uc18d\uc758 \uc5ec\uc6b0",
    "\U0001f98a in a \U0001f332\U0001f332 forest \u2744\ufe0f\u2728", "\U0001f1e9\U0001f1ea flag, \U0001f44d\U0001f3fd, \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "text that says \"HELLO WORLD!\" on a t-shirt", "a sign saying 'Joe's Diner -- open 24/7!!!'",
    "photo of the number 1234567890, 3.5mm, 50% off, $9.99, #1, \u20ac5, \u00a31m", "score_9, score_8_up, score_7_up, source_anime, rating_safe, 1boy, armor", "<lora:detail_tweaker:0.8>, close-up, sharp focus", "{a|b|c} style, __artist__, [from:to:0.5], a AND b",
    "woman's face, she's smiling, they're friends, we'll see, I'd go, can't've", "hyperrealistic   double  spaces,,, and,commas,without,spaces", "newline\nseparated\r\nlines\twith tabs", "a cat BREAK a dog", "C:\\Users\\fox\\picture.png ~/pictures/*.jpg",
    "H\u2082O molecules, x\u00b2 + y\u00b2 = r\u00b2, \u03c0 \u2248 3.14159, \u221e, \u2192, \u2122 \u00ae \u00a9", "sci-fi book cover, retro-futurism, 1970s, 4:3, kodachrome 64", "anthropomorphic red panda barista, latte-art, bokeh", "mid-century-modern living room, architectural digest, natural light",
    "emoji! :) ;-) <3 ^_^ \\o/", "dragon, (red:1.3) and [blue], \\(literal\\)", "a fox! wow!! no way!!!",
]

# Longer than one run of the text encoder, and than two.
LONG = [
    "a red car on a road at sunset, on the left a very old gas station with rusted pumps, " * 12, ", ".join(LIFE[:12]), "fox " * 225, "1234567890 " * 20 + "\U0001f98a" * 40,
]


def openai():
    """The tokenizer of OpenAI's CLIP from its merges, which imply the vocabulary."""
    lines = (ROOT / "src" / "text" / "clip_merges.txt").read_text(encoding="utf-8").split("\n")[:-1]
    merges = [tuple(line.split(" ")) for line in lines]
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    units = [chr(b) for b in printing] + [chr(256 + i) for i in range(256 - len(printing))]
    tokens = units + [u + "</w>" for u in units] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(merges) == 48894 and len(set(tokens)) == 49408
    # As the tokenizer_config.json of openai/clip-vit-large-patch14 and of Stable Diffusion 1 says.
    special = {key: AddedToken(token, normalized=True, special=True) for key, token in (("bos_token", tokens[-2]), ("eos_token", tokens[-1]))}
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, pad_token=tokens[-1], **special)


def main():
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tokenizer")
    encode = lambda p: tokenizer(p, padding="max_length", truncation=True, max_length=77).input_ids
    save_json("tokens.json", [dict(prompt=p, ids=encode(p)) for p in PROMPTS])
    # Of these the words alone, all of them: chunks are cut from them.
    clip = openai()
    assert clip("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    words = lambda p: clip(p, add_special_tokens=False).input_ids
    save_json("tokens_clip.json", [dict(prompt=p, ids=words(p)) for p in PROMPTS + LIFE + LONG])


if __name__ == "__main__":
    main()
