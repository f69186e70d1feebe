//! `scumble probe`: one part on given tensors.

use scumble::probe::{self, HostTensor, Reading, UNetInput};
use scumble::{Error, Result, noise};
use serde_json::json;

use crate::args::Part;
use crate::tensors::{Tensors, write};

/// Run the command.
pub fn run(part: &Part) -> Result<()> {
    match part {
        Part::Tokens { model, text, prompt } => {
            let ids = probe::tokens(&model.open()?, &text.embeddings(model), prompt, text.style()?)?;
            crate::print(json!({ "ids": ids }));
            Ok(())
        }
        Part::Clip { model, text, prompt, output, device } => {
            let reading = Reading { style: text.style()?, clip_skip: text.skip()? };
            let (checkpoint, embeddings) = (model.open()?, text.embeddings(model));
            let gpu = device.open()?;
            let (hidden, pooled) = pollster::block_on(probe::clip(&gpu, &checkpoint, &embeddings, prompt, reading))?;
            write(output, &[("hidden_states", &hidden), ("pooled", &pooled)])
        }
        Part::Unet { model, files, sag_map, device } => {
            let tensors = Tensors::open(&files.input)?;
            let input = UNetInput {
                sample: tensors.take("sample")?,
                timestep: tensors.take("timestep")?,
                encoder_hidden_states: tensors.take("encoder_hidden_states")?,
                added: match tensors.has("text_embeds") || tensors.has("time_ids") {
                    true => Some((tensors.take("text_embeds")?, tensors.take("time_ids")?)),
                    false => None,
                },
            };
            let (gpu, precision) = (device.open()?, device.precision()?);
            let (sample, mass) = pollster::block_on(probe::unet(&gpu, &model.open()?, precision, &input, *sag_map))?;
            let mut out = vec![("sample", &sample)];
            out.extend(mass.as_ref().map(|mass| ("mass", mass)));
            write(&files.output, &out)
        }
        Part::VaeDecode { model, files, device } => {
            let sample = Tensors::open(&files.input)?.take("sample")?;
            let (gpu, precision) = (device.open()?, device.precision()?);
            let out = pollster::block_on(probe::vae_decode(&gpu, &model.open()?, precision, &sample))?;
            write(&files.output, &[("sample", &out)])
        }
        Part::VaeEncode { model, files, device } => {
            let sample = Tensors::open(&files.input)?.take("sample")?;
            let (mean, logvar) = pollster::block_on(probe::vae_encode(&device.open()?, &model.open()?, &sample))?;
            write(&files.output, &[("mean", &mean), ("logvar", &logvar)])
        }
        Part::Schedule { model, scheduler, steps, denoise } => {
            let expected = "a whole number from 1 to 10000";
            let steps = usize::try_from(*steps).map_err(|_| Error::invalid("steps", expected, steps))?;
            crate::print(json!(probe::schedule(&model.open()?, scheduler, steps, *denoise)?));
            Ok(())
        }
        Part::Noise { seed, shape, output, .. } => {
            let numel = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|n| (1..=1 << 30).contains(n));
            let numel = numel.ok_or_else(|| Error::invalid("shape", "1 to 2^30 numbers", format!("{shape:?}")))?;
            write(output, &[("noise", &HostTensor::new(shape.clone(), noise::randn(*seed, numel)))])
        }
        Part::Degrade { files, mid, blur_sigma, threshold, device, .. } => {
            let tensors = Tensors::open(&files.input)?;
            let (denoised, mass) = (tensors.take("denoised")?, tensors.take("mass")?);
            let [h, w] = mid[..] else { return Err(Error::invalid("mid", "two numbers: H,W", format!("{mid:?}"))) };
            let gpu = device.open()?;
            let work = probe::degraded(&gpu, &denoised, &mass, [h, w], *blur_sigma, *threshold);
            let (degraded, mask) = pollster::block_on(work)?;
            write(&files.output, &[("degraded", &degraded), ("mask", &mask)])
        }
    }
}
