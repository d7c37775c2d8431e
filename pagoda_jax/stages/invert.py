"""Between stages 1 and 2: every image's noise by the probability-flow ODE (PaGoDA, section 3.1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.data.images import normalize
from pagoda_jax.method import diffusion, guidance
from pagoda_jax.stages.models import Networks, condition_of


def make_invert_step(networks: Networks, levels, clip_denoised: bool = True, add_noise: bool = False):
  """The inversion of one batch.

  Args:
    networks: networks.unet is the teacher.
    levels: noise levels, of diffusion.sigmas.
    clip_denoised: whether the denoised image is clamped to [-1, 1] at every evaluation.
    add_noise: whether the image gets noise of the lowest level before it is taken as the state there.
      The paper adds none. Without it a pixel that is the same in every image (a digit's black border)
      stays at the centre of its noise distribution, and the noise is narrower than the prior.

  Returns:
    step(params, batch, rng, null=None) -> noise [B, H, W, C] float32, standard deviation near sigma_max; batch:
    'image' [B, H, W, C] uint8 or floats in [-1, 1], 'label' int32 [B], 'key' int32 [B], from which and
    rng alone the added noise is drawn; with guidance 'omega' [B], its strength; with captions their embeddings,
    guidance.TEXT, and `null`, the empty one's.
  """

  def step(params, batch, rng, null=None):
    denoise = functools.partial(networks.denoise, params)
    images = normalize(batch['image'])
    if add_noise:
      if batch['key'].shape != images.shape[:1]:  # one key would add the same noise to every image
        raise ValueError(f"batch['key'] is {list(batch['key'].shape)}; must be {list(images.shape[:1])}")
      draw = lambda key: jax.random.normal(jax.random.fold_in(rng, key), images.shape[1:], jnp.float32)
      images += np.min(levels).astype(np.float32) * jax.vmap(draw)(batch['key'])
    if 'omega' in batch:
      denoise = guidance.guided(denoise, batch['omega'], null)
    return diffusion.invert(denoise, images, levels, condition_of(networks, batch), clip_denoised)

  return step
