//! The one generator of kernel text: loops over fragments written out, since naga gives drivers no hint to unroll them and a
//! matrix in an array that is indexed at run time leaves the registers.
//!
//! ```text
//! //: for i in 0..WM / EDGE        repeat up to the matching end, $i being 0, 1, …
//! //: if 2 * i < N                 keep up to the matching end, or drop
//! //: end
//! ```
//! Bounds are integer expressions over the text's `const … : u32`; `${expression}` is written as its value.

use std::collections::BTreeMap;

/// A line of composed text and the line, from 0, that it came from.
pub(super) type Line = (usize, String);

const MARK: &str = "//: ";

/// Write out every marked block of `lines`, in which line n came from line n.
pub(super) fn unroll(lines: Vec<String>) -> Vec<Line> {
    let lines: Vec<Line> = lines.into_iter().enumerate().collect();
    if !lines.iter().any(|(_, text)| text.trim_start().starts_with(MARK)) {
        return lines;
    }
    let mut values = BTreeMap::new();
    for (_, text) in &lines {
        if let Some((name, value)) = constant(text) {
            let value = evaluate(value, &values);
            values.insert(name.to_owned(), value);
        }
    }
    let mut out = Vec::new();
    expand(&lines, &values, &mut out);
    for (_, text) in &mut out {
        while let Some(start) = text.find("${") {
            let Some(length) = text[start..].find('}') else { unreachable!("unclosed expression in {text}") };
            let value = evaluate(&text[start + 2..start + length], &values).to_string();
            text.replace_range(start..=start + length, &value);
        }
    }
    out
}

/// Name and expression of a `const NAME: u32 = …;` at the start of a line.
fn constant(text: &str) -> Option<(&str, &str)> {
    let (name, rest) = text.strip_prefix("const ")?.split_once(':')?;
    let value = rest.strip_prefix(" u32 = ")?.split_once(';')?.0;
    Some((name, value))
}

fn expand(lines: &[Line], values: &BTreeMap<String, u32>, out: &mut Vec<Line>) {
    let mut at = 0;
    while let Some((_, text)) = lines.get(at) {
        let Some(mark) = text.trim_start().strip_prefix(MARK) else {
            out.push(lines[at].clone());
            at += 1;
            continue;
        };
        let end = end_of(lines, at);
        let body = &lines[at + 1..end];
        if let Some((variable, range)) = mark.strip_prefix("for ").and_then(|rest| rest.split_once(" in ")) {
            let Some((from, to)) = range.split_once("..") else { unreachable!("a range in {mark}") };
            for value in evaluate(from, values)..evaluate(to, values) {
                let pattern = format!("${variable}");
                let value = value.to_string();
                let body: Vec<Line> = body.iter().map(|(n, text)| (*n, text.replace(&pattern, &value))).collect();
                expand(&body, values, out);
            }
        } else if let Some((a, b)) = mark.strip_prefix("if ").and_then(|rest| rest.split_once('<')) {
            if evaluate(a, values) < evaluate(b, values) {
                expand(body, values, out);
            }
        } else {
            unreachable!("neither for nor if: {mark}");
        }
        at = end + 1;
    }
}

/// The line of the end that matches the mark in line `start`.
fn end_of(lines: &[Line], start: usize) -> usize {
    let mut depth = 0;
    for (at, (_, text)) in lines.iter().enumerate().skip(start) {
        match text.trim_start().strip_prefix(MARK) {
            Some("end") => depth -= 1,
            Some(_) => depth += 1,
            None => {}
        }
        if depth == 0 {
            return at;
        }
    }
    unreachable!("no end for {}", lines[start].1)
}

/// The value of an expression of + - * / %, parentheses, numbers (with or without `u`) and names.
fn evaluate(text: &str, values: &BTreeMap<String, u32>) -> u32 {
    let mut parser = Parser { rest: text, values };
    let value = parser.sum();
    assert!(parser.rest.trim().is_empty(), "{} is left of {text}", parser.rest);
    value
}

struct Parser<'a> {
    rest: &'a str,
    values: &'a BTreeMap<String, u32>,
}

impl Parser<'_> {
    /// Take one of these characters, if it comes next.
    fn take(&mut self, any: &[char]) -> Option<char> {
        let rest = self.rest.trim_start();
        let found = rest.chars().next().filter(|c| any.contains(c))?;
        self.rest = &rest[1..];
        Some(found)
    }

    fn sum(&mut self) -> u32 {
        let mut value = self.product();
        while let Some(sign) = self.take(&['+', '-']) {
            let next = self.product();
            value = if sign == '+' { value + next } else { value - next };
        }
        value
    }

    fn product(&mut self) -> u32 {
        let mut value = self.atom();
        while let Some(sign) = self.take(&['*', '/', '%']) {
            let next = self.atom();
            value = match sign {
                '*' => value * next,
                '/' => value / next,
                _ => value % next,
            };
        }
        value
    }

    fn atom(&mut self) -> u32 {
        if self.take(&['(']).is_some() {
            let value = self.sum();
            assert!(self.take(&[')']).is_some(), "a closing parenthesis before {}", self.rest);
            return value;
        }
        let rest = self.rest.trim_start();
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (word, rest) = rest.split_at(end);
        self.rest = rest;
        match self.values.get(word) {
            Some(value) => *value,
            None => word.trim_end_matches('u').parse().unwrap_or_else(|_| unreachable!("the value of {word:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(lines: &[&str]) -> Vec<(usize, String)> {
        unroll(lines.iter().map(|line| (*line).to_owned()).collect())
    }

    #[test]
    fn loops_are_written_out_and_lines_kept() {
        let lines = text(&[
            "const N: u32 = 2u;",
            "const M: u32 = (N + 1u) * 2u / N;",
            "//: for i in 0..N",
            "//: for j in $i..M",
            "acc_$i_$j = ${$i * M + $j};",
            "//: end",
            "//: end",
            "last",
        ]);
        let expected = [
            (0, "const N: u32 = 2u;"),
            (1, "const M: u32 = (N + 1u) * 2u / N;"),
            (4, "acc_0_0 = 0;"),
            (4, "acc_0_1 = 1;"),
            (4, "acc_0_2 = 2;"),
            (4, "acc_1_1 = 4;"),
            (4, "acc_1_2 = 5;"),
            (7, "last"),
        ];
        assert_eq!(lines, expected.map(|(n, line)| (n, line.to_owned())));
    }

    #[test]
    fn conditions_keep_or_drop() {
        let lines = text(&["//: for i in 0..3", "//: if 2 * $i < 3", "x$i", "//: end", "//: end"]);
        assert_eq!(lines, [(2, "x0".to_owned()), (2, "x1".to_owned())]);
    }

    #[test]
    fn plain_text_is_left_alone() {
        assert_eq!(text(&["a ${b}", "c"]), [(0, "a ${b}".to_owned()), (1, "c".to_owned())]);
    }
}
