"""The U-Net: teacher, one-step generator and grown generator are all this one module."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pagoda_jax.networks import blocks, edm2, layers, text_condition
from pagoda_jax.networks.group_norm import ACTIVATIONS

# Options of the published networks that are not sizes; see the table in `UNet`.
EDM_ADM = {}
GUIDED_ADM = {'time_scale': 1000.0, 'min_group_channels': 1}
EDM_DDPMPP = {
    'norm_eps': 1e-6,
    'scale_shift': False,
    'skip_scale': math.sqrt(0.5),
    'resample_conv': True,
    'attend_last': True,
    'num_heads': 1,
    'ddpmpp_embedding': True,
}
EDM2 = {'magnitude_preserving': True}
# DeepFloyd IF's first stage, as diffusers computes it.
DEEPFLOYD = {'min_group_channels': 1, 'activation': 'gelu', 'text_group_norm': True, 'ddpm_levels': 1000}


class GrownLevel(NamedTuple):
  """A decoder level above the input resolution: an up-sampling block, then `num_blocks` blocks."""

  channels: int
  num_blocks: int = 2
  scale_shift: bool = False


def grown_level(level: Any) -> GrownLevel:
  """A GrownLevel from a mapping or a sequence of its fields."""
  return GrownLevel(**level) if hasattr(level, 'keys') else GrownLevel(*level)


class Block(NamedTuple):
  """A residual block's place and sizes, known before any parameter exists."""

  name: str
  resolution: int  # of its output
  in_channels: int  # with those of the encoder's skip connection
  channels: int
  resample: str = ''  # 'up', 'down' or ''
  heads: int = 0  # 0: no attention
  scale_shift: bool = True
  skip_conv: bool = False
  skip_scale: float = 1.0
  takes_skip: bool = False


class UNet(nn.Module):
  """ADM and DDPM++ U-Nets, with a decoder that can grow beyond the input's resolution.

  Parameters are named by resolution and place (`enc_16_block0`, `enc_8_down`, `mid_block1`,
  `dec_16_up`, `dec_32_block1`, `out_conv`), so a grown network keeps every name of the old one.

  What makes which published network (`EDM_ADM`, `GUIDED_ADM`, `EDM_DDPMPP` above); `-` is the default:

    option              EDM ADM   guided-diffusion, PaGoDA   EDM DDPM++   meaning
    time_scale          - (1)     1000                       -            factor on c_noise
    min_group_channels  - (4)     1                          -            GroupNorm: min(32, C // this) groups
    norm_eps            - (1e-5)  -                          1e-6
    scale_shift         - (True)  -                          False        embedding scales and shifts, or is added
    skip_scale          - (1)     -                          sqrt(1/2)    after every residual sum
    resample_conv       - (False) -                          True         1x1 convolution in up/down skip connections
    attend_last         - (False) -                          True         decoder attention: only a level's last block
    num_heads           - (0)     -                          1
    ddpmpp_embedding    - (False) -                          True         sines first, labels before the MLP
    stem_channels       - (0)     channels                   channels     of in_conv; 0: the first level's width

  `DEEPFLOYD` is ADM too, with `activation` 'gelu', the text's tokens normalised by `text_group_norm` in each attention
  block (padding among them: it knows no mask), and the parametrisation of a DDPM of `ddpm_levels` levels: told one of
  them as c_noise (method/ddpm.py), it answers with the noise, in twice as many channels, the second half of which
  (variances) is not returned. Text attention (text_condition.py) is where there is attention.

  `magnitude_preserving` (EDM2) makes the blocks of other layers (edm2.py), which know none of these options; grown
  levels stay ADM's. There the noise level's width is the stem's, and its parameters hold `logvar` besides.

  Source: Dhariwal & Nichol 2021 (ADM); Song et al. 2021 (DDPM++); Karras et al. 2022, appendix F;
  growth: Kim et al. 2024 (PaGoDA), stage 3.
  """

  resolution: int = 64  # of the input
  image_channels: int = 3
  in_channels: int = 0  # 0: image_channels
  channels: int = 192
  channel_mult: Sequence[float] = (1, 2, 3, 4)  # highest resolution first
  decoder_channel_mult: Sequence[float] = ()  # (): channel_mult
  stem_channels: int = 0
  embed_channels: int = 0  # 0: 4 * channels
  num_blocks: int = 3
  attention_resolutions: Sequence[int] = (32, 16, 8)
  mid_attention: bool = True
  num_heads: int = 0  # 0: channels // channels_per_head, at least 1
  channels_per_head: int = 64
  num_classes: int = 0  # 0: no labels
  augment_dim: int = 0
  omega_embedding: bool = False  # conditioned on the guidance strength
  text_width: int = 0  # of a text's token embeddings; 0: no text
  text_pooled_width: int = 0  # of the vector of a whole text, which joins the embedding; 0: there is none
  text_attention: str = 'none'  # of text_condition.ATTENTIONS
  text_channels: int = 0  # that tokens are projected to for attention; 0: as wide as the embedding
  text_pool_heads: int = 0  # the embedding gets what so many heads of attention make of the tokens (IF); 0: no such
  estimator: bool = False  # encoder and middle alone, and one number in place of an image
  grown: Sequence[Any] = ()  # a GrownLevel (or dict or tuple of its fields) for each added level, lowest first
  dropout: float = 0.0
  time_scale: float = 1.0
  min_group_channels: int = 4
  norm_eps: float = 1e-5
  scale_shift: bool = True
  skip_scale: float = 1.0
  resample_conv: bool = False
  attend_last: bool = False
  ddpmpp_embedding: bool = False
  activation: str = 'silu'
  text_group_norm: bool = False
  ddpm_levels: int = 0  # 0: EDM's parametrisation
  magnitude_preserving: bool = False
  remat: Sequence[int] = ()  # resolutions whose activations are computed again in the backward pass
  attention_form: str = 'auto'  # one of attention.FORMS: speed and memory
  dtype: Any = jnp.float32  # of convolutions and attention; parameters, embeddings and output are float32

  def __post_init__(self):
    # Configs bring lists and dicts; a module must be hashable.
    for name in ('channel_mult', 'decoder_channel_mult', 'attention_resolutions', 'remat'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    object.__setattr__(self, 'grown', tuple(grown_level(level) for level in self.grown))
    super().__post_init__()

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      c_noise: jax.Array,
      cond: Mapping[str, jax.Array],
      *,
      augment: jax.Array | None = None,
      dropout_keys: jax.Array | None = None,
      features_only: bool = False,
      logvar_only: bool = False,
  ) -> jax.Array:
    """The raw network F of Karras et al. 2022, equation 7.

    Args:
      x: [B, R, R, in_channels], scaled to unit variance (c_in applied).
      c_noise: [B], ln(sigma) / 4.
      cond: 'label' int [B] in 0..num_classes-1 (NaN from there on), or -1 for no label (also if absent; not read if
        num_classes is 0); 'omega' [B], guidance strength, needed if omega_embedding; text_condition.KEYS,
        needed if text_width.
      augment: [B, augment_dim] augmentation labels; absent means zeros.
      dropout_keys: [B] keys of the images' dropout; None: no dropout, as in sampling.
      features_only: return the decoder's features, before the output head.
      logvar_only: return [B] float32, the logarithm of the loss that is expected at c_noise; x is not read.

    Returns:
      [B, S, S, image_channels] float32, S = R * 2**len(grown); or [B, S, S, C] features; or of an estimator [B].

    Raises:
      ValueError: an input of another resolution, widths that do not split into heads, sizes that do
        not fit each other, a missing 'omega', or another number of augmentation labels than augment_dim.
    """
    if self.magnitude_preserving:
      if self.augment_dim or self.text_width:
        what = 'augmentation labels' if self.augment_dim else 'text'
        raise ValueError(f'a magnitude-preserving network has no input for {what}')
      logvar = edm2.LogVar(name='logvar')(c_noise)
    if logvar_only:
      if not self.magnitude_preserving:
        raise ValueError('only a magnitude-preserving network has a logvar')
      return logvar
    if x.shape[1:3] != (self.resolution, self.resolution):
      raise ValueError(f'input is {x.shape[1]}x{x.shape[2]}, the network is for {self.resolution}x{self.resolution}')
    if self.text_width and (missing := text_condition.missing(cond, self.text_pooled_width)):
      raise ValueError(f'the network is conditioned on text: cond needs {", ".join(missing)}')
    embedding, text = self._embedding(c_noise, cond, augment), ()
    if self.text_attention != 'none':
      width = self.text_channels or self.embed_width
      text = (text_condition.TextTokens(width, self.text_group_norm, self.dtype, name='text_tokens')(cond),)

    def run(block, x):
      keys = None
      if self.dropout and dropout_keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, zlib.crc32(block.name.encode()))
      return self._module(block)(x, embedding, keys, *text)

    encoder, middle, decoder = self.blocks()
    if self.magnitude_preserving:
      # A channel of ones stands in for the biases that there are none of.
      stem = edm2.Weighted(self.stem_width, 3, self.dtype, name='in_conv')
      x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    else:
      stem = layers.Conv(self.stem_width, (3, 3), kernel_init=layers.kernel_init, dtype=self.dtype, name='in_conv')
    x = stem(x)
    skips = [x]
    for block in encoder:
      x = run(block, x)
      skips.append(x)
    for block in middle:
      x = run(block, x)
    if self.estimator:
      x = jnp.mean(self._act(self._norm(x, 'estimate_norm')), axis=(1, 2))
      return nn.Dense(1, kernel_init=layers.zeros_init, name='estimate')(x)[:, 0]
    for block in decoder:
      if block.takes_skip:
        x = edm2.mp_cat(x, skips.pop()) if self.magnitude_preserving else jnp.concatenate([x, skips.pop()], axis=-1)
      x = run(block, x)
    if features_only:
      return x
    # The head stays in float32: a generator's output is the image itself, and bfloat16 would band it. Its products are
    # exact; after layers in bfloat16 only where that is asked for, as six passes for three channels are 5 % of a step.
    precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
    if self.magnitude_preserving:
      gain = self.param('out_gain', layers.zeros_init, ())
      return edm2.Weighted(self.image_channels, 3, precision=precision, name='out_conv')(x, gain)
    x = self._act(self._norm(x, 'out_norm'))
    x = nn.Conv(self.head_width, (3, 3), kernel_init=layers.zeros_init, precision=precision, name='out_conv')(x)
    return x[..., : self.image_channels]

  def _norm(self, x: jax.Array, name: str) -> jax.Array:
    return layers.group_norm(x.shape[-1], self.min_group_channels, self.norm_eps, jnp.float32, name)(x)

  @property
  def _act(self):
    return ACTIVATIONS[self.activation]

  @property
  def head_width(self) -> int:
    """Channels of the last convolution."""
    return self.image_channels * (2 if self.ddpm_levels else 1)

  @property
  def stem_width(self) -> int:
    return self.stem_channels or int(self.channels * self.channel_mult[0])

  @property
  def embed_width(self) -> int:
    widest = self.channels * max(self.channel_mult) if self.magnitude_preserving else 4 * self.channels
    return self.embed_channels or int(widest)

  def blocks(self) -> tuple[list[Block], list[Block], list[Block]]:
    """(encoder, middle, decoder): every residual block in the order of its call.

    Raises:
      ValueError: the resolution cannot be halved often enough, or the multipliers do not match.
    """
    levels = len(self.channel_mult)
    if self.resolution % 2 ** (levels - 1):
      raise ValueError(f'resolution {self.resolution} cannot be halved {levels - 1} times')
    decoder_mult = self.decoder_channel_mult or self.channel_mult
    if len(decoder_mult) != levels:
      raise ValueError(f'decoder_channel_mult has {len(decoder_mult)} levels, channel_mult {levels}')
    resolutions = [self.resolution >> level for level in range(levels)]
    width = self.stem_width

    encoder = []
    for level, resolution in enumerate(resolutions):
      if level:
        encoder.append(self._block(f'enc_{resolution}_down', resolution, width, width, resample='down'))
      for i in range(self.num_blocks):
        channels = int(self.channels * self.channel_mult[level])
        attention = resolution in self.attention_resolutions
        encoder.append(self._block(f'enc_{resolution}_block{i}', resolution, width, channels, attention))
        width = channels
    skip_widths = [self.stem_width] + [block.channels for block in encoder]

    lowest = resolutions[-1]
    middle = [self._block(f'mid_block{i}', lowest, width, width, i == 0 and self.mid_attention) for i in range(2)]

    decoder = []
    for level, resolution in reversed(list(enumerate(resolutions))):
      if resolution != lowest:
        decoder.append(self._block(f'dec_{resolution}_up', resolution, width, width, resample='up'))
      for i in range(self.num_blocks + 1):
        channels = int(self.channels * decoder_mult[level])
        attention = resolution in self.attention_resolutions and (i == self.num_blocks or not self.attend_last)
        in_channels = width + skip_widths.pop()
        block = self._block(f'dec_{resolution}_block{i}', resolution, in_channels, channels, attention)
        decoder.append(block._replace(takes_skip=True))
        width = channels
    return encoder, middle, decoder + self._grown_blocks(width)

  def _block(self, name, resolution, in_channels, channels, attention=False, resample='') -> Block:
    return Block(
        name, resolution, in_channels, channels, resample,
        heads=(self.num_heads or max(1, channels // self.channels_per_head)) if attention else 0,
        scale_shift=self.scale_shift,
        skip_conv=in_channels != channels or (bool(resample) and self.resample_conv),
        skip_scale=self.skip_scale,
    )

  def _grown_blocks(self, width: int) -> list[Block]:
    """The added levels. They are ADM's whatever the base is: with no scaled or convolved skip
    connection, the grown network begins as the old features, up-sampled."""
    blocks = []
    for exponent, level in enumerate(self.grown, 1):
      resolution = self.resolution << exponent
      names = [f'dec_{resolution}_up'] + [f'dec_{resolution}_block{i}' for i in range(level.num_blocks)]
      for name in names:
        blocks.append(Block(name, resolution, width, level.channels, 'up' if name == names[0] else '',
                            scale_shift=level.scale_shift, skip_conv=width != level.channels))
        width = level.channels
    return blocks

  def _module(self, block: Block) -> nn.Module:
    again = nn.remat if block.resolution in self.remat else lambda kind: kind
    if self.magnitude_preserving and block.resolution <= self.resolution:
      return again(edm2.Block)(block.channels, not block.name.startswith('enc'), block.resample, block.heads,
                               block.skip_conv, self.dropout, self.dtype, self.attention_form, name=block.name)
    return again(blocks.ResBlock)(
        channels=block.channels,
        resample=block.resample,
        heads=block.heads,
        scale_shift=block.scale_shift,
        skip_conv=block.skip_conv,
        skip_scale=block.skip_scale,
        dropout=self.dropout,
        min_group_channels=self.min_group_channels,
        norm_eps=self.norm_eps,
        activation=self.activation,
        text_attention=self.text_attention,
        text_group_norm=self.text_group_norm,
        dtype=self.dtype,
        attention_form=self.attention_form,
        name=block.name,
    )

  def _embedding(self, c_noise, cond, augment) -> jax.Array:
    """[B, embed_width]: noise level, label, text, augmentation and guidance strength in one vector, after SiLU."""
    if augment is not None and augment.shape[-1] != self.augment_dim:  # untold, the network would learn them as data
      raise ValueError(f'{augment.shape[-1]} augmentation labels for a network with augment_dim = {self.augment_dim}')
    dense = layers.embedding_dense
    label = None
    if self.num_classes:
      label = cond.get('label', jnp.broadcast_to(-1, c_noise.shape))  # of a symbolic batch too
    if self.magnitude_preserving:
      x = edm2.Embedding(self.stem_width, self.embed_width, self.num_classes, name='embedding')(c_noise, label)
      return edm2.mp_silu(self._with_omega(x, cond))

    x = layers.sinusoid(c_noise * self.time_scale, self.channels, self.ddpmpp_embedding, self.ddpmpp_embedding)
    if label is not None and self.ddpmpp_embedding:
      one_hot = jax.nn.one_hot(label, self.num_classes) * math.sqrt(self.num_classes)  # all zeros for -1
      one_hot = jnp.where(label[:, None] < self.num_classes, one_hot, jnp.nan)
      x += dense(self.channels, 'label_embed')(one_hot)
    if self.augment_dim:
      augment = jnp.zeros((c_noise.shape[0], self.augment_dim)) if augment is None else augment
      x += dense(self.channels, 'augment_embed', use_bias=False)(augment)
    x = dense(self.embed_width, 'time_embed_1')(self._act(dense(self.embed_width, 'time_embed_0')(x)))
    if label is not None and not self.ddpmpp_embedding:
      x += layers.LabelEmbedding(self.num_classes, self.embed_width, name='label_embed')(label)
    if self.text_pooled_width:
      x += text_condition.TextEmbedding(self.embed_width, name='text_embed')(cond)
    if self.text_pool_heads:
      x += text_condition.PooledTokens(self.embed_width, self.text_pool_heads, name='text_pool')(cond)
    return self._act(self._with_omega(x, cond))

  def _with_omega(self, x, cond) -> jax.Array:
    """The embedding with what the guidance strength adds to it: zeros at first."""
    if not self.omega_embedding:
      return x
    if 'omega' not in cond:
      raise ValueError("the network is conditioned on the guidance strength: cond needs 'omega', [B]")
    return x + layers.OmegaEmbedding(self.embed_width, self.channels, zero=True, name='omega_embed')(cond['omega'])
