"""The networks whose features the metrics compare, and what each gives of a batch of 8-bit pictures."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pagoda_jax.data import images as images_lib
from pagoda_jax.weights import locate
from pagoda_jax.weights.convert import dinov2, formats, inception

INCEPTION_FILE, DINOV2_FILE = 'pt_inception', 'dinov2_vitl14'


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
  converted, described = _read(INCEPTION_FILE, 'inception', weights_dir)
  module = inception.network(converted.options, graph=graph)

  def apply(variables, images):
    found = module.apply(variables, images_lib.normalize(images))
    return {name: found[name] for name in ('features', 'spatial', 'logits')}

  return Encoder(apply, converted.variables, described | {'resize': graph})


def of_dinov2(weights_dir) -> Encoder:
  """DINOv2 ViT-L/14: 'features', the class token; errors as `of_inception`."""
  converted, described = _read(DINOV2_FILE, 'dinov2', weights_dir)
  module = dinov2.network(converted.options)
  apply = lambda variables, images: {'features': module.apply(variables, images)}
  return Encoder(apply, converted.variables, described | {'resize': f'Pillow bicubic to {module.input_size}, 8 bits'})


def _read(name, format, weights_dir):
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
