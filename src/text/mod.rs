//! Text as users write it, to what CLIP reads: weights, chunks and embeddings ([`prompt`], [`embeddings`]) over CLIP's byte-pair
//! tokenizer (Radford et al. 2021), by the Hugging Face crate, so that the ids are those of transformers' CLIPTokenizer.

pub mod embedding;
pub mod embeddings;
mod emphasis;
pub mod prompt;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Result};

pub use embedding::Embedding;
pub use embeddings::Embeddings;
pub use prompt::{Chunk, MAX_CHUNKS, Style, Token, chunks};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// CLIP's words: special tokens, contractions, runs of letters, single numerals, runs of anything else that is no space.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// OpenAI's merges, in the order of their ids; the licence is beside them.
const CLIP_MERGES: &str = include_str!("clip_merges.txt");

/// CLIP's byte-pair tokenizer.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    length: usize,
    start: u32,
    end: u32,
    pad: u32,
}

impl Tokenizer {
    /// OpenAI's vocabulary of 49408 tokens, which Stable Diffusion 1, 2 and XL share; prompts get 77 ids, padded with the id
    /// `pad`: 49407 (`<|endoftext|>`) for 1 and SDXL's first encoder, 0 for 2 and SDXL's second. A prompt's `!` is the word
    /// `!</w>` whatever the padding is, as for open_clip, with which those that are padded with `!` were trained.
    ///
    /// The first call of a program builds the vocabulary; others share it.
    pub fn clip(pad: u32) -> Tokenizer {
        static SHARED: OnceLock<Arc<tokenizers::Tokenizer>> = OnceLock::new();
        let inner = SHARED.get_or_init(|| {
            let (vocab, merges) = openai();
            Arc::new(pipeline(vocab, merges, END).expect("the vocabulary in the program is whole"))
        });
        let id = |token: &str| inner.token_to_id(token).expect("the vocabulary in the program has start and end");
        assert!(pad as usize <= id(END) as usize, "CLIP has no token {pad} to pad with");
        Tokenizer { inner: Arc::clone(inner), length: 77, start: id(START), end: id(END), pad }
    }

    /// From the texts of vocab.json and merges.txt; prompts get `length` ids, 3 or more, padded with the token `pad`:
    /// `<|endoftext|>` for Stable Diffusion 1, `!` for 2 and for SDXL's second encoder. `path` is for messages.
    ///
    /// Reads a prompt's `!` as transformers does, as padding where that is what `pad` says.
    ///
    /// # Errors
    /// [`Error::File`] if the texts are no vocabulary and merges, or lack a special token or `pad`.
    pub fn new(path: &Path, vocab_json: &str, merges: &str, length: usize, pad: &str) -> Result<Tokenizer> {
        assert!(length > 2, "a prompt of {length} ids has no room between its start and end");
        let bad = |problem: String| Error::file(path, problem, "fetch the tokenizer's files again");
        let vocab: std::collections::HashMap<String, u32> =
            serde_json::from_str(vocab_json).map_err(|e| bad(format!("vocab.json: {e}")))?;
        let lines = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
        let merges: Option<Merges> = lines.map(pair).collect();
        let merges = merges.ok_or_else(|| bad("merges.txt: expected two words on every line".into()))?;
        let id = |token: &str| vocab.get(token).copied().ok_or_else(|| bad(format!("vocab.json has no token {token}")));
        let (start, end, pad_id) = (id(START)?, id(END)?, id(pad)?);
        let inner = pipeline(vocab.into_iter().collect(), merges, pad)
            .map_err(|e| bad(format!("vocabulary and merges do not belong together: {e}")))?;
        Ok(Tokenizer { inner: Arc::new(inner), length, start, end, pad: pad_id })
    }

    /// The ids of a text's words: any text, of any length, without start, end and padding.
    pub fn words(&self, text: &str) -> Vec<u32> {
        // Bytes that the vocabulary lacks are END, so that every text has ids; were one refused all the same, it is END too:
        // never an empty prompt in silence.
        self.inner.encode_fast(text, false).map_or_else(|_| vec![self.end], |encoding| encoding.get_ids().to_vec())
    }

    /// Ids of a prompt as CLIP reads it, 77: start of text, words, end of text, padding.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The id of the start of a text.
    pub fn start(&self) -> u32 {
        self.start
    }

    /// The id of the end of a text, whose state is a prompt's pooled one.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The id that fills a text up to its length.
    pub fn pad(&self) -> u32 {
        self.pad
    }
}

/// The beginning of what a user wrote, on one line, for messages.
fn shown(text: &str) -> String {
    let begin: String = text.chars().take(60).flat_map(char::escape_debug).collect();
    if text.chars().nth(60).is_some() { begin + "…" } else { begin }
}

fn pair(line: &str) -> Option<(String, String)> {
    line.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()))
}

/// OpenAI's vocabulary, which its merges imply: the bytes, the bytes that end a word, what each merge makes, start and end.
fn openai() -> (Vocab, Merges) {
    // Bytes as characters: those that print are themselves and come first, in Latin-1; the others follow from U+0100 on.
    let prints = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let printing = (0..=u8::MAX).filter(prints).map(char::from);
    let bytes: Vec<char> = printing.chain('\u{100}'..).take(256).collect();
    let merges: Merges = CLIP_MERGES.lines().filter_map(pair).collect();
    let units = bytes.iter().map(char::to_string);
    let ends = bytes.iter().map(|byte| format!("{byte}</w>"));
    let merged = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let tokens = units.chain(ends).chain(merged).chain([START.to_owned(), END.to_owned()]);
    (tokens.zip(0..).collect(), merges)
}

/// What transformers builds for CLIP around the byte-pair model, whatever tokenizer_config.json says.
fn pipeline(vocab: Vocab, merges: Merges, pad: &str) -> tokenizers::Result<tokenizers::Tokenizer> {
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .unk_token(END.into())
        .build()?;
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
