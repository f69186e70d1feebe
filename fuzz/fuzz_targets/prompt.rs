//! Prompts of strangers to chunks of tokens, in both styles.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use scumble::files::Bytes;
use scumble::text::{Embedding, Embeddings, MAX_CHUNKS, Style, Token, Tokenizer, chunks};
use scumble::weights::Weights;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::clip(0));

/// None, and two: `a` of one vector and `b` of 80, more than a chunk has room for.
static EMBEDDINGS: LazyLock<[Embeddings; 2]> = LazyLock::new(|| {
    let mut two = Embeddings::none();
    for (name, rows) in [("a", 1), ("b", 80)] {
        let header = format!(r#"{{"emb_params":{{"dtype":"F16","shape":[{rows},1],"data_offsets":[0,{}]}}}}"#, 2 * rows);
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; 2 * rows]].concat();
        let weights = Weights::new(name.into(), Bytes::Owned(file)).expect("a file");
        two.insert(name, Embedding::new(name, &weights).expect("an embedding"));
    }
    [Embeddings::none(), two]
});

fuzz_target!(|input: &[u8]| {
    let prompt = String::from_utf8_lossy(input);
    for embeddings in &*EMBEDDINGS {
        for style in [Style::Comfy, Style::A1111] {
            let Ok(chunks) = chunks(&TOKENIZER, embeddings, &prompt, style) else { continue };
            assert!((1..=MAX_CHUNKS).contains(&chunks.len()));
            for chunk in chunks {
                assert_eq!(chunk.tokens.len(), 77);
                assert_eq!(chunk.tokens[0], (Token::Id(TOKENIZER.start()), 1.0));
                let padding = chunk.tokens.iter().rev().take_while(|token| **token == (Token::Id(TOKENIZER.pad()), 1.0));
                let end = &chunk.tokens[76 - padding.count()];
                assert_eq!(*end, (Token::Id(TOKENIZER.end()), 1.0));
                for (token, weight) in chunk.tokens {
                    assert!(weight.abs() <= 100.0, "{weight}");
                    if let Token::Embedding { embedding, row } = token {
                        assert!(row < embedding.rows());
                    }
                }
            }
        }
    }
});
