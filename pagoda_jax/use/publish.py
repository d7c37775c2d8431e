"""The folder that `pagoda publish` writes: an exported generator, samples and a model card."""

import dataclasses
import functools
import json
import pathlib

from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.runtime import files
from pagoda_jax.stages import decoding
from pagoda_jax.training import checkpoints
from pagoda_jax.use import exported, sample

CARD = 'README.md'
SAMPLES = 'samples.png'
MOST = 64  # samples shown
TO_SAY = 'TODO'


def write(generator, folder, workdir=None, title: str = '', licence: str = 'other', data: str = '',
          prompts: tuple[str, ...] = ()) -> dict:
  """Writes the folder; what of the card nobody has said stands in it as TODO.

  Args:
    generator, folder: as of `exported.write`.
    workdir: the run, whose evaluation is shown; None: weights alone.
    title, licence, data: of the card.
    prompts: of a network of captions: what its samples are drawn of.

  Returns:
    What config.json holds.

  Raises:
    As `exported.write`; ValueError: prompts are missing, or of a network that takes none.
  """
  generator.texts(prompts, max(len(prompts), 1))  # refused before anything is written
  for name, value in (('title', title), ('licence', licence)):
    if '\n' in value:
      raise ValueError(f'--{name}={value!r}: must be one line')
  # Once: a run that goes on may remove its checkpoint after the first look at it.
  generator = dataclasses.replace(generator, read=functools.cache(generator.read))

  def add(target):
    count = min(MOST, 8 * (generator.num_classes or len(prompts))) or MOST
    images, labels = sample.draw(generator, count, 'cycle', 0, count, prompts=prompts)
    columns = min(generator.num_classes, 10) if generator.num_classes > 1 else min(len(prompts), 10)
    write_png(target / SAMPLES, image_grid(images, columns, 64))
    config = files.read_sealed(target / exported.CONFIG)
    evaluation = _evaluation(epath.Path(workdir), generator) if workdir else {}
    described = data or (_data(generator.config) if workdir else '')
    card = _card(generator, config, title or pathlib.Path(folder).name, licence, described, evaluation, labels, prompts)
    (target / CARD).write_text(card)

  return exported.write(generator, folder, add)


def gaps(folder) -> list[str]:
  """The lines of a card that somebody has to write still."""
  lines = (pathlib.Path(folder) / CARD).read_text().splitlines()
  return [line.split(TO_SAY, 1)[1].strip(' :') for line in lines if TO_SAY in line]


def _evaluation(workdir, generator) -> dict:
  """Where from -> figures of the generator's weights, of those of `pagoda run` and `pagoda evaluate`; {} without."""
  phase_folder, step, found = workdir / generator.name, generator.source['step'], {}
  digest = checkpoints.digest({name: leaf for name, leaf in generator.read().items() if name != decoding.AUTOENCODER})
  first, *_ = configs.ema_names(generator.config.phases[generator.name])  # which `pagoda run` measures
  for path in [*phase_folder.glob('evaluation.json'), *sorted(phase_folder.glob(f'evaluate/step_{step}_*.json'))]:
    try:
      values = files.read_sealed(path)
    except (OSError, ValueError) as error:
      raise exported.ExportError(f'{path}: damaged ({error}); delete it to publish without') from None
    drawn = values.get('samples', {})
    if drawn.get('checkpoint_sha256', digest) != digest:
      continue  # of the phase as it was before it was begun anew
    if values.get('step', step) == step and drawn.get('ema', first) == generator.source.get('average', first):
      values.pop('asked', None)  # no figure
      figures = {key: values[key] for key in ('metrics', 'held_out') if key in values} or values
      found[f'`{path.name}`{_how(drawn)}'] = figures
  return found


def _how(drawn: dict) -> str:
  """In words, of how many samples figures are, and at which strength of guidance; '' where the file does not tell."""
  said = [f'{drawn["count"]:,} samples'] if 'count' in drawn else []
  if drawn.get('guidance') is not None:
    said.append(f'guidance {drawn["guidance"]:g}')
  return f' ({", ".join(said)})' if said else ''


def _data(config) -> str:
  data, side = config.data, config.data.resolution * spaces.factor(config)
  where = {'folder': 'a folder of pictures', 'webdataset': 'tars of pictures',
           'array_record': 'prepared records'}.get(data.source, data.source)
  parts = [f'{where}{f" ({data.name})" if data.name else ""}, split {data.split}, up to {side} px',
           f'{data.num_classes} classes' if data.num_classes else 'no labels',
           'with mirror images' if data.mirror else 'without mirror images',
           f'{data.holdout} held out' if data.holdout else '']
  return ', '.join(part for part in parts if part)


def _rows(values: dict, prefix='') -> list[str]:
  rows = []
  for key, value in values.items():
    if isinstance(value, dict):
      rows += _rows(value, f'{prefix}{key} ')
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      rows.append(f'| {prefix}{key} | {value:.4g} |' if isinstance(value, float) else f'| {prefix}{key} | {value} |')
  return rows


def _origin(generator, version: str) -> str:
  if generator.folder:
    return (f'Trained with pagoda_jax {version}, after PaGoDA (Kim et al., NeurIPS\n2024, arXiv 2405.14822). '
            f'{generator.where}.')
  # Of weights of others: what was noted when they were converted, and not where they lay.
  said = ', '.join(f'{key} {value}' for key, value in generator.source.items() if value)
  return f'Written with pagoda_jax {version} from weights: {said}.'


def _card(generator, config, title, licence, data, evaluation, labels, prompts) -> str:
  kind = 'one-step generator' if config['kind'] == 'generator' else 'diffusion teacher'
  tables = ['\n'.join([f'From {name}:', '', '| | |', '|---|---|', *_rows(values)])
            for name, values in evaluation.items()]
  given = [0, min(1, generator.num_classes - 1)] if generator.num_classes else [-1, -1]
  example = f'labels={given}' if generator.num_classes else 'num_images=2'
  listed = ', '.join(f'`{name}`' for name in config['files'])
  shape = 'x'.join(map(str, config['noise_shape']))
  guided = ''
  if config['guidance']:
    law = config['guidance']
    guided = f' It takes a strength of guidance (`guidance=2`), trained as {json.dumps(law)}.'
  if 'autoencoder' in config:
    factor, of = 2 ** (len(config['autoencoder']['widths']) - 1), config['autoencoder']['sha256'][:16]
    guided += f' It works on latents, {factor} times smaller than the images, of autoencoder {of}: its decoder is here.'
  classes = f'{generator.num_classes} classes' if generator.num_classes else 'no labels'
  turn = 'classes in turn' if generator.num_classes else 'no labels'
  if text := config['text']:
    example, given = f'prompts={[*prompts[:1]] * 2!r}', 'numpy.load("captions.npz")'
    said = '; '.join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    classes, turn = 'of captions', f'in turn of {said}'
    guided += (f' Captions are embedded by `{text["encoder"]}` (SHA-256 {text["sha256"][:16]}), which is not here; '
               f'[`{exported.LOADER}`]({exported.LOADER}) says how it takes their embeddings.')
  sampled = f'{len(labels)} of seed 0, {turn}, none chosen'
  return f"""---
license: {json.dumps(licence)}
library_name: pagoda_jax
pipeline_tag: {"text-to-image" if text else "unconditional-image-generation"}
tags: [jax, pagoda, one-step, image-generation]
---
# {title}

A {kind} of {generator.resolution} px images ({classes}): noise {shape} in,
{"one network evaluation" if config["kind"] == "generator" else f"{config['levels']} noise levels"} an image,
{config['parameters']:,} parameters. {_origin(generator, config['pagoda_jax'])}{guided}

![samples]({SAMPLES})

*Samples: {sampled}.*

## Load

```python
import pagoda_jax

generator = pagoda_jax.load('PATH OF THIS FOLDER')
images = generator({example}, seed=0)  # uint8 [2, {generator.resolution}, {generator.resolution}, {generator.channels}]
```

With nothing but jax: [`{exported.LOADER}`]({exported.LOADER}), which refuses damaged files.

```python
from load import load

images = load('.')({given}, seed=0)
```

## Evaluation

{chr(10).join(tables) if tables else f'{TO_SAY}: figures of evaluation, and what they were measured against'}

## Data

{data or f'{TO_SAY}: what it was trained on, and under which licence'}

## Licence

{licence if licence != 'other' else f'{TO_SAY}: licence of the weights'}

## Files

{listed}: SHA-256 of each is in `{exported.CONFIG}`, which is sealed by a checksum of its own values. Of the parameters:
`{config['params_sha256']}`.
"""
