//! Inputs to safetensors files, in three notations told apart by their first byte, so that a mutation of a few bytes is still a file.

use std::fmt::Write as _;

/// The most bytes of tensors that a file gets; those that ask for more are left truncated.
const MAX_DATA: u64 = 256 << 10;

/// `#…`: a table; `{…`: a header; anything else: a file as it is. Tables may have a second one behind a line of `--`: a LoRA.
pub fn files(input: &[u8]) -> (Vec<u8>, Option<Vec<u8>>) {
    match input.first() {
        Some(b'#') => {
            let text = String::from_utf8_lossy(input);
            match text.split_once("\n--\n") {
                Some((model, lora)) => (of_table(model), Some(of_table(lora))),
                None => (of_table(&text), None),
            }
        }
        Some(b'{') => (of_header(input), None),
        _ => (input.to_vec(), None),
    }
}

/// A header by its length, itself and as many zeros as it asks for.
fn of_header(header: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    if let Ok(serde_json::Value::Object(tensors)) = serde_json::from_slice(header) {
        let ends = tensors.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
        let end = ends.max().unwrap_or(0);
        if end <= MAX_DATA {
            file.resize(file.len() + end as usize, 0);
        }
    }
    file
}

/// Lines `NAME DTYPE DIMS [FILL]`, such as `emb_params F32 2x768 0000803f`: offsets follow, FILL is hexadecimal bytes to repeat.
/// A scalar's DIMS are `-`. Lines of `#NAME VALUE` are metadata.
pub fn of_table(table: &str) -> Vec<u8> {
    let (mut header, mut metadata, mut data, mut end) = (String::new(), String::new(), Vec::new(), 0u64);
    for line in table.lines() {
        if let Some((name, value)) = line.strip_prefix('#').and_then(|line| line.split_once(' ')) {
            let _ = write!(metadata, "{}{}:{}", comma(&metadata), json(name), json(value));
            continue;
        }
        let mut words = line.split(' ');
        let (Some(name), Some(dtype), Some(dims)) = (words.next(), words.next(), words.next()) else { continue };
        let dims: Vec<u64> = dims.split('x').filter_map(|dim| dim.parse().ok()).collect();
        let count = dims.iter().fold(1u64, |all, &dim| all.saturating_mul(dim));
        let (start, bytes) = (end, count.saturating_mul(bits(dtype)) / 8);
        end = start.saturating_add(bytes);
        let (name, dtype) = (json(name), json(dtype));
        let _ = write!(
            header,
            r#"{}{name}:{{"dtype":{dtype},"shape":{dims:?},"data_offsets":[{start},{end}]}}"#,
            comma(&header)
        );
        if end <= MAX_DATA {
            let hex = words.next().unwrap_or("00").as_bytes();
            let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap_or(""), 16).unwrap_or(0);
            let fill: Vec<u8> = hex.chunks(2).map(byte).collect();
            data.extend(fill.iter().cycle().take(if fill.is_empty() { 0 } else { bytes as usize }));
        }
    }
    let metadata = if metadata.is_empty() { metadata } else { format!(r#""__metadata__":{{{metadata}}},"#) };
    let header = format!("{{{metadata}{header}}}").replace(",}", "}");
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

fn comma(before: &str) -> &'static str {
    if before.is_empty() { "" } else { "," }
}

fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn bits(dtype: &str) -> u64 {
    match dtype {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => 8,
    }
}
