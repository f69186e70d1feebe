//! Weights in a prompt's text: `(word)`, `(word:1.2)`, `[word]`, escapes and BREAK, to stretches of one weight each.

use super::prompt::Style;
use crate::error::{Error, Result};

/// What a pair of brackets multiplies, or divides, a weight by.
const STEP: f64 = 1.1;

/// Weights beyond this are a slip of the pen: nothing but noise comes of them.
const MAX_WEIGHT: f64 = 100.0;

/// A stretch of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Stretch {
    /// Text of one weight, free of syntax.
    Text(String, f32),
    /// The end of a chunk.
    Break,
}

/// What stands in a prompt, in order.
enum Mark {
    Text(String),
    Round(Emphasis),
    RoundEnd,
    Square,
    SquareEnd,
    Break,
}

/// What a round bracket does; known at its end.
#[derive(Clone, Copy)]
enum Emphasis {
    Step,
    Explicit(f64),
}

/// The stretches of a prompt, in linear time whatever it is.
///
/// Round and square brackets pair up independently of each other. Those that are never closed reach to the end; those that
/// were never opened are text. An explicit weight is a decimal number right before a closing round bracket, anything else
/// behind a colon is text.
///
/// # Errors
/// [`Error::Invalid`] for a text whose weight is beyond [`MAX_WEIGHT`] or no number.
pub(super) fn stretches(prompt: &str, style: Style) -> Result<Vec<Stretch>> {
    let mut reader = Reader { prompt, style, marks: Vec::new(), text: String::new(), round: Vec::new(), square: 0 };
    let mut at = 0;
    while at < prompt.len() {
        at += reader.read(at);
    }
    reader.mark(None);
    weigh(reader.marks, style)
}

struct Reader<'a> {
    prompt: &'a str,
    style: Style,
    marks: Vec<Mark>,
    /// Text since the last mark.
    text: String,
    /// The open round brackets: their mark, and the place behind them.
    round: Vec<(usize, usize)>,
    /// How many square brackets are open.
    square: usize,
}

impl Reader<'_> {
    /// Reads what stands at byte `at`, and says how many bytes that was.
    fn read(&mut self, at: usize) -> usize {
        let rest = &self.prompt[at..];
        match rest.as_bytes()[0] {
            b'\\' => return self.escape(rest),
            b'(' => {
                self.mark(Some(Mark::Round(Emphasis::Step)));
                self.round.push((self.marks.len() - 1, at + 1));
            }
            b'[' => {
                self.mark(Some(Mark::Square));
                self.square += 1;
            }
            b')' if self.round.pop().is_some() => self.mark(Some(Mark::RoundEnd)),
            b']' if self.square > 0 => {
                self.mark(Some(Mark::SquareEnd));
                self.square -= 1;
            }
            b':' => return self.colon(rest, at),
            b'B' if is_break(self.prompt, at) => return self.end_of_chunk(rest),
            _ => {
                // The first may be a syntax character that means itself here, or begin a longer character.
                let first = rest.chars().next().map_or(1, char::len_utf8);
                let more = rest[first..].find(['\\', '(', ')', '[', ']', ':', 'B']).unwrap_or(rest.len() - first);
                self.text.push_str(&rest[..first + more]);
                return first + more;
            }
        }
        1
    }

    /// Ends the text before a mark, and puts the mark.
    fn mark(&mut self, mark: Option<Mark>) {
        if !self.text.is_empty() {
            self.marks.push(Mark::Text(std::mem::take(&mut self.text)));
        }
        self.marks.extend(mark);
    }

    /// A backslash makes text of a bracket or of another one. Before anything else A1111 drops it, ComfyUI reads it.
    fn escape(&mut self, rest: &str) -> usize {
        if let Some(&escaped @ (b'(' | b')' | b'[' | b']' | b'\\')) = rest.as_bytes().get(1) {
            self.text.push(char::from(escaped));
            return 2;
        }
        if self.style == Style::Comfy {
            self.text.push('\\');
        }
        1
    }

    /// A colon is text, unless a number and the end of a round bracket follow.
    fn colon(&mut self, rest: &str, at: usize) -> usize {
        // ComfyUI wants a character before the colon; for A1111 `(:1.2)` is a weight of nothing.
        let weighs = |behind: usize| behind < at || self.style == Style::A1111;
        if let (Some((weight, length)), Some(&(open, behind))) = (explicit(rest), self.round.last())
            && weighs(behind)
        {
            self.round.pop();
            self.marks[open] = Mark::Round(Emphasis::Explicit(weight));
            self.mark(Some(Mark::RoundEnd));
            return length;
        }
        self.text.push(':');
        1
    }

    /// BREAK, with the space around it.
    fn end_of_chunk(&mut self, rest: &str) -> usize {
        self.text.truncate(self.text.trim_end().len());
        self.mark(Some(Mark::Break));
        let behind = &rest["BREAK".len()..];
        rest.len() - behind.trim_start().len()
    }
}

/// Does the word BREAK stand at byte `at`, alone?
fn is_break(prompt: &str, at: usize) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let behind = prompt[at..].strip_prefix("BREAK");
    behind.is_some_and(|behind| !behind.starts_with(word) && !prompt[..at].ends_with(word))
}

/// The number of `:1.2)`, and the length of all that.
fn explicit(rest: &str) -> Option<(f64, usize)> {
    let number = rest.strip_prefix(':')?.trim_start();
    // Neither "nan" nor "inf" is made of these.
    let end = number.find(|c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E')).unwrap_or(number.len());
    let behind = number[end..].trim_start().strip_prefix(')')?;
    Some((number[..end].parse().ok()?, rest.len() - behind.len()))
}

/// Marks to texts of one weight each: brackets multiply what they hold. For ComfyUI an explicit weight takes the place of
/// those of the round brackets around it, and what brackets part is tokenized apart; for A1111 it multiplies too, and
/// neighbours of one weight are one text.
fn weigh(marks: Vec<Mark>, style: Style) -> Result<Vec<Stretch>> {
    let (mut round, mut square) = (vec![1.0], 0);
    let mut stretches = Vec::new();
    for mark in marks {
        let outer = round.last().copied().unwrap_or(1.0);
        match mark {
            Mark::Round(Emphasis::Explicit(weight)) if style == Style::Comfy => round.push(weight),
            Mark::Round(Emphasis::Explicit(weight)) => round.push(outer * weight),
            Mark::Round(Emphasis::Step) => round.push(outer * STEP),
            Mark::RoundEnd => _ = round.pop(),
            Mark::Square => square += 1,
            Mark::SquareEnd => square -= 1,
            Mark::Break => stretches.push(Stretch::Break),
            Mark::Text(text) => {
                let weight = checked(&text, outer * STEP.powi(-square))?;
                match stretches.last_mut() {
                    Some(Stretch::Text(last, same)) if style == Style::A1111 && *same == weight => last.push_str(&text),
                    _ => stretches.push(Stretch::Text(text, weight)),
                }
            }
        }
    }
    Ok(stretches)
}

fn checked(text: &str, weight: f64) -> Result<f32> {
    // NaN too is not in the range: endless round brackets within endless square ones.
    if weight.abs() <= MAX_WEIGHT || text.trim().is_empty() {
        return Ok(weight as f32);
    }
    let what = format!("prompt: the weight of \"{}\"", super::shown(text.trim()));
    let found = if weight.abs() < 1e6 { weight.to_string() } else { format!("{weight:e}") };
    Err(Error::invalid(what, format!("a number from -{MAX_WEIGHT} to {MAX_WEIGHT}"), found))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The stretches as texts and weights; a BREAK is "BREAK" with -1.
    fn read(prompt: &str, style: Style) -> Vec<(String, f32)> {
        let pair = |stretch| match stretch {
            Stretch::Text(text, weight) => (text, weight),
            Stretch::Break => ("BREAK".to_owned(), -1.0),
        };
        stretches(prompt, style).expect(prompt).into_iter().map(pair).collect()
    }

    #[track_caller]
    fn is(style: Style, prompt: &str, expected: &[(&str, f32)]) {
        let found = read(prompt, style);
        let near = |(a, b): (&(String, f32), &(&str, f32))| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6;
        assert!(found.len() == expected.len() && found.iter().zip(expected).all(near), "{prompt:?}: {found:?}");
    }

    #[track_caller]
    fn a1111(prompt: &str, expected: &[(&str, f32)]) {
        is(Style::A1111, prompt, expected);
    }

    #[track_caller]
    fn comfy(prompt: &str, expected: &[(&str, f32)]) {
        is(Style::Comfy, prompt, expected);
    }

    #[track_caller]
    fn both(prompt: &str, expected: &[(&str, f32)]) {
        a1111(prompt, expected);
        comfy(prompt, expected);
    }

    /// What A1111's documentation says of its prompts.
    #[test]
    fn a1111s_examples() {
        a1111("normal text", &[("normal text", 1.0)]);
        a1111("an (important) word", &[("an ", 1.0), ("important", 1.1), (" word", 1.0)]);
        a1111("(unbalanced", &[("unbalanced", 1.1)]);
        a1111(r"\(literal\]", &[("(literal]", 1.0)]);
        a1111("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]);
        let expected = [
            ("a ", 1.0),
            ("house", 1.573),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641),
            (".", 1.1),
        ];
        a1111("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", &expected);
    }

    #[test]
    fn an_explicit_weight_is_absolute_for_comfy_and_a_factor_for_a1111() {
        comfy("((a:1.5) b)", &[("a", 1.5), (" b", 1.1)]);
        a1111("((a:1.5) b)", &[("a", 1.65), (" b", 1.1)]);
        // Brackets within it multiply for both.
        both("(a (b) c:1.5)", &[("a ", 1.5), ("b", 1.65), (" c", 1.5)]);
        comfy("((((a:0.8) b:2) c))", &[("a", 0.8), (" b", 2.0), (" c", 1.21)]);
        both("(a:-0.5)(b:0)", &[("a", -0.5), ("b", 0.0)]);
        both("(a: 1.25 )(b:+.5)(c:2.)", &[("a", 1.25), ("b", 0.5), ("c", 2.0)]);
        // The last colon counts.
        both("(a:1.2:1.3)", &[("a:1.2", 1.3)]);
        both("(ratio 16:9:1.3)", &[("ratio 16:9", 1.3)]);
    }

    #[test]
    fn what_brackets_part_is_one_text_for_a1111_if_it_weighs_the_same() {
        comfy("(unnecessary)(parens)", &[("unnecessary", 1.1), ("parens", 1.1)]);
        a1111("a (b:1.0) c", &[("a b c", 1.0)]);
        comfy("a (b:1.0) c", &[("a ", 1.0), ("b", 1.0), (" c", 1.0)]);
        a1111("a [(b)] c", &[("a b c", 1.0)]);
    }

    #[test]
    fn square_brackets_divide() {
        both("[a] [[b]]", &[("a", 1.0 / 1.1), (" ", 1.0), ("b", 1.0 / 1.21)]);
        both("[(a:1.1)]", &[("a", 1.0)]);
        // The two kinds pair up apart from each other, as A1111's do.
        both("(a [b) c]", &[("a ", 1.1), ("b", 1.0), (" c", 1.0 / 1.1)]);
        // A weight ends at a round bracket only.
        both("[a:1.2]", &[("a:1.2", 1.0 / 1.1)]);
    }

    #[test]
    fn brackets_without_partner_never_fail() {
        both(") a ] b", &[(") a ] b", 1.0)]);
        both("a:1.2) b", &[("a:1.2) b", 1.0)]);
        both("((a) b", &[("a", 1.21), (" b", 1.1)]);
        both("(a [b", &[("a ", 1.1), ("b", 1.0)]);
        both("()[]((()))", &[]);
        both("", &[]);
        both(":)", &[(":)", 1.0)]);
        both("a ((:)) b", &[("a ", 1.0), (":", 1.21), (" b", 1.0)]);
    }

    #[test]
    fn what_is_no_number_is_text() {
        for text in [
            "a:nan", "a:inf", "a:-inf", "a:1.2.3", "a:", "a:.", "a:e", "a:--1", "a:1,5", "a:0x1", "a:1 2", "a::",
            "a:一",
        ] {
            both(&format!("({text})"), &[(text, 1.1)]);
        }
        // A weight of nothing, or a text of a colon.
        a1111("(:1.2)", &[]);
        comfy("(:1.2)", &[(":1.2", 1.1)]);
    }

    #[test]
    fn absurd_weights_are_refused_with_their_text() {
        for (prompt, found) in [
            ("a (fox:1e40) b".to_owned(), "found 1e40"),
            ("(fox:-101)".into(), "found -101"),
            ("(".repeat(50) + "fox", "found 117.39085287969"),
            ("(".repeat(100_000) + "fox", "found inf"),
            ("([".repeat(100_000) + "fox", "found NaN"),
            (format!("(fox:{})", "9".repeat(1_000_000)), "found inf"),
        ] {
            for style in [Style::Comfy, Style::A1111] {
                let error = stretches(&prompt, style).expect_err(found).to_string();
                let expected = "prompt: the weight of \"fox\": expected a number from -100 to 100, ";
                assert!(error.starts_with(expected) && error.contains(found), "{error}");
            }
        }
        let long = format!("({}:1e9)", "a\n".repeat(1000));
        assert!(stretches(&long, Style::Comfy).expect_err("1e9").to_string().len() < 250);
        // Nothing is there to be weighed.
        both(&"(".repeat(1000), &[]);
        // Infinite, and taken back.
        both("(fox:100)", &[("fox", 100.0)]);
        both(&("[".repeat(100_000) + "fox"), &[("fox", 0.0)]);
    }

    #[test]
    fn escapes() {
        both(r"\(a\) \[b\] \\ c", &[(r"(a) [b] \ c", 1.0)]);
        both(r"(a \(b\):1.3)", &[("a (b)", 1.3)]);
        both(r"\\(a)", &[("\\", 1.0), ("a", 1.1)]);
        both(r"(a:1.2\)", &[("a:1.2)", 1.1)]);
        // Before anything else: dropped by A1111, text for ComfyUI.
        a1111(r"C:\fox\", &[("C:fox", 1.0)]);
        comfy(r"C:\fox\", &[(r"C:\fox\", 1.0)]);
        a1111("\\\u{1f98a}", &[("\u{1f98a}", 1.0)]);
    }

    #[test]
    fn break_is_a_word_of_its_own() {
        let cut = ("BREAK", -1.0);
        both("a BREAK b", &[("a", 1.0), cut, ("b", 1.0)]);
        both("a\nBREAK\n\nb", &[("a", 1.0), cut, ("b", 1.0)]);
        both("BREAK", &[cut]);
        both("BREAK BREAK", &[cut, cut]);
        both("a,BREAK,b", &[("a,", 1.0), cut, (",b", 1.0)]);
        both(
            "break a BREAKS, OUTBREAK, BREAK_, 1BREAK, äBREAK",
            &[("break a BREAKS, OUTBREAK, BREAK_, 1BREAK, äBREAK", 1.0)],
        );
        // A weight goes on behind it.
        both("(a BREAK b:1.2) c", &[("a", 1.2), cut, ("b", 1.2), (" c", 1.0)]);
        both("(BREAK)", &[cut]);
        both("(a:BREAK)", &[("a:", 1.1), cut]);
        a1111("a BREAK (b:1) BREAK", &[("a", 1.0), cut, ("b", 1.0), cut]);
    }
}
