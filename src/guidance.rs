//! Guidance: one denoising as a recording. Samplers see only `denoised`, so every guidance works with every sampler.
//!
//! Classifier-free guidance (Ho & Salimans 2022) and self-attention guidance (Hong et al. 2023, "Improving Sample Quality of
//! Diffusion Models Using Self-Attention Guidance"), with ComfyUI's semantics, which do not depend on what the model predicts.

use crate::gpu::{Graph, Tensor};
use crate::model::blocks::ContextKv;
use crate::model::unet::{Ask, Folded, UNet};
use crate::ops::blend::{Kept, blend};
use crate::ops::degrade::degrade;
use crate::ops::guidance::{Degraded, guidance};
use crate::ops::pack::pack;
use crate::ops::take::take;
use crate::ops::touch::touch;

/// Which passes one denoising makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passes {
    /// Also without the prompt (classifier-free guidance, or SAG's map).
    pub uncond: bool,
    /// A third pass on the degraded picture.
    pub sag: bool,
}

impl Passes {
    /// What these scales need. Scale 0 skips the third pass; cfg 1 without SAG needs no uncond.
    pub fn of(cfg: f32, sag_scale: f32) -> Passes {
        let sag = sag_scale != 0.0;
        Passes { uncond: sag || cfg != 1.0, sag }
    }

    /// The prompts of the context, in its order.
    pub fn of_prompts<'p>(&self, negative: &'p str, prompt: &'p str) -> Vec<&'p str> {
        if self.uncond { vec![negative, prompt] } else { vec![prompt] }
    }

    /// Prompts in the context: uncond and cond, or cond alone.
    pub fn prompts(&self) -> u32 {
        if self.uncond { 2 } else { 1 }
    }
}

/// Tensors that a denoising reads and writes beside x.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// [`UNet::times`] of all calls.
    pub times: Tensor,
    /// [`UNet::context`] of [uncond, cond], or of [cond].
    pub context: &'a [ContextKv],
    /// [`UNet::folded`] for x's size.
    pub folded: &'a Folded,
    /// Masks of all calls, [calls, B, 1, mask_stride]; read only with SAG.
    pub mask: Option<Tensor>,
    /// What an inpainting model sees beside x, [1, h, w, 8] f32: the mask, the masked picture's latents, zeros.
    pub extra: Option<Tensor>,
    /// What stays of a picture outside a mask, for models that do not see it themselves.
    pub kept: Option<Kept>,
}

/// Record denoised = model(x) with its guidance; x and denoised [B, h, w, 4] f32.
pub fn denoise(g: &mut Graph, unet: &UNet, passes: Passes, x: Tensor, s: &Surroundings<'_>, denoised: Tensor) {
    // 0. outside the mask, x is the given picture at this noise level
    let x = match &s.kept {
        None => x,
        Some(kept) => {
            let masked = g.activation_f32("masked latents", x.dims);
            blend(g, x, kept, true, masked);
            masked
        }
    };

    // 1. uncond and cond in one batch; the mid block's attention mass of uncond comes with it
    let time = take(g, s.times);
    // SDXL's time embedding knows the prompt: then nothing is common.
    let share = if time.rows() == 1 { passes.prompts() } else { 1 };
    let input = pack(g, x, s.extra, passes.prompts() / share);
    let mass_of = passes.sag.then_some(x.batch());
    let ask = Ask { time, context: s.context, folded: s.folded, mass_of, share };
    let first = unet.forward(g, input, &ask);

    // 2. and 3. where uncond looks most: blur, re-noise, ask again without the prompt
    let sag = first.mass.zip(s.mask).map(|(mass, mask)| {
        let mid = unet.config.mid_size(x.height(), x.width());
        let (degraded, renoised) = degrade(g, x, first.sample, mass, mid, mask);
        let input = pack(g, renoised, s.extra, 1);
        let uncond: Vec<ContextKv> = s.context.iter().map(|kv| kv.map(|t| g.first(t))).collect();
        let rows = g.view(time, [time.rows(), 1, 1, time.channels()]);
        let ask = Ask { time: g.first(rows), context: &uncond, folded: s.folded, mass_of: None, share: 1 };
        let again = unet.forward(g, input, &ask).sample;
        Degraded { degraded, renoised, again }
    });

    // 4. denoised = cfg + s (degraded − D(renoised))
    match &s.kept {
        None => guidance(g, x, first.sample, sag, denoised),
        Some(kept) => {
            let whole = g.activation_f32("whole denoised", x.dims);
            guidance(g, x, first.sample, sag, whole);
            blend(g, whole, kept, false, denoised);
        }
    }
    touch(g);
}
