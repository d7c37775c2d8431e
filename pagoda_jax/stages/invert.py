"""Between stages 1 and 2: every image's noise by the probability-flow ODE (PaGoDA, section 3.1)."""

import functools

from pagoda_jax import diffusion
from pagoda_jax.data import normalize
from pagoda_jax.models import Networks


def make_invert_step(networks: Networks, levels, clip_denoised: bool = True):
  """The inversion of one batch.

  Args:
    networks: networks.unet is the teacher.
    levels: noise levels, of diffusion.sigmas.
    clip_denoised: whether the denoised image is clamped to [-1, 1] at every evaluation.

  Returns:
    step(params, batch) -> noise [B, H, W, C] float32, standard deviation near sigma_max; batch: 'image'
    [B, H, W, C] uint8 or floats in [-1, 1], 'label' int32 [B].
  """

  def step(params, batch):
    denoise = functools.partial(networks.denoise, params)
    return diffusion.invert(denoise, normalize(batch['image']), levels, {'label': batch['label']}, clip_denoised)

  return step
