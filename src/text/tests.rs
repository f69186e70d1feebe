//! The tokenizer against Hugging Face's ids, and texts that nobody should write.

use super::*;

#[derive(serde::Deserialize)]
struct Case {
    prompt: String,
    ids: Vec<u32>,
}

fn cases(name: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    serde_json::from_str(&std::fs::read_to_string(&path).expect(name)).expect(name)
}

/// The embedded model's tokenizer, of 2048 tokens, with a padding.
fn tokenizer(pad: &str) -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tokenizer");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect(name);
    Tokenizer::new(&folder, &read("vocab.json"), &read("merges.txt"), 77, pad).expect("the embedded tokenizer")
}

#[test]
fn ids_equal_hugging_faces() {
    let (tokenizer, cases) = (tokenizer(END), cases("tokens.json"));
    assert!(cases.len() > 40);
    for case in cases {
        let mut ids = vec![tokenizer.start()];
        ids.extend(tokenizer.words(&case.prompt).into_iter().take(75));
        ids.push(tokenizer.end());
        ids.resize(tokenizer.length(), tokenizer.pad());
        assert_eq!(ids, case.ids, "{:?}", case.prompt);
    }
}

/// OpenAI's vocabulary: of any prompt as a whole, and in the chunks that are made of it.
#[test]
fn clips_ids_equal_hugging_faces() {
    let (tokenizer, cases) = (Tokenizer::clip(49407), cases("tokens_clip.json"));
    assert!(cases.len() > 100 && cases.iter().filter(|case| case.ids.len() > 200).count() > 3);
    for Case { prompt, ids } in cases {
        assert_eq!(tokenizer.words(&prompt), ids, "{prompt:?}");
        let syntax = ['(', ')', '[', ']', '\\'];
        let escaped = |c: char| [syntax.contains(&c).then_some('\\'), Some(c)].into_iter().flatten();
        let escaped: String = prompt.replace("BREAK", "break").chars().flat_map(escaped).collect();
        let chunks = chunks(&tokenizer, &Embeddings::none(), &escaped, Style::Comfy).expect(&prompt);
        assert_eq!(chunks.len(), ids.len().div_ceil(75).max(1), "{prompt:?}");
        for (chunk, ids) in chunks.iter().zip(ids.chunks(75)) {
            let mut expected = vec![49406];
            expected.extend(ids);
            expected.resize(77, 49407);
            let expected: Vec<(Token, f32)> = expected.into_iter().map(|id| (Token::Id(id), 1.0)).collect();
            assert_eq!(chunk.tokens, expected, "{prompt:?}");
        }
    }
}

#[test]
fn clip_is_whole_and_shared() {
    let (first, second) = (Tokenizer::clip(49407), Tokenizer::clip(0));
    assert_eq!((first.start(), first.end(), first.pad(), first.length()), (49406, 49407, 49407, 77));
    assert_eq!((second.start(), second.end(), second.pad(), second.length()), (49406, 49407, 0, 77));
    assert!(Arc::ptr_eq(&first.inner, &second.inner));
    assert_eq!(first.inner.get_vocab_size(true), 49408);
    assert_eq!(openai().0.len(), 49408, "no token twice");
    // Padded with `!` or not, a prompt's `!` is a word.
    assert_eq!(first.words("a photo of a cat!"), [320, 1125, 539, 320, 2368, 256]);
    assert_eq!(second.words("a photo of a cat!"), [320, 1125, 539, 320, 2368, 256]);
}

/// transformers 5.23: `CLIPTokenizer.from_pretrained(folder)("a fox!  wow!!")` with either padding in the folder.
#[test]
fn an_exclamation_mark_is_the_padding_where_that_is_it() {
    assert_eq!(tokenizer(END).words("a fox!  wow!!"), [320, 1294, 256, 604, 342, 0, 256]);
    assert_eq!(tokenizer("!").words("a fox!  wow!!"), [320, 1294, 0, 604, 342, 0, 0]);
    assert_eq!((tokenizer(END).pad(), tokenizer("!").pad()), (2047, 0));
}

#[test]
fn space_has_no_ids() {
    for prompt in ["", "   ", "\n\t\u{3000}\u{85}\u{2028}"] {
        assert!(tokenizer(END).words(prompt).is_empty(), "{prompt:?}");
    }
}

/// A megabyte without a space is one word; each kind of it goes another way through the patterns.
#[test]
fn no_text_is_refused() {
    let tokenizer = tokenizer(END);
    for unit in ["x", "!", "1", "\u{0}", "\u{301}", "狐", "👩‍👩‍👧", "'s", "<|endoftext|>", "<|", "\u{10ffff}", "\u{feff}"]
    {
        let ids = tokenizer.words(&unit.repeat(1_000_000 / unit.len()));
        assert!(ids.len() > 1000, "{unit:?}: {}", ids.len());
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

/// Nothing that stands in a prompt takes more than linear time: quadratic would be minutes.
#[test]
fn hostile_prompts_are_read_in_time() {
    let units = [
        "(",
        ")",
        "[",
        "]",
        "\\",
        ":",
        ":1",
        ": ",
        ":)",
        "(:",
        "((:1)",
        "()",
        "( )",
        "(a)",
        "[a]",
        "(a",
        "[a",
        "(a[b)",
        "(a:1)",
        "(a:0.5",
        "((a:1.5) ",
        "\\(",
        "B",
        "BREAK",
        "BREAK ",
        "embedding:",
        " embedding:",
        " embedding:a",
        "(🦊)",
        "🦊",
        "\0",
        "\u{301}",
        " ",
        "x",
        "<|endoftext|>",
    ];
    let (tokenizer, start) = (Tokenizer::clip(0), std::time::Instant::now());
    for unit in units {
        for style in [Style::Comfy, Style::A1111] {
            // An answer or an error; what counts is the time.
            let _ = emphasis::stretches(&unit.repeat(1_000_000 / unit.len()), style);
            if let Ok(chunks) = chunks(&tokenizer, &Embeddings::none(), &unit.repeat(200_000 / unit.len()), style) {
                assert!(chunks.len() <= MAX_CHUNKS);
            }
            assert!(start.elapsed().as_secs() < 60, "{unit:?}");
        }
    }
}
