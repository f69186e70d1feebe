//! `scumble compare`: the same seed without SAG, with SAG, and where SAG acted, as one labelled picture.

use scumble::disk::write_atomic;
use scumble::image::Image;
use scumble::{Error, Generated, Request, Result};
use serde_json::json;

use crate::args::GenerateArgs;
use crate::generate::{check_writable, make, outputs, parameters, report, sum, write_extras};

/// Run the command.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let request = args.request()?;
    if request.sag_scale == 0.0 {
        return Err(Error::invalid("--sag-scale", "another number than 0, to compare with", "0, or --no-sag"));
    }
    let out = args.out.clone().unwrap_or_else(|| format!("scumble-{}-compare.png", request.seed).into());
    let paths = outputs(Some(&out), request.seed, request.batch);
    check_writable(&paths)?;
    let (pipeline, load_ms) = args.load()?;
    let plain = make(&pipeline, &Request { sag_scale: 0.0, ..request.clone() }, "without SAG")?;
    let made = make(&pipeline, &request, "with SAG")?;
    let total = sum(&made.masks);
    let texts = (parameters(&made.request, &args.model), json!(made.request).to_string());
    for (i, path) in paths.iter().enumerate() {
        let area = total.len() / paths.len();
        let picture = panel(&plain.images[i], &made, i, &total[i * area..][..area]);
        write_atomic(path, &picture.encode_png(&[("parameters", &texts.0), ("scumble", &texts.1)])?)?;
    }
    write_extras(args, &made)?;
    report(args, &pipeline, load_ms, &made, &paths);
    Ok(())
}

const GAP: u32 = 8;
const LINE: u32 = 28;
const PAPER: [u8; 3] = [250, 249, 246];
const INK: [u8; 3] = [32, 32, 36];

/// Three pictures side by side, a label over each, the prompt below.
fn panel(plain: &Image, made: &Generated, i: usize, mask: &[f32]) -> Image {
    let with = &made.images[i];
    let (w, h) = (with.width, with.height);
    let heat = heat(with, mask, made.shape[3] as u32, made.masks.len() as f32);
    let labels = ["without SAG".to_owned(), format!("SAG {}", made.request.sag_scale), "where SAG acted".to_owned()];
    let mut sheet = Image::filled(3 * w + 4 * GAP, h + 2 * LINE + GAP, PAPER);
    for (column, (image, label)) in [plain, with, &heat].into_iter().zip(&labels).enumerate() {
        let x = GAP + column as u32 * (w + GAP);
        sheet.draw_text(x, 6, &fit(label, w), INK);
        sheet.paste(image, x, LINE);
    }
    let r = &made.request;
    let caption = format!("{}  (seed {}, {} steps, cfg {})", r.prompt, r.seed, r.steps, r.cfg);
    let width = sheet.width - 2 * GAP;
    sheet.draw_text(GAP, LINE + h + 6, &fit(&caption, width), INK);
    sheet
}

/// As much of a text as fits, in letters that the font has.
fn fit(text: &str, width: u32) -> String {
    let ascii = text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' });
    let room = (width / Image::text_width("x")) as usize;
    let all: String = ascii.collect();
    if all.len() <= room { all } else { format!("{}...", &all[..room.saturating_sub(3)]) }
}

/// The picture in grey, glowing where the mask was set at many steps.
fn heat(image: &Image, mask: &[f32], mask_width: u32, calls: f32) -> Image {
    let mut out = image.clone();
    let scale = image.width / mask_width;
    for y in 0..image.height {
        for x in 0..image.width {
            let share = mask[((y / scale) * mask_width + x / scale) as usize] / calls;
            let [r, g, b] = image.get(x, y).map(f32::from);
            let grey = (0.3 * r + 0.59 * g + 0.11 * b) * 0.55 + 20.0;
            let glow = [255.0, 150.0, 30.0];
            out.set(x, y, glow.map(|c| (grey + (c - grey) * 0.75 * share).clamp(0.0, 255.0) as u8));
        }
    }
    out
}
