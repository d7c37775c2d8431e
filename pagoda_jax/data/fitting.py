"""Whether a config fits its pictures, before any device work; what is left to them is settled."""

import numpy as np
from absl import logging

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import records
from pagoda_jax.data import stream as streams
from pagoda_jax.data.pictures import SourceError
from pagoda_jax.data.sources import Source, open_source, prepared

# Of all training pictures in float64, several copies of which the summary that ends a run holds at once.
MOST_BYTES = 2**34


def settle(config) -> None:
  """Opens the source of an experiment, before any device work, and checks that the config fits it.

  config.data.num_classes = -1 becomes the number of classes that the source has; where that is 0,
  `conditional` of every discriminator becomes False. config.text.sha256 = '' becomes the SHA-256 of the encoder that
  made the embeddings of captions. Warns of resolutions that are not cut from the originals.

  Raises:
    SourceError: the source is missing or damaged; its pictures are stored smaller than config.data.resolution;
      a picture's label is not one of config.data.num_classes, where the first such picture is named; or captions
      have no embeddings, or those of another encoder; or there are more than samples can be graded by.
  """
  source, data = open_source(config.data), config.data
  _check_space(source, config)
  if source.resolution is not None and source.resolution < data.resolution:
    raise SourceError(f'config.data.resolution = {data.resolution}: the pictures of source {data.source} {data.path} '
                      f'are stored at {source.resolution} px')
  _check_graded(source, config)
  _warn_of_stored(source, config)
  if data.num_classes == -1:
    set_classes(config, len(source.class_names))
  check_labels(source, data.num_classes)
  if configs.has_text(config):
    _settle_text(config, prepared(source).texts)
    records.check_texts(config.data.path)


def _check_graded(source, config):
  """Refuses to grade samples by more pictures than a memory holds, which would show when all has been trained."""
  count, numbers = len(source), (config.data.resolution * spaces.factor(config)) ** 2 * config.data.channels
  if config.evaluation.samples and 8 * count * numbers > MOST_BYTES:
    raise SourceError(f'config.evaluation.samples = {config.evaluation.samples}: grades samples by all {count:,} '
                      f'training pictures at once, {8e-9 * count * numbers:,.0f} GB at config.data.resolution = '
                      f'{config.data.resolution}, and at most {MOST_BYTES / 1e9:,.0f} GB: must be 0; `pagoda evaluate` '
                      'measures samples of such a set')


def _check_space(source, config):
  """Refuses pictures in latent space, latents in pixel space, and those of another autoencoder."""
  whole = prepared(source)
  there, factor = getattr(whole, 'autoencoder', None), spaces.factor(config)
  if not there and not spaces.is_latent(config):
    return
  if not there or not spaces.is_latent(config):
    raise SourceError(f'config.space = {config.space!r}: {config.data.path} holds {"latents" if there else "pictures"}'
                      + ("; set config.space = 'latent'" if there else '; `pagoda prepare --autoencoder=FOLDER` makes '
                         'latents of them'))
  network, mine = config.autoencoder, there['sha256']
  if (there['factor'], there['channels']) != (factor, network.channels) or network.sha256 not in ('', mine):
    raise SourceError(
      f'config.autoencoder.weights = {network.weights!r}: autoencoder {network.sha256[:16] or "unknown"}, factor '
      f'{factor}, {network.channels} channels; the latents in {config.data.path} are of autoencoder {mine[:16]}, '
      f'factor {there["factor"]}, {there["channels"]} channels. Prepare them again, or name that one')
  if config.data.mirror and not there['mirror']:
    raise SourceError(f'config.data.mirror = True: {config.data.path} holds no latents of mirror images; must be '
                      'False, or prepare them with --mirror')
  if lacking := sorted(_needed(config) - {*whole.resolutions}):
    raise SourceError(f'{config.data.path}: holds latents of {", ".join(map(str, whole.resolutions))} a side, and none '
                      f'of {", ".join(map(str, lacking))}: no latents can be cut from others. `pagoda prepare '
                      f'--resolutions={",".join(str(factor * side) for side in sorted(_needed(config)))}` stores all')


def _needed(config) -> set[int]:
  """Resolutions of the pictures that the phases read."""
  if band := streams.band_of(config.data):
    return {band}
  return {config.base_resolution, *(configs.phase_resolution(config, name) for name in config.order)}


def _warn_of_stored(source, config):
  """Says which resolutions a prepared folder does not hold."""
  if (whole := prepared(source)) is None:
    return
  needed = _needed(config)
  if lacking := sorted(needed - {*whole.resolutions}):
    rows = [f'{side} px of those of {whole.at(side).resolution} px' for side in lacking]
    logging.warning(
      'config.data.path = %s holds pictures of %s px only. Cut from these, not from the originals, which would give '
      'other pixels: %s. `pagoda prepare --resolutions=%s` stores each, cut from the originals.',
      whole.folder, ', '.join(map(str, whole.resolutions)), ', '.join(rows), ','.join(map(str, sorted(needed))))


def _settle_text(config, store):
  """Refuses embeddings of another encoder than the config's, and takes over that one's SHA-256."""
  text = config.text
  kinds = [name.partition(':')[0] if name.startswith(('clip:', 't5:')) else name  # folders may have moved
           for name in (store.encoder, text.encoder)]
  rows = [('encoder', store.encoder, text.encoder)] if kinds[0] != kinds[1] else []
  pairs = [(key, getattr(store, key), text[key]) for key in ('length', 'width', 'pooled_width', 'sha256')]
  rows += [(key, there, here) for key, there, here in pairs if there != here and here]
  if rows:
    raise SourceError(f'{store.folder}: holds embeddings of captions by {store.encoder}, and config.text.encoder is '
                      f'{text.encoder}:' + ''.join(f'\n  {key}: there {there!r}, here {here!r}'
                                                  for key, there, here in rows)
                      + '\nPrepare another folder with that encoder, or change config.text to what is there.')
  text.sha256 = store.sha256


def set_classes(config, count: int) -> None:
  """Gives an experiment its number of classes; without any, no discriminator is conditional."""
  config.data.num_classes = count
  for phase in config.phases.values():
    if not count and 'discriminator' in phase:
      phase.discriminator.conditional = False


def check_labels(source: Source, num_classes: int) -> None:
  """Refuses labels that are not in 0..num_classes-1; with 0 classes labels are not looked at.

  Raises:
    SourceError: names the first picture whose label is out of range, or that has none.
  """
  if not num_classes:
    return
  labels, found = source.all_labels, len(source.class_names)
  if labels is None and found and source[0]['label'] < 0:  # tfds' test splits, whose labels are hidden
    raise SourceError(f'config.data.num_classes = {num_classes}: {source[0]["name"]} has no label, as no picture of a '
                      'split whose labels are hidden; 0 trains without, or take another config.data.split')
  wrong = [] if labels is None else np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    first = source[int(wrong[0])]
    label = f'label {first["label"]}' if first['label'] >= 0 else 'no label'
    raise SourceError(f'config.data.num_classes = {num_classes}: the picture {first["name"]} has {label} '
                      f'({len(wrong)} of {len(source)} pictures are out of range); the source has {found} classes')
  if labels is None and found > num_classes:
    raise SourceError(f'config.data.num_classes = {num_classes}: the source has {found} classes')
  if found < num_classes:
    logging.warning('config.data.num_classes = %d: the source has only %d classes', num_classes, found)
