//! Prompt to token ids: CLIP's byte-pair tokenizer (Radford et al. 2021), by the Hugging Face crate, so that the ids are those of
//! transformers' CLIPTokenizer for any text.

use std::path::Path;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Result};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// CLIP's words: special tokens, contractions, runs of letters, single numerals, runs of anything else that is no space.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's byte-pair tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    length: usize,
    start: u32,
    end: u32,
    pad: u32,
}

/// A prompt as the text model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// [length], 77 for CLIP: start of text, the prompt, end of text, padding.
    pub ids: Vec<u32>,
    /// Tokens at the end of the prompt that did not fit.
    pub truncated: usize,
}

impl Tokenizer {
    /// From the texts of vocab.json and merges.txt; prompts get `length` ids, 2 or more, padded with the token `pad`:
    /// `<|endoftext|>` for Stable Diffusion 1, `!` for 2 and for SDXL's second encoder. `path` is for messages.
    ///
    /// # Errors
    /// [`Error::File`] if the texts are no vocabulary and merges, or lack a special token or `pad`.
    pub fn new(path: &Path, vocab_json: &str, merges: &str, length: usize, pad: &str) -> Result<Tokenizer> {
        assert!(length >= 2, "a prompt of {length} ids has no room for its start and end");
        let bad = |problem: String| Error::file(path, problem, "fetch the tokenizer's files again");
        let vocab: std::collections::HashMap<String, u32> =
            serde_json::from_str(vocab_json).map_err(|e| bad(format!("vocab.json: {e}")))?;
        let pair = |line: &str| line.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()));
        let lines = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
        let merges: Option<Vec<(String, String)>> = lines.map(pair).collect();
        let merges = merges.ok_or_else(|| bad("merges.txt: expected two words on every line".into()))?;
        let id = |token: &str| vocab.get(token).copied().ok_or_else(|| bad(format!("vocab.json has no token {token}")));
        let (start, end, pad_id) = (id(START)?, id(END)?, id(pad)?);
        let bpe = BPE::builder()
            .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
            .continuing_subword_prefix(String::new())
            .end_of_word_suffix("</w>".into())
            .unk_token(END.into())
            .build()
            .map_err(|e| bad(format!("vocabulary and merges do not belong together: {e}")))?;
        let inner = pipeline(bpe, pad).map_err(|e| bad(format!("the tokenizer cannot be built: {e}")))?;
        Ok(Tokenizer { inner, length, start, end, pad: pad_id })
    }

    /// The ids of a prompt: any text, of any length.
    pub fn encode(&self, prompt: &str) -> Tokens {
        let room = self.length - 2;
        // Bytes that the vocabulary lacks are END, so that every text has ids. Were one refused all the same, it would count as
        // cut off, which callers report: never an empty prompt in silence.
        let encoded = self.inner.encode_fast(prompt, false);
        let (text, truncated) = match &encoded {
            Ok(encoding) => (encoding.get_ids(), encoding.len().saturating_sub(room)),
            Err(_) => (&[][..], prompt.chars().count()),
        };
        let mut ids = vec![self.start];
        ids.extend(text.iter().take(room));
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        Tokens { ids, truncated }
    }
}

/// What transformers builds for CLIP around the byte-pair model, whatever tokenizer_config.json says.
fn pipeline(bpe: BPE, pad: &str) -> tokenizers::Result<tokenizers::Tokenizer> {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    inner.with_normalizer(Some(Sequence::new(vec![
        NormalizerWrapper::NFC(NFC),
        NormalizerWrapper::Replace(spaces),
        NormalizerWrapper::Lowercase(Lowercase),
    ])))?;
    inner.with_pre_tokenizer(Some(PreSequence::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ])));
    // As transformers registers them: start and end are looked for in the normalised text, but the padding in the raw one, and
    // before CLIP's words are: where `!` is the padding, a prompt's `!` is that token and not the word `!</w>`.
    let special = |token: &str| AddedToken::from(token, true).normalized(token != pad);
    let mut tokens = vec![special(START), special(END)];
    if pad != END {
        tokens.push(special(pad));
    }
    inner.add_special_tokens(tokens)?;
    Ok(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The embedded model's tokenizer, of 2048 tokens, with a padding.
    fn tokenizer(pad: &str) -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tokenizer");
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect(name);
        Tokenizer::new(&folder, &read("vocab.json"), &read("merges.txt"), 77, pad).expect("the embedded tokenizer")
    }

    /// What stands between start and the first end.
    fn text(pad: &str, prompt: &str) -> Vec<u32> {
        let ids = tokenizer(pad).encode(prompt).ids;
        ids[1..].iter().copied().take_while(|&id| id != 2047).collect()
    }

    #[test]
    fn ids_equal_hugging_faces() {
        #[derive(serde::Deserialize)]
        struct Case {
            prompt: String,
            ids: Vec<u32>,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokens.json");
        let cases = std::fs::read_to_string(path).expect(path);
        let cases: Vec<Case> = serde_json::from_str(&cases).expect("tokens.json");
        assert!(cases.len() > 40);
        let tokenizer = tokenizer(END);
        for case in cases {
            assert_eq!(tokenizer.encode(&case.prompt).ids, case.ids, "{:?}", case.prompt);
        }
    }

    /// transformers 5.23: `CLIPTokenizer.from_pretrained(folder)("a fox!  wow!!")` with either padding in the folder.
    #[test]
    fn an_exclamation_mark_is_the_padding_where_that_is_it() {
        assert_eq!(text(END, "a fox!  wow!!"), [320, 1294, 256, 604, 342, 0, 256]);
        assert_eq!(text("!", "a fox!  wow!!"), [320, 1294, 0, 604, 342, 0, 0]);
        let ids = tokenizer("!").encode("a fox").ids;
        assert_eq!(ids[..4], [2046, 320, 1294, 2047]);
        assert_eq!(ids[4..], [0; 73]);
    }

    #[test]
    fn an_empty_prompt_is_start_and_end() {
        for prompt in ["", "   ", "\n\t\u{3000}"] {
            let tokens = tokenizer(END).encode(prompt);
            assert_eq!((tokens.ids.len(), tokens.truncated), (77, 0), "{prompt:?}");
            assert_eq!(tokens.ids[..3], [2046, 2047, 2047], "{prompt:?}");
        }
    }

    #[test]
    fn a_long_prompt_is_cut_and_counted() {
        let tokens = tokenizer(END).encode(&"fox ".repeat(10_000));
        assert_eq!((tokens.ids.len(), tokens.truncated), (77, 10_000 - 75));
        assert_eq!(tokens.ids[76], 2047);
        assert_eq!(tokenizer(END).encode(&"fox ".repeat(75)).truncated, 0);
    }

    /// A megabyte without a space is one word; each kind of it goes another way through the patterns.
    #[test]
    fn no_text_is_refused() {
        let tokenizer = tokenizer(END);
        for unit in
            ["x", "!", "1", "\u{0}", "\u{301}", "狐", "👩‍👩‍👧", "'s", "<|endoftext|>", "<|", "\u{10ffff}", "\u{feff}"]
        {
            let tokens = tokenizer.encode(&unit.repeat(1_000_000 / unit.len()));
            assert_eq!(tokens.ids.len(), 77, "{unit:?}");
            assert!(tokens.truncated > 1000, "{unit:?}: {}", tokens.truncated);
        }
    }

    #[test]
    fn damaged_files_are_named() {
        let new = |vocab: &str, merges: &str| match Tokenizer::new(Path::new("tokenizer"), vocab, merges, 77, END) {
            Ok(_) => "no error".to_owned(),
            Err(error) => error.to_string(),
        };
        let vocab = r#"{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2}"#;
        assert_eq!(new(vocab, "#version: 0.2\n\n"), "no error");
        for (vocab, merges, expected) in [
            ("{", "", "vocab.json: EOF"),
            (r#"{"a": -1}"#, "", "vocab.json: invalid value"),
            (r#"{"a": 1}"#, "", "vocab.json has no token <|startoftext|>"),
            (vocab, "ab", "merges.txt: expected two words"),
            (vocab, "a b", "vocabulary and merges do not belong together"),
        ] {
            let error = new(vocab, merges);
            assert!(error.contains(expected) && error.starts_with("tokenizer: "), "{error}");
        }
    }
}
