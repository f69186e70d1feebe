"""Goldens of the tokenizer: prompts of every awkward kind, and Hugging Face's ids of the embedded vocabulary."""
from transformers import CLIPTokenizer

from common import ASSETS, PROMPT, save_json

PROMPTS = [
    "", " ", "   ", "\n", "\t", PROMPT, PROMPT.upper(), "A Fox", "fox fox fox", " fox", "fox ", "  fox   in \t a\nforest ", "fox,bear;wolf",
    "a fox, (masterpiece:1.2), [blurry]", "don't", "it's we've I'm they'll you'd can't DON'T", "o'clock rock'n'roll ’s don’t", "3.14159", "1 22 333",
    "a1b2c3", "2026-11-23", "well-kept", "snake_case __init__", "!!!", "!?.,;:", "...", "a...b", "#@$%^&*", "\"quoted\" 'single'", "C:\\path\\file",
    "https://example.com/a?b=c&d=e", "caf\u00e9", "cafe\u0301", "na\u00efve r\u00e9sum\u00e9 \u00fcber stra\u00dfe", "\u0130stanbul", "\u0398\u03ac\u03bb\u03b1\u03c3\u03c3\u03b1", "\u0416\u0438\u0432\u043e\u043f\u0438\u0441\u044c",
    "\u72d0\u72f8 \u6797", "\u30ad\u30c4\u30cd", "\uc5ec\uc6b0", "\u0627\u0644\u062b\u0639\u0644\u0628", "\U0001f98a", "a \U0001f98a in \U0001f332", "\u2764\ufe0f", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "a\u00a0b", "a\u3000b", "a\u200bb", "\ufeffa",
    "&amp; &lt;b&gt;", "<b>bold</b>", "<|endoftext|>", "a<|endoftext|>b", "<|startoftext|> fox", "<|STARTOFTEXT|>", "<|endoftext", "\u00bd \u2163 \u0661\u0662", "e=mc\u00b2", "\u2014 dash \u2013 and \u2026",
    "x" * 300, "fox " * 200, "a red car on a road at sunset, on the left, " * 12, "word" + "!" * 100, "\x00", "a\x07b", "\u0301", "\ud7a3\u1100\u1161",
]


def main():
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tokenizer")
    encode = lambda p: tokenizer(p, padding="max_length", truncation=True, max_length=77).input_ids
    save_json("tokens.json", [dict(prompt=p, ids=encode(p)) for p in PROMPTS])


if __name__ == "__main__":
    main()
