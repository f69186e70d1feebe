//! A prompt to the chunks of 77 tokens that CLIP reads one by one, each token with its weight.
//!
//! What a prompt may say: `(word)` for 1.1 times the weight, `(word:1.2)` for this weight, `[word]` for the weight divided by
//! 1.1; all nest, and `\(` `\)` `\[` `\]` `\\` are the characters themselves. `BREAK` ends a chunk. `embedding:name` at the
//! start or behind a space is a textual inversion, up to the next space or comma ([`super::embeddings`]).

use std::str::FromStr;
use std::sync::Arc;

use super::emphasis::{Stretch, stretches};
use super::{Embedding, Embeddings, Tokenizer};
use crate::error::{Error, Result};

/// The most chunks that a prompt may make, 76,800 tokens: a bound on what a hostile prompt can cost before the planner looks at
/// it. Each costs a run of the text encoder, and 77 more keys in every cross-attention of every step.
pub const MAX_CHUNKS: usize = 1024;

/// A text of fewer tokens than this is moved to the next chunk rather than cut.
const LONG: usize = 8;

const EMBEDDING: &str = "embedding:";

/// Whose prompts these are: what weights mean in each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Style {
    /// ComfyUI's: an explicit weight takes the place of those around it, `((a:1.5) b)` is a 1.5, b 1.1; every bracketed text
    /// is tokenized alone.
    ///
    /// `[word]`, BREAK and brackets that are never closed are syntax here, as for A1111; ComfyUI itself reads them as text.
    #[default]
    Comfy,
    /// A1111's: weights multiply, `((a:1.5) b)` is a 1.65, b 1.1; neighbours of one weight are one text.
    A1111,
}

impl FromStr for Style {
    type Err = Error;

    fn from_str(name: &str) -> Result<Style> {
        match name {
            "comfy" => Ok(Style::Comfy),
            "a1111" => Ok(Style::A1111),
            _ => Err(Error::invalid("prompt style", "comfy or a1111", name)),
        }
    }
}

/// What the text encoder reads at one place.
#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// A row of its table.
    Id(u32),
    /// A vector in the place of one.
    Embedding {
        /// The textual inversion.
        embedding: Arc<Embedding>,
        /// Which of its vectors.
        row: usize,
    },
}

/// One run of the text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// Tokens and their weights, the tokenizer's length of them: start, text, end, padding; those not of the text weigh 1.
    pub tokens: Vec<(Token, f32)>,
}

/// The chunks of a prompt, one at least.
///
/// Texts of one weight, and embeddings, follow each other. One of fewer than 8 tokens that the chunk has no room for moves
/// to the next; a longer one is cut where the chunk is full, and so is a prompt without weights: every 75 tokens. As for
/// A1111, a BREAK with nothing before it makes an empty chunk, and one with nothing behind it none.
///
/// # Errors
/// [`Error::Invalid`] for more than [`MAX_CHUNKS`], for a weight beyond ±100, and for an embedding that is not there;
/// [`Error::File`] for one that cannot be read.
pub fn chunks(tokenizer: &Tokenizer, embeddings: &Embeddings, prompt: &str, style: Style) -> Result<Vec<Chunk>> {
    let mut chunker = Chunker { tokenizer, bytes: prompt.len(), chunks: Vec::new(), text: Vec::new() };
    for stretch in stretches(prompt, style)? {
        let Stretch::Text(text, weight) = stretch else {
            chunker.close()?;
            continue;
        };
        for part in parts(&text) {
            let tokens: Vec<Token> = match part {
                Part::Text(text) => tokenizer.words(text).into_iter().map(Token::Id).collect(),
                Part::Embedding(name) => {
                    let embedding = embeddings.get(name)?;
                    let token = |row| Token::Embedding { embedding: Arc::clone(&embedding), row };
                    (0..embedding.rows()).map(token).collect()
                }
            };
            chunker.add(&tokens, weight)?;
        }
    }
    chunker.finish()
}

/// A part of a text of one weight.
#[derive(Debug, PartialEq)]
enum Part<'a> {
    Text(&'a str),
    /// The name of an embedding.
    Embedding(&'a str),
}

fn parts(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut done = 0;
    for (at, _) in text.match_indices(EMBEDDING) {
        // Asked before the name is looked for, so that no name is read twice.
        if !text[..at].chars().next_back().is_none_or(char::is_whitespace) {
            continue;
        }
        let name = &text[at + EMBEDDING.len()..];
        let name = &name[..name.find(|c: char| c.is_whitespace() || c == ',').unwrap_or(name.len())];
        // Without a name it is a word and a colon.
        if !name.is_empty() {
            parts.extend([Part::Text(&text[done..at]), Part::Embedding(name)]);
            done = at + EMBEDDING.len() + name.len();
        }
    }
    parts.push(Part::Text(&text[done..]));
    // What is only space has no tokens: not worth the tokenizer's time.
    parts.retain(|part| !matches!(part, Part::Text(text) if text.trim().is_empty()));
    parts
}

struct Chunker<'a> {
    tokenizer: &'a Tokenizer,
    /// The prompt's length, for messages.
    bytes: usize,
    chunks: Vec<Chunk>,
    /// The text of the chunk that is being filled.
    text: Vec<(Token, f32)>,
}

impl Chunker<'_> {
    /// Tokens of text in a chunk, 75.
    fn room(&self) -> usize {
        self.tokenizer.length() - 2
    }

    fn add(&mut self, tokens: &[Token], weight: f32) -> Result<()> {
        // A chunk of a tokenizer with less room than this moves nothing.
        let cut = tokens.len() >= LONG.min(self.room());
        let mut rest = tokens;
        while !rest.is_empty() {
            let left = self.room() - self.text.len();
            let fits = if rest.len() <= left {
                rest.len()
            } else if cut {
                left
            } else {
                0
            };
            let (now, later) = rest.split_at(fits);
            self.text.extend(now.iter().cloned().map(|token| (token, weight)));
            rest = later;
            if !rest.is_empty() {
                self.close()?;
            }
        }
        Ok(())
    }

    /// Ends the chunk, be it empty.
    fn close(&mut self) -> Result<()> {
        if self.chunks.len() == MAX_CHUNKS {
            let expected = format!("at most {MAX_CHUNKS} chunks of {} tokens", self.room());
            return Err(Error::invalid("prompt", expected, format!("more, in {} bytes", self.bytes)));
        }
        let mut tokens = vec![(Token::Id(self.tokenizer.start()), 1.0)];
        tokens.append(&mut self.text);
        tokens.push((Token::Id(self.tokenizer.end()), 1.0));
        tokens.resize(self.tokenizer.length(), (Token::Id(self.tokenizer.pad()), 1.0));
        self.chunks.push(Chunk { tokens });
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Chunk>> {
        if !self.text.is_empty() || self.chunks.is_empty() {
            self.close()?;
        }
        Ok(self.chunks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STYLES: [Style; 2] = [Style::Comfy, Style::A1111];
    const FOX: u32 = 3240;

    fn embeddings() -> Embeddings {
        let mut all = Embeddings::none();
        for (name, rows) in [("one", 1), ("four", 4), ("long", 100)] {
            all.insert(name, Embedding::of(name, rows, &[8]));
        }
        all
    }

    fn cut(prompt: &str, style: Style) -> Result<Vec<Chunk>> {
        chunks(&Tokenizer::clip(0), &embeddings(), prompt, style)
    }

    /// What stands between start and end, chunk by chunk: the weights of ids, and embeddings as their name, row and weight.
    fn texts(prompt: &str, style: Style) -> Vec<Vec<String>> {
        let text = |chunk: Chunk| {
            assert_eq!(chunk.tokens.len(), 77);
            assert_eq!(chunk.tokens[0], (Token::Id(49406), 1.0));
            let end = chunk.tokens.iter().position(|(token, _)| *token == Token::Id(49407)).expect("an end");
            assert_eq!(chunk.tokens[end].1, 1.0);
            assert!(chunk.tokens[end + 1..].iter().all(|token| *token == (Token::Id(0), 1.0)));
            let show = |(token, weight): &(Token, f32)| match token {
                Token::Id(FOX) => format!("fox {weight}"),
                Token::Id(id) => format!("{id} {weight}"),
                Token::Embedding { embedding, row } => format!("{} {row} {weight}", embedding.name()),
            };
            chunk.tokens[1..end].iter().map(show).collect()
        };
        cut(prompt, style).expect("chunks").into_iter().map(text).collect()
    }

    /// The number of tokens in each chunk.
    fn lengths(prompt: &str) -> Vec<usize> {
        let lengths: Vec<usize> = texts(prompt, Style::Comfy).iter().map(Vec::len).collect();
        let others: Vec<usize> = texts(prompt, Style::A1111).iter().map(Vec::len).collect();
        assert_eq!(lengths, others, "{prompt:?}");
        lengths
    }

    fn foxes(n: usize) -> String {
        "fox ".repeat(n)
    }

    #[test]
    fn a_prompt_is_cut_every_75_tokens() {
        for (n, expected) in
            [(0, vec![0]), (1, vec![1]), (75, vec![75]), (76, vec![75, 1]), (150, vec![75, 75]), (151, vec![75, 75, 1])]
        {
            assert_eq!(lengths(&foxes(n)), expected, "{n} tokens");
        }
        assert_eq!(lengths(" \n "), [0]);
        assert_eq!(lengths("()"), [0]);
    }

    #[test]
    fn tokens_have_the_weight_of_their_text() {
        assert_eq!(texts("fox (fox fox:1.5) fox", Style::Comfy), [["fox 1", "fox 1.5", "fox 1.5", "fox 1"]]);
        assert_eq!(texts("((fox:1.5) fox)", Style::Comfy), [["fox 1.5", "fox 1.1"]]);
        assert_eq!(texts("((fox:1.5) fox)", Style::A1111), [["fox 1.65", "fox 1.1"]]);
        // Texts are tokenized each on its own, words within brackets too.
        assert_eq!(texts("(fo)(x:1.1)", Style::A1111), [["fox 1.1"]]);
        assert_ne!(texts("(fo)(x:1.1)", Style::Comfy), [["fox 1.1"]]);
    }

    #[test]
    fn a_short_text_moves_and_a_long_one_is_cut() {
        assert_eq!(lengths(&format!("{}({}:1.2)", foxes(68), foxes(7))), [75]);
        assert_eq!(lengths(&format!("{}({}:1.2)", foxes(69), foxes(7))), [69, 7]);
        assert_eq!(lengths(&format!("{}({}:1.2) fox", foxes(69), foxes(7))), [69, 8]);
        assert_eq!(lengths(&format!("{}({}:1.2)", foxes(69), foxes(8))), [75, 2]);
        assert_eq!(lengths(&format!("{}({}:1.2)", foxes(75), foxes(8))), [75, 8]);
        assert_eq!(lengths(&format!("fox ({}:1.2) fox", foxes(150))), [75, 75, 2]);
        // Of a prompt without weights no rest is short.
        assert_eq!(lengths(&foxes(77)), [75, 2]);
    }

    #[test]
    fn break_ends_the_chunk() {
        assert_eq!(lengths("fox BREAK fox fox"), [1, 2]);
        assert_eq!(lengths("fox BREAK"), [1]);
        assert_eq!(lengths("BREAK fox"), [0, 1]);
        assert_eq!(lengths("fox BREAK BREAK fox"), [1, 0, 1]);
        assert_eq!(lengths("BREAK"), [0]);
        assert_eq!(lengths(&format!("{}BREAK fox", foxes(75))), [75, 1]);
        assert_eq!(texts("(fox BREAK fox:1.5)", Style::Comfy), [["fox 1.5"], ["fox 1.5"]]);
    }

    #[test]
    fn embeddings_stand_among_words() {
        for style in STYLES {
            assert_eq!(texts("embedding:one", style), [["one 0 1"]]);
            let expected =
                ["fox 1", "four 0 1.5", "four 1 1.5", "four 2 1.5", "four 3 1.5", "267 1.5", "fox 1.5", "one 0 1"];
            assert_eq!(texts("fox (embedding:four, fox:1.5)\nembedding:one", style), [expected], "{style:?}");
            assert_eq!(texts("embedding:one.safetensors fox", style), [["one 0 1", "fox 1"]]);
            assert_eq!(texts("embedding:one embedding:one,fox", style), [["one 0 1", "one 0 1", "267 1", "fox 1"]]);
        }
        let parts = |text| super::parts(text);
        let (text, embedding) = (Part::Text, Part::Embedding);
        assert_eq!(parts("a embedding:b, c"), [text("a "), embedding("b"), text(", c")]);
        assert_eq!(parts("embedding:a\u{3000}embedding:b/c"), [embedding("a"), embedding("b/c")]);
        for word in ["an embedding: b", "embedding:, b", "no,embedding:b", "reembedding:b", "Embedding:b", "embedding"]
        {
            assert_eq!(parts(word), [text(word)]);
        }
        assert_eq!(parts("embedding:embedding:b"), [embedding("embedding:b")]);
    }

    #[test]
    fn embeddings_at_the_end_of_a_chunk_move_or_are_cut_as_texts_are() {
        assert_eq!(lengths(&format!("{} embedding:four", foxes(71))), [75]);
        assert_eq!(lengths(&format!("{} embedding:four", foxes(72))), [72, 4]);
        assert_eq!(lengths(&format!("{} embedding:one fox", foxes(75))), [75, 2]);
        assert_eq!(lengths("fox embedding:long fox"), [75, 27]);
        let long = texts("fox embedding:long", Style::Comfy);
        assert_eq!((&*long[0][74], &*long[1][0], &*long[1][25]), ("long 73 1", "long 74 1", "long 99 1"));
    }

    #[test]
    fn an_unknown_embedding_is_an_error() {
        let error = cut("fox, embedding:on fox", Style::Comfy).expect_err("there is no such").to_string();
        assert_eq!(error, "embedding on: expected one of four, long, one, found none of this name");
    }

    #[test]
    fn the_number_of_chunks_is_bounded() {
        assert_eq!(lengths(&foxes(75 * MAX_CHUNKS)).len(), MAX_CHUNKS);
        let more = MAX_CHUNKS + 1;
        for prompt in [
            foxes(75 * MAX_CHUNKS + 1),
            foxes(250_000),
            "BREAK ".repeat(more),
            "fox BREAK ".repeat(more),
            "embedding:long ".repeat(800),
        ] {
            let error = cut(&prompt, Style::Comfy).expect_err("too long").to_string();
            let expected =
                format!("prompt: expected at most 1024 chunks of 75 tokens, found more, in {} bytes", prompt.len());
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn small_tokenizers_cut_what_does_not_fit() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tokenizer");
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect(name);
        for length in 3..12 {
            let tokenizer =
                Tokenizer::new(&folder, &read("vocab.json"), &read("merges.txt"), length, "!").expect("one");
            let chunks = chunks(&tokenizer, &Embeddings::none(), "a fox a fox a fox a", Style::Comfy).expect("chunks");
            assert_eq!(chunks.len(), 7usize.div_ceil(length - 2), "{length}");
            assert!(chunks.iter().all(|chunk| chunk.tokens.len() == length));
        }
    }

    #[test]
    fn styles_have_names() {
        assert_eq!("comfy".parse::<Style>().expect("comfy"), Style::Comfy);
        assert_eq!("a1111".parse::<Style>().expect("a1111"), Style::A1111);
        let error = "A1111".parse::<Style>().expect_err("lower case").to_string();
        assert_eq!(error, "prompt style: expected comfy or a1111, found A1111");
        assert_eq!(serde_json::to_string(&STYLES).expect("names"), r#"["comfy","a1111"]"#);
        assert_eq!(Style::default(), Style::Comfy);
    }
}
