//! Prompt to token ids: CLIP's tokenizer, by the Hugging Face crate, held against its Python twin in the tests.

use std::path::Path;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Result};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// CLIP's words: special tokens, contractions, runs of letters, single digits, runs of anything else.
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
    /// Start of text, the prompt, end of text, padding: always the same number.
    pub ids: Vec<u32>,
    /// Tokens at the end of the prompt that did not fit.
    pub truncated: usize,
}

impl Tokenizer {
    /// From the texts of vocab.json and merges.txt; prompts get `length` ids, padded with `pad`. `path` is for messages.
    ///
    /// # Errors
    /// [`Error::File`] if the texts are no vocabulary and merges, or lack the special tokens.
    pub fn new(path: &Path, vocab_json: &str, merges: &str, length: usize, pad: &str) -> Result<Tokenizer> {
        let bad = |problem: String| Error::file(path, problem, "fetch the tokenizer's files again");
        let vocab: std::collections::HashMap<String, u32> =
            serde_json::from_str(vocab_json).map_err(|e| bad(format!("vocab.json: {e}")))?;
        let pair = |line: &str| line.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()));
        let lines = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
        let merges: Option<Vec<(String, String)>> = lines.map(pair).collect();
        let merges = merges.ok_or_else(|| bad("merges.txt: expected two words on every line".into()))?;
        let id = |token: &str| vocab.get(token).copied().ok_or_else(|| bad(format!("vocab.json has no token {token}")));
        let (start, end, pad) = (id(START)?, id(END)?, id(pad)?);
        let bpe = BPE::builder()
            .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
            .continuing_subword_prefix(String::new())
            .end_of_word_suffix("</w>".into())
            .unk_token(END.into())
            .build()
            .map_err(|e| bad(format!("vocabulary and merges do not belong together: {e}")))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        let spaces = Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ");
        let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true);
        let (spaces, words) = match (spaces, words) {
            (Ok(spaces), Ok(words)) => (spaces, words),
            (Err(e), _) | (_, Err(e)) => unreachable!("our own patterns: {e}"),
        };
        inner.with_normalizer(Some(Sequence::new(vec![
            NormalizerWrapper::NFC(NFC),
            NormalizerWrapper::Replace(spaces),
            NormalizerWrapper::Lowercase(Lowercase),
        ])));
        inner.with_pre_tokenizer(Some(PreSequence::new(vec![
            PreTokenizerWrapper::Split(words),
            PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
        ])));
        // As transformers registers them: the start is looked for in the normalised text, the end in the raw one.
        inner.add_special_tokens(&[AddedToken::from(START, true).normalized(true), AddedToken::from(END, true).normalized(false)]);
        Ok(Tokenizer { inner, length, start, end, pad })
    }

    /// The ids of a prompt.
    pub fn encode(&self, prompt: &str) -> Tokens {
        // The byte-level model has a token for every byte, so that no prompt is unreadable.
        let mut text = self.inner.encode_fast(prompt, false).map(|e| e.get_ids().to_vec()).unwrap_or_default();
        let room = self.length - 2;
        let truncated = text.len().saturating_sub(room);
        text.truncate(room);
        let mut ids = vec![self.start];
        ids.append(&mut text);
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        Tokens { ids, truncated }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tokenizer");
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect(name);
        Tokenizer::new(&folder, &read("vocab.json"), &read("merges.txt"), 77, END).expect("the embedded tokenizer")
    }

    #[test]
    fn ids_equal_hugging_faces() {
        #[derive(serde::Deserialize)]
        struct Case {
            prompt: String,
            ids: Vec<u32>,
        }
        let cases = include_str!("../tests/data/tokens.json");
        let cases: Vec<Case> = serde_json::from_str(cases).expect("tokens.json");
        assert!(cases.len() > 40);
        let tokenizer = tokenizer();
        for case in cases {
            assert_eq!(tokenizer.encode(&case.prompt).ids, case.ids, "{:?}", case.prompt);
        }
    }

    #[test]
    fn an_empty_prompt_is_start_and_end() {
        let tokens = tokenizer().encode("");
        assert_eq!((tokens.ids.len(), tokens.truncated), (77, 0));
        assert_eq!(tokens.ids[..3], [2046, 2047, 2047]);
    }

    #[test]
    fn a_long_prompt_is_cut_and_counted() {
        let tokens = tokenizer().encode(&"fox ".repeat(10_000));
        assert_eq!((tokens.ids.len(), tokens.truncated), (77, 10_000 - 75));
        assert_eq!(tokens.ids[76], 2047);
    }
}
