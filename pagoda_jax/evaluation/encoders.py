"""The networks whose features the metrics compare, and what each gives of a batch of 8-bit pictures."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pagoda_jax.data import images as images_lib
from pagoda_jax.weights import locate, text_encoders
from pagoda_jax.weights.convert import clip_image, dinov2, formats, inception
from pagoda_jax.weights.convert.mapping import ConversionError

INCEPTION_FILE, DINOV2_FILE, CLIP_336_FILE = 'pt_inception', 'dinov2_vitl14', 'clip_vit_l14_336'
CLIP_SIDE = 336  # px that CMMD's tower takes


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A frozen network.

  Attributes:
    apply: apply(variables, uint8 images [B, H, W, 3 or 1]) -> {output: float32 [B, C]}, 'features' among them.
    variables: host arrays.
    described: JSON values that tell which it is: its file's SHA-256, how it resizes.
  """

  apply: Callable[[Any, jax.Array], dict[str, jax.Array]]
  variables: Any
  described: dict[str, Any]

  def widths(self, height: int, width: int, channels: int) -> dict[str, int]:
    """How many numbers each output has."""
    images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.uint8)
    return {name: out.shape[-1] for name, out in jax.eval_shape(self.apply, self.variables, images).items()}


def of_inception(weights_dir, graph: str) -> Encoder:
  """The network of FID: 'features' (pool3), 'spatial' (of sFID), 'logits' without bias.

  Args:
    weights_dir: looked in for the file first.
    graph: how pictures are resized, one of inception.GRAPHS.

  Raises:
    MissingWeightsError, WrongDigestError, WeightsFileError, ConversionError: the published file is not there, or wrong.
  """
  converted, described = read(INCEPTION_FILE, 'inception', weights_dir)
  module = inception.network(converted.options, graph=graph)

  def apply(variables, images):
    found = module.apply(variables, images_lib.normalize(images))
    return {name: found[name] for name in ('features', 'spatial', 'logits')}

  return Encoder(apply, converted.variables, described | {'resize': graph})


def of_dinov2(weights_dir) -> Encoder:
  """DINOv2 ViT-L/14: 'features', the class token; errors as `of_inception`."""
  converted, described = read(DINOV2_FILE, 'dinov2', weights_dir)
  module = dinov2.network(converted.options)
  apply = lambda variables, images: {'features': module.apply(variables, images)}
  return Encoder(apply, converted.variables, described | {'resize': f'Pillow bicubic to {module.input_size}, 8 bits'})


def of_clip_336(weights_dir) -> Encoder:
  """The network of CMMD: 'features', of length 1; errors as `of_inception`."""
  converted, described = read(CLIP_336_FILE, 'clip_image', weights_dir)
  module = clip_image.network(converted.options)
  if module.size != CLIP_SIDE:
    raise ConversionError(f'{CLIP_336_FILE}: a tower of pictures of {module.size} px; CMMD is of {CLIP_SIDE} px')
  return _of_tower(module, converted.variables, described)


def of_captions(folder: str) -> tuple[Encoder, Callable[[list[str]], np.ndarray]]:
  """A CLIP whose towers judge whether pictures are what their captions say.

  Args:
    folder: as transformers publishes it: both towers, config.json, tokenizer.

  Returns:
    (the tower of pictures: 'features' [B, P], of length 1; embed(captions) -> [N, P] of length 1).

  Raises:
    TextEncoderError, TokenizerError, ConversionError, WeightsFileError: it is none, or damaged.
  """
  weights = text_encoders.weights_file(folder)
  converted = formats.read_converted(weights, 'clip_image')
  if (positions := converted.carried.get('text_model.embeddings.position_embedding.weight')) is None:
    raise ConversionError(f'{weights}: the tower of pictures alone; --clip needs both, to embed captions too')
  texts = text_encoders.open_encoder(f'clip:{folder}', len(positions))
  module = clip_image.network(converted.options)
  if texts.pooled_width != module.projection:
    raise ConversionError(f'{weights}: pictures in {module.projection} numbers, captions in {texts.pooled_width}: '
                          'towers of two networks')

  def embed(captions):
    whole = texts(captions)['text_pooled'].astype(np.float64)
    return whole / np.linalg.norm(whole, axis=1, keepdims=True)

  described = {'network': f'clip:{folder}', 'sha256': texts.sha256}
  return _of_tower(module, converted.variables, described), embed


def _of_tower(module, variables, described) -> Encoder:
  apply = lambda variables, images: {'features': module.apply(variables, images, method='of_pixels')}
  return Encoder(apply, variables, described | {'resize': f'Pillow bicubic to {module.size}, 8 bits'})


def read(name: str, format: str, weights_dir):
  """(a published file as our variables, JSON values that tell which it is); errors as `of_inception`."""
  path = locate.find(name, weights_dir)
  digest = locate.verify(locate.entry(name), path)
  return formats.read_converted(path, format), {'network': name, 'sha256': digest}


def all_outputs(encoders: dict[str, Encoder], wanted: set[str]):
  """encode({encoder: variables}, uint8 images) -> {ENCODER/OUTPUT: float32 [B, C]} of those that are wanted.

  Products are float32 in full: published numbers need it, and an accelerator's default is less.
  """

  def encode(variables, images):
    found = {}
    with jax.default_matmul_precision('highest'):
      for name, encoder in encoders.items():
        outputs = encoder.apply(variables[name], images)
        found |= {f'{name}/{key}': value.astype(jnp.float32) for key, value in outputs.items()}
    return {name: found[name] for name in sorted(wanted)}

  return encode
