"""`pagoda evaluate`: figures of a phase's samples, or of anybody's pictures, with all that repeats them."""

import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import jax
import numpy as np
from etils import epath

import pagoda_jax
from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data.images import quantized
from pagoda_jax.evaluation import data_features, encoders, paired, plans, prompts, references, representations
from pagoda_jax.evaluation import pictures as sets
from pagoda_jax.evaluation.pictures import EvaluationError, Pictures
from pagoda_jax.evaluation.sums import SHUFFLE_SEED, Sums, sweep
from pagoda_jax.runtime import buckets, distributed, sharding
from pagoda_jax.runtime.files import write_sealed
from pagoda_jax.stages import models
from pagoda_jax.stages import sampler as sampling
from pagoda_jax.training import checkpoints, starts
from pagoda_jax.weights import autoencoders

REFERENCE_PICTURES = 10_000  # whose features are kept, for precision, recall and KID; drawn where there are more
CMMD_PICTURES = 50_000  # the same, for CMMD, whose authors take all: it is larger of fewer
FOLDER = 'evaluate'  # in a phase's
MAKERS = {'dinov2': encoders.of_dinov2, 'clip_336': encoders.of_clip_336} | representations.MAKERS


@dataclasses.dataclass(frozen=True)
class Request:
  """What `pagoda evaluate` was asked for; the fields are its flags."""

  metrics: str = ''
  num_images: int = 50_000
  reference: str = ''
  features: str = 'inception'
  resize: str = 'tensorflow'
  labels: str = 'random'
  guidance: tuple[float, ...] = ()
  seed: int = 0
  batch_size: int = 100
  resolution: int = sets.NO_RESOLUTION
  weights_dir: str = ''
  clip: str = ''


def of_images(path: str, asked: Request) -> dict[str, Any]:
  """Figures of finished pictures.

  Raises:
    EvaluationError: it cannot be measured as asked.
    SourceError, WeightsFileError, MissingWeightsError, WrongDigestError, ConversionError: a file is missing or damaged.
  """
  samples = sets.open_samples(path, asked.resolution)
  mesh = sharding.make_mesh()
  reference = None
  if asked.reference:
    reference = references.open_reference(
      asked.reference, '', '', samples, asked.resolution, asked.weights_dir)

  def check(plan):
    plan.check(samples.count, 'the samples')
    if plan.paired:
      paired.check_pictures(plan.paired, samples, reference.pictures, asked.weights_dir)

  size = samples.height, samples.width, samples.channels
  run = _Run(asked, reference, size, mesh, '', True, samples.captions, check)
  sums = run.sums(samples.count, samples.captions)
  run.pass_over(samples, sums, 'samples')
  more = {}
  if run.plan.paired:
    more = paired.of_pictures(run.plan.paired, samples, reference.pictures, mesh, asked.batch_size, asked.weights_dir)
  return run.result(sums, samples.described | {'count': samples.count}, more)


def of_phase(config, folder, name: str, step: str, asked: Request, ema: str = ''):
  """Figures of a phase's samples: yields a dictionary for each checkpoint and strength of guidance.

  Args:
    config, folder, name: experiment, work directory and phase.
    step: of the checkpoint, 'best', or a range such as 1000-5000 or 'all'; '' takes the newest.
    asked: the rest.
    ema: which of a teacher's averages; '' its first.

  Raises:
    EvaluationError, ValueError: it cannot be measured as asked.
    WorkdirError, CheckpointError and as `of_images`: something is not there or damaged.
  """
  phase_folder, mesh = epath.Path(folder) / name, sharding.make_mesh()
  asked = dataclasses.replace(asked, weights_dir=asked.weights_dir or config.weights_dir)
  chosen = steps_of(phase_folder, step, config.checkpoint)
  labels = sampling.parse_labels(asked.labels, asked.num_images, config.data.num_classes, asked.seed)
  reference = references.open_reference(asked.reference or references.DATA, folder, name, None, 0, asked.weights_dir)
  side, channels = configs.phase_resolution(config, name) * spaces.factor(config), config.data.channels
  said = prompts.of_data(config) if configs.has_text(config) else None
  captions = said and said.captions
  kept_in = folder if can_keep(folder, name) else ''

  def check(plan):
    plan.check(asked.num_images, 'the samples')
    _check_drawn(plan, asked)
    if plan.paired:
      paired.check_phase(plan.paired, config, folder, name, asked.weights_dir)

  run = _Run(asked, reference, (side, side, channels), mesh, kept_in, 'noise' in config.phases[name], captions, check)
  networks = models.build(config, name)
  # What a Sampler takes where nothing is asked for.
  default = networks.law.nearest(1.0) if networks.law and run.plan.needs_samples else None
  draw = _drawing(config, name, networks, run, asked.seed, mesh, said)
  for params, at in _read(config, phase_folder, ema, chosen):
    digest = checkpoints.digest(params)
    placed = sharding.place(autoencoders.with_decoder(config, params), mesh)
    for omega in asked.guidance or (default,):
      sums = run.sums(asked.num_images, captions)
      omegas = None if omega is None else np.full(len(labels), omega, np.float32)
      rows = lambda numbers, omegas=omegas: (
        numbers.astype(np.int32), labels[numbers], *([] if omegas is None else [omegas[numbers]]),
        *(said.embedded(numbers) if said else []))
      if run.plan.needs_samples:
        with jax.set_mesh(mesh):
          sweep(functools.partial(draw, placed, run.variables), rows, asked.num_images, mesh, asked.batch_size,
                sums.add, f'{name} at step {at}')
      more = {}
      if run.plan.paired:
        more = paired.of_phase(run.plan.paired, config, folder, name, placed, mesh, asked.num_images, asked.batch_size,
                               asked.weights_dir)
      described = {
        'phase': name, 'step': at, 'checkpoint_sha256': digest, 'ema': ema or configs.ema_names(config.phases[name])[0],
        'seed': asked.seed, 'guidance': omega, 'count': asked.num_images,
        'matmul_precision': config.evaluation.matmul_precision,
        **({'prompts': said.described} if said else {'labels': asked.labels})}
      yield run.result(sums, described, more)


def _check_drawn(plan, asked: Request) -> None:
  """Refuses what says how samples are drawn where none are."""
  given = [field for field in ('guidance', 'labels', 'seed') if getattr(asked, field) != getattr(Request, field)]
  if given and not plan.needs_samples:
    value = getattr(asked, given[0])
    shown = value if isinstance(value, (str, int)) else ','.join(f'{omega:g}' for omega in value)
    raise EvaluationError(f'--{given[0]}={shown}: is of samples, and {" and ".join(plan.metrics)} compare '
                          'reconstructions of training pictures, which have their own')


def steps_of(phase_folder, text: str, config) -> list[int | None]:
  """Steps of checkpoints, ascending, that --step asks for; [None] for the newest.

  Raises:
    EvaluationError: none lies in a range.
    ValueError, CheckpointError: as starts.chosen_step.
  """
  first, dash, last = text.partition('-')
  if dash and not (first.isdecimal() and last.isdecimal()):
    raise EvaluationError(f"--step={text}: must be a number, 'best', a range such as 1000-5000, or 'all'")
  if text != 'all' and not dash:
    return [starts.chosen_step(phase_folder, text, config)]
  there = sorted(checkpoints.finished_steps(phase_folder))
  found = there if text == 'all' else [step for step in there if int(first) <= step <= int(last)]
  if not found:
    raise EvaluationError(f'--step={text}: no checkpoint of {epath.Path(phase_folder).name} there; they are at '
                          f'{", ".join(map(str, there)) or "no step"}')
  return found


def _read(config, phase_folder, ema: str, chosen: list[int | None]):
  """Yields (parameters, step) of each checkpoint that is still there.

  Of several, hours may go by from their listing to the last one's turn, and a run that goes on keeps its latest alone.

  Raises:
    CheckpointError: none is left; or as `starts.read_average`.
  """
  gone = []
  for wanted in chosen:
    try:
      found = starts.read_average(config, phase_folder, ema, wanted)
    except checkpoints.CheckpointError:
      # Of several processes another one may have found it.
      if wanted in (None, *checkpoints.finished_steps(phase_folder)) or distributed.several():
        raise
      gone.append(wanted)
      if len(gone) == len(chosen):
        raise
      distributed.say(f'{phase_folder.name}, step {wanted}: left out, as its checkpoint has been removed since')
      continue
    yield found


def _drawing(config, name, networks, run, seed, mesh, said):
  """step(params, encoders' variables, numbers, labels[, omegas][, text, text_mask, text_pooled]) -> features of images
  drawn in the same program."""
  draw, shape = sampling.make_draw(config, name), networks.noise_shape(1)[1:]
  encode, null = run.encode, said and said.null

  def step(params, variables, numbers, labels, *more):
    noise = sampling.noise_of(seed, numbers, shape, networks.sigma_max)
    return encode(variables, quantized(draw(params, noise, labels, *sampling.draw_arguments(more, null))))

  return jax.jit(step, out_shardings=sharding.replicated(mesh))


class _Run:
  """The encoders on the mesh and the reference's sums: made once, used for every checkpoint.

  `check`: check(plan) refuses what cannot be measured, before minutes or hours of what can.
  """

  def __init__(self, asked: Request, reference, size, mesh, folder, pairs: bool, captions, check):
    self.asked, self.mesh, self.reference = asked, mesh, reference
    self.plan = plans.make(asked.metrics, asked.features, reference, pairs, representations.here(asked.weights_dir),
                           captions is not None)
    if asked.resize != 'tensorflow' and 'fdr6' in self.plan.metrics:
      raise EvaluationError(f'--resize={asked.resize}: FDr6 is of Inception as the ADM evaluator resizes for it; leave '
                            'it out')
    if asked.resize != 'tensorflow' and 'inception' not in self.plan.encoders:
      raise EvaluationError(f'--resize={asked.resize}: is of Inception, and what is asked for takes another network or '
                            'none')
    if asked.clip and 'clip' not in self.plan.metrics:
      raise EvaluationError(f'--clip={asked.clip}: is of the metric clip, which --metrics does not name')
    check(self.plan)
    held_out = reference.held_out if reference is not None and self.plan.compared else None
    if held_out is not None:
      self.plan.check(held_out.count, 'the held-out pictures')
    self.encoders, self._embed = {}, None
    for name in self.plan.encoders:
      if name == 'inception':
        self.encoders[name] = encoders.of_inception(asked.weights_dir, asked.resize)
      elif name == 'clip':
        if not asked.clip:
          raise EvaluationError('--metrics=clip: needs --clip=FOLDER, a published CLIP in transformers\' form (both '
                                'towers, config.json, tokenizer), such as openai/clip-vit-large-patch14')
        self.encoders[name], self._embed = encoders.of_captions(asked.clip)
      elif name == 'data':
        self.encoders[name] = data_features.encoder(reference.pictures, folder)
      else:
        self.encoders[name] = MAKERS[name](asked.weights_dir)
    self._widths = {f'{name}/{output}': width for name, encoder in self.encoders.items()
                    for output, width in encoder.widths(*size).items()}
    self.plan.check_outputs(self._widths, reference)
    self.encode = encoders.all_outputs(self.encoders, self.plan.outputs)
    self._encode_pictures = jax.jit(self.encode, out_shardings=sharding.replicated(mesh))
    self.variables = {name: sharding.place(encoder.variables, mesh, by_rule=False)
                      for name, encoder in self.encoders.items()}
    self._of_reference, self._held_out = self._reference_sums(), None
    if held_out is not None:
      self._held_out = self.sums(held_out.count)
      self.pass_over(held_out, self._held_out, 'held-out pictures')

  def sums(self, count: int, captions=None) -> Sums:
    """Empty ones, of samples, or, without captions, of held-out pictures."""
    kept = {name: self._widths[name] for name in self.plan.kept}
    logits = (self.plan.logits, self._widths[self.plan.logits]) if self.plan.logits else None
    beside = None
    if self._embed and captions:
      beside = self.plan.beside, lambda numbers: self._embed(captions(numbers))
    return Sums(count, self.plan.moments, kept, logits=logits, beside=beside)

  def pass_over(self, pictures: Pictures, sums: Sums, what: str) -> None:
    """Fills the sums."""
    if not sums.outputs:
      return
    step = functools.partial(self._encode_pictures, self.variables)
    with jax.set_mesh(self.mesh):
      sweep(step, lambda numbers: (pictures.read(numbers),), pictures.count, self.mesh, self.asked.batch_size, sums.add,
            what)

  def _reference_sums(self):
    if self.reference is None or not self.plan.compared:
      return None
    pictures = self.reference.pictures
    missing = {name for name in self.plan.moments if name not in self.reference.statistics}
    kept = {name: self._widths[name] for name in self.plan.kept}
    if not missing and not kept:
      return Sums(0)
    self.plan.check(pictures.count, 'the reference')
    numbers = {name: _chosen(pictures.count, CMMD_PICTURES if name == plans.CMMD else REFERENCE_PICTURES)
               for name in kept}
    if not missing:  # only the chosen ones are looked at
      looked_at = functools.reduce(np.union1d, numbers.values())
      pictures = pictures.part(looked_at)
      numbers = {name: np.searchsorted(looked_at, each) for name, each in numbers.items()}
    sums = Sums(pictures.count, missing, kept, numbers)
    self.pass_over(pictures, sums, 'reference')
    return sums

  def result(self, sums: Sums, described: dict, more: dict) -> dict[str, Any]:
    """The figures, and what repeats them."""
    figures = functools.partial(self.plan.figures, reference=self.reference, of_reference=self._of_reference,
                                mesh=self.mesh)
    found = {'metrics': figures(sums) | more}
    if self._held_out is not None:
      found['held_out'] = {'count': self._held_out.count} | figures(self._held_out)
      ratios = self.plan.ratios(found['metrics'], found['held_out'])
      found |= {key: value for key, value in ratios.items() if key == 'fd_ratio'}
      found['metrics'] |= {key: value for key, value in ratios.items() if key != 'fd_ratio'}
    held = sum(each.held_bytes for each in (sums, self._of_reference, self._held_out) if each)
    notes = self.plan.notes(sums, self._widths)
    if self._held_out is not None and self._held_out.count != sums.count:
      notes.append(f'{self._held_out.count:,} pictures are held out, the samples are {sums.count:,}: the fewer, the '
                   'larger a Frechet distance')
    height_and_width = {'resolution': self.asked.resolution} if self.asked.resolution else {}
    return found | {
      'samples': described | height_and_width,
      'reference': None if self.reference is None else self.reference.described | (
        {} if self.reference.pictures is None else {'count': self.reference.pictures.count}),
      'features': {name: encoder.described for name, encoder in self.encoders.items()},
      'how': self.plan.how(sums, self._of_reference),
      'notes': notes,
      'bytes_held_for_features': held,
      'versions': {'pagoda_jax': pagoda_jax.__version__, 'jax': jax.__version__, 'numpy': np.__version__},
    }


def _chosen(count: int, most: int) -> np.ndarray:
  """Numbers of pictures, ascending: all, or `most` that are drawn."""
  numbers = np.arange(count)
  return numbers if count <= most else np.sort(
    np.random.RandomState(SHUFFLE_SEED).choice(numbers, most, replace=False))


def can_keep(folder, name: str) -> bool:
  """Whether `write` can write the results of a phase: not to a run that others share, read-only. Makes their folder."""
  place = epath.Path(folder) / name / FOLDER
  if not place.parent.is_dir():
    return True  # there is no such phase yet, which whoever reads it says
  try:
    place.mkdir(exist_ok=True)
  except OSError:
    return False
  return buckets.is_in_bucket(place) or os.access(place, os.W_OK | os.X_OK)


def write(folder, result: dict) -> epath.Path:
  """Writes a phase's result beside its checkpoints, sealed; another request's stay, the same one's is replaced."""
  samples = result['samples']
  asked = {key: result[key] for key in ('samples', 'how')} | {'of': sorted(result['metrics'])}
  # Files are the same by their digests, wherever they lie and however their paths are written.
  placeless = lambda said: {key: value for key, value in (said or {}).items() if key != 'file'}
  asked |= {'reference': result['reference'] and placeless(result['reference']),
            'features': {name: placeless(said) for name, said in result['features'].items()}}
  mark = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
  path = epath.Path(folder) / samples['phase'] / FOLDER / f'step_{samples["step"]}_{mark}.json'
  if distributed.is_primary():
    write_sealed(path, result)
  return path


def table(result: dict) -> str:
  """The figures as lines, held-out pictures' beside the samples'."""
  held = result.get('held_out')
  lines = [f'{"":<22}{"samples":>12}' + (f'{"held out":>12}' if held else '')]
  rows = {'pictures': result['samples']['count'], **result['metrics']}
  others = {'pictures': held['count'], **held} if held else {}
  for name, value in rows.items():
    other = f'{_shown(others[name]):>12}' if name in others else ''
    lines.append(f'{name:<22}{_shown(value):>12}{other}')
  if 'fd_ratio' in result:
    lines.append(f'Frechet distances, samples / held out: {result["fd_ratio"]["mean"]:.4g} '
                 f'({", ".join(result["fd_ratio"]["of"])})')
  return '\n'.join(lines + [f'note: {note}' for note in result['notes']])


def _shown(value) -> str:
  return f'{value:,}' if isinstance(value, int) else f'{value:.5g}'
