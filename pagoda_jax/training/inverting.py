"""The loop of the `invert` phase: each host inverts its share of the shards on its own devices.

Hosts do not talk to each other: a shard is a fixed range of keys, so any number of hosts, restarted at
any time, go on at the first shard that is not there.
"""

import contextlib
import io
import json
import time

import jax
import numpy as np
from absl import logging
from etils import epath

from pagoda_jax import config as configs
from pagoda_jax.config import spaces
from pagoda_jax.data import noise_store
from pagoda_jax.data import stream as streams
from pagoda_jax.method import diffusion, guidance
from pagoda_jax.runtime import distributed, lock, randomness, sharding
from pagoda_jax.runtime.files import replacing
from pagoda_jax.runtime.interrupts import Interrupted
from pagoda_jax.runtime.progress import Progress
from pagoda_jax.stages import encode, invert, models
from pagoda_jax.stages import sampler as sampling
from pagoda_jax.training import checkpoints, grids, logs, starts, workdir

# Below this the noise is far from the prior N(0, sigma_max^2) that the generator will be asked with.
SMALLEST_RELATIVE_STD = 0.9
# Of an inverter's results on a mesh, split as the batch is: on a slice, the devices of one host cannot always exchange
# among themselves.
RESULTS = sharding.batch_sharding


def origin(config, name: str, params) -> dict:
  """What a store was made from: a generator phase refuses a store whose origin differs from its own config's."""
  phase, d = config.phases[name], config.data
  made_by = noise_store.ENCODER if phase.encoder else noise_store.TEACHER
  return {
    made_by: checkpoints.digest(params),
    'source': d.source,
    'data_sha256': streams.pictures_digest(d, {config.base_resolution}),
    'holdout': d.holdout,
    'mirror': d.mirror,
    'resolution': config.base_resolution,
    'channels': spaces.image_channels(config),
    'matmul_precision': phase.matmul_precision,
    'seed': config.seed,
  } | _road_in_words(config, phase) | _law_in_words(config) | _latents_in_words(config) | (
    {'text_sha256': config.text.sha256} if configs.has_text(config) else {})


def _road_in_words(config, phase) -> dict:
  """How the network makes noise of pictures, and of which pictures where they are not cut from the originals."""
  band = {'downsampling': config.data.downsampling} if streams.band_of(config.data) else {}
  if phase.encoder:
    return band | {'solver': 'an encoder'}
  return band | {
    'solver': 'heun, clipped' if phase.clip_denoised else 'heun',
    'add_noise': f'of random numbers {randomness.INVERSION}' if phase.add_noise else False,
    'levels': [phase.num_levels, *sampling.schedule(config).values()],
  }


def _latents_in_words(config) -> dict:
  """{} of pictures, so that a store from before latent space stays what it was."""
  if not spaces.is_latent(config):
    return {}
  network = config.autoencoder
  return {'autoencoder': [network.sha256, spaces.factor(config), float(network.scaling), float(network.shift)]}


def _law_in_words(config) -> dict:
  """{} without guidance, so that a store from before it stays what it was."""
  if not configs.has_guidance(config):
    return {}
  used = {'constant': ('mean',), 'uniform': ('low', 'high'), 'truncated_normal': ('mean', 'std', 'low', 'high')}
  words = lambda law: [law.law, *(float(law[key]) for key in used[law.law])]
  kinds = words(config.guidance.recaptions) if configs.has_law_of_recaptions(config) else []
  return {'guidance': [*words(config.guidance), randomness.GUIDANCE, *kinds]}


def check_store(config, folder, noise_phase: str) -> dict:
  """Refuses a store that another teacher, encoder, data set or resolution made; returns the parameters of the network
  that makes its noise.

  Raises:
    NoiseStoreError: names what differs.
  """
  store = epath.Path(folder) / noise_phase
  params, _ = starts.read_start(config, folder, noise_phase)
  noise_store.check_origin(noise_store.read_manifest(store), origin(config, noise_phase, params), store)
  return params


def make_inverter(config, name: str):
  """invert(params, batch, null=None) -> noise, as phase `name` inverts: for its store, or inside a train step."""
  phase, networks = config.phases[name], models.build(config, name)
  if phase.encoder:
    encoded = encode.make_invert_step(networks)
    step = lambda params, batch, rng, null=None: encoded(params, batch, null)
  else:
    levels = diffusion.sigmas(phase.num_levels, **sampling.schedule(config))
    step = invert.make_invert_step(networks, levels, phase.clip_denoised, phase.add_noise)
  step, omega_of_keys = models.at_matmul_precision(phase.matmul_precision, step), make_omega_of_keys(config)

  def invert_batch(params, batch, null=None):
    if omega_of_keys and 'omega' not in batch:
      batch = batch | {'omega': omega_of_keys(batch['key'], batch.get('caption_kind'))}
    return step(params, batch, randomness.key_for(config.seed, randomness.INVERSION), null)

  return invert_batch


def make_omega_of_keys(config):
  """omega_of_keys(int32 [B], kinds=None) -> float32 [B]: the strength that each picture is inverted with, where there
  are laws for them by its caption's kind; None without guidance."""
  law = models.law_of(config)
  key = lambda: randomness.key_for(config.seed, randomness.GUIDANCE)
  return law and (lambda keys, kinds=None: law.of_pictures(key(), keys, kinds))


def null_text(config) -> dict:
  """{'null_text': the embeddings of the empty caption}, as train steps are given them; {} without captions."""
  return {'null_text': streams.open_source(config.data).null_text()} if configs.has_text(config) else {}


def run_phase(config, folder, name: str, stop, max_steps: int | None = None) -> None:
  """Inverts every training picture (and mirror image) and the held-out ones of the sample grids.

  Without a store, the held-out ones only.

  Args:
    config, folder, name: experiment, work directory, phase.
    stop: the interrupts.StopRequest of the run.
    max_steps: for smoke runs: inverts the first max_steps batches of pictures only.

  Raises:
    HostsError: another host does not write its shards.
    Interrupted: asked to stop; finished shards stay.
  """
  folder = epath.Path(folder)
  phase, store = config.phases[name], folder / name
  mesh = sharding.make_mesh(devices=jax.local_devices())
  params, where = starts.read_start(config, folder, name)
  if phase.init_from:
    distributed.say(f'{name}: inverts with {where}')
  source, keys = streams.source_keys(config.data)
  layout = noise_store.make_layout(workdir.target(config, name, max_steps), phase.shard_size)
  made_from = origin(config, name, params)
  with jax.set_mesh(mesh), contextlib.ExitStack() as exits:
    exits.callback(distributed.rest)  # whichever way it ends: then it waits for the others
    solve = Solver(config, name, params, mesh)
    if distributed.is_primary():
      distributed.work_alone(f'{name}: held-out pictures')
      _write_holdout(config, name, store, solve, made_from)
    if not phase.store:
      if distributed.is_primary():
        _close_without_store(config, store, layout.count, name, made_from)
      return
    load = streams.LoadPicture(source, keys, config.base_resolution, config.data.channels,
                               text=configs.has_text(config), drawn=streams.sampling(config),
                               band_of=streams.band_of(config.data))
    done = distributed.from_primary(
      f'{name}: shards', lambda: noise_store.finished_shards(store, layout, made_from))
    left = [shard for shard in range(layout.num_shards) if shard not in done]
    if done and left:
      names = [layout.name(shard) for shard in left[:8]] + ['...'] * (len(left) > 8)
      distributed.say(f'{name}: {len(done)} of {layout.num_shards} shards are there; makes {", ".join(names)}')
    mine = left[jax.process_index() :: jax.process_count()]
    count, pairs = 0, sum(len(layout.keys(shard)) for shard in mine)
    there = sum(len(layout.keys(shard)) for shard in done)
    progress = Progress(name, pairs, unit='pair' if not distributed.several() else 'pair of this host')
    with contextlib.closing(logs.MetricLog(store, there, json.loads(workdir.as_json(config)))) as log:
      for number, shard in enumerate(mine):
        noise, omegas = [], []
        for start in range(0, len(layout.keys(shard)), solve.batch_size):
          _leave_if_asked(stop, name, f'{number} of the {len(mine)} shards written that were left to this process')
          distributed.work_alone(f'{name}: {layout.name(shard)}')
          records = [load(key) for key in layout.keys(shard)[start : start + solve.batch_size]]
          solved = solve({part: np.stack([r[part] for r in records]) for part in records[0]})
          noise.append(solved['noise'])
          omegas.append(solved.get('omega'))
          count += len(records)
          progress.update(count, len(records), {'std': float(noise[-1].std())}, force=count == pairs)
        values = np.concatenate(noise).astype(phase.dtype)
        _check_finite(values, layout.keys(shard), name)
        lock.confirm()
        strengths = None if omegas[0] is None else np.concatenate(omegas)
        noise_store.write_shard(store, layout, shard, values, made_from, strengths)
        log.write(there + count, {
          'kimg': (there + count) / 1000, 'epochs': round((there + count) / len(keys), 4),
          'mean': float(values.mean(dtype=np.float64)), 'std': float(values.std(dtype=np.float64))} | progress.rates())
  if distributed.is_primary():
    _wait_for_shards(config, store, layout, made_from, left, name, stop)
    distributed.work_alone(f'{name}: {noise_store.MANIFEST}')
    _close(config, store, layout, name, made_from)
    distributed.rest()
  if distributed.several():
    _end_together(name, stop)


def _end_together(name, stop):
  """Returns when process 0 has closed the store; where a stop is asked for meanwhile, all leave or all go on."""
  end = f'{name}/end'
  if distributed.is_primary():
    distributed.put(end, 'closed')
  while not (agreed := distributed.look(end)):  # the first word that was put there
    if stop.wanted_alone(name):
      distributed.put(end, 'left')
    else:
      time.sleep(1)
  if agreed == 'left':
    _leave_if_asked(stop, name, 'all shards of this process written')


def _leave_if_asked(stop, name, standing):
  if stop.wanted_alone(name):
    raise Interrupted(f'{name}: stopped with {standing}; start the same command again to go on', stop.exit_code)


def _check_finite(noise, keys, name):
  bad = [key for key, value in zip(keys, noise) if not np.isfinite(value).all()]
  if bad:
    raise noise_store.NoiseStoreError(f'{name}: the noise of {len(bad)} of {len(noise)} pictures is not finite, first '
                                     f'that of key {bad[0]}: the network that made it cannot be used')


class Solver:
  """Inverts [N, R, R, C] uint8 images of any N in batches of one size: one compilation."""

  def __init__(self, config, name, params, mesh, null=None):
    self.batch_size = -(-config.phases[name].batch_size // mesh.size) * mesh.size
    self._mesh = mesh
    self._params = sharding.place(params, mesh)
    self._null = sharding.place(null_text(config), mesh).get('null_text') if null is None else null
    self._step = jax.jit(make_inverter(config, name), out_shardings=RESULTS(mesh))
    omega_of_keys = make_omega_of_keys(config)
    self._omegas = omega_of_keys and jax.jit(omega_of_keys, out_shardings=RESULTS(mesh))

  def __call__(self, pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """'noise' [N, R, R, C], and with guidance the 'omega' [N] that it was inverted with.

    Of pictures 'image', 'label' and 'key' are read, and with captions what texts.TextStore.text has; 'omega', where it
    is given, takes the place of the laws' draws.
    """
    out = []
    wanted = ('image', 'label', 'key', 'omega', *guidance.TEXT, 'caption_kind')
    pictures = {part: np.asarray(rows) for part, rows in pictures.items() if part in wanted}
    count = len(pictures['image'])
    for start in range(0, count, self.batch_size):
      part = slice(start, start + self.batch_size)
      missing = self.batch_size - len(range(count)[part])
      batch = {name: np.pad(rows[part], [(0, missing), *[(0, 0)] * (rows.ndim - 1)]) for name, rows in pictures.items()}
      batch |= {name: batch[name].astype(np.int32) for name in ('label', 'key')}
      batch = sharding.place_batch(batch, self._mesh)
      found = {}
      if self._omegas:  # what is stored is what the pictures are inverted with, to the last bit
        if 'omega' not in batch:
          batch['omega'] = self._omegas(batch['key'], batch.get('caption_kind'))
        found['omega'] = batch['omega']
      found['noise'] = self._step(self._params, batch, self._null)
      out.append({name: np.asarray(values)[: self.batch_size - missing] for name, values in found.items()})
    return {name: np.concatenate([part[name] for part in out]) for name in out[0]}


def _write_holdout(config, name, store, solve, made_from):
  """A few held-out pictures (training ones where nothing is held out) with their noise, for the sample grids."""
  path, mark = store / noise_store.HOLDOUT_FILE, noise_store.origin_mark(made_from)
  if path.exists() and noise_store.read_holdout(store)['origin'] == mark:
    return
  small, labels = streams.epoch_pictures(
    config.data, config.base_resolution, *grids.held_out(config), streams.sampling(config))
  buffer = io.BytesIO()
  # Keys past those of the training pictures, so that no noise is drawn twice.
  keys = len(streams.source_keys(config.data)[1]) + np.arange(len(small))
  solved = solve({'image': small, 'label': labels, 'key': keys} | grids.held_out_text(config))
  _check_finite(solved['noise'], keys, name)
  np.savez(buffer, label=labels, origin=mark, **solved)
  lock.confirm()
  with replacing(path) as file:
    file.write(buffer.getbuffer())


def _wait_for_shards(config, store, layout, made_from, left, name, stop):
  """Returns when the other hosts' shards are there; raises HostsError where none of them gets on for a while.

  A shard may take longer than that: each host tells of every batch.
  """
  before, since = None, time.monotonic()
  while len(done := noise_store.finished_shards(store, layout, made_from)) < layout.num_shards:
    _leave_if_asked(stop, name, f'{len(done)} of {layout.num_shards} shards written')
    if (now := (len(done), distributed.begun_alone())) != before or distributed.compiling():
      before, since = now, time.monotonic()
    if time.monotonic() - since > config.barrier_timeout:
      late = sorted({place % jax.process_count() for place, shard in enumerate(left) if shard not in done})
      raise distributed.HostsError(f'{name}: no new batch for {config.barrier_timeout} s; missing are shards of '
                                   f'process {", ".join(map(str, late))}. See its log.')
    time.sleep(1 + jax.process_count() / 100)  # a thousand would ask the folder and process 0 a thousand times a second


def _close(config, store, layout, name, made_from):
  """Writes the manifest."""
  lock.confirm()
  shape = (config.base_resolution, config.base_resolution, spaces.image_channels(config))
  manifest = noise_store.write_manifest(store, layout, shape, config.phases[name].dtype, made_from)
  _judge(config, name, f'{layout.count} pairs', manifest['mean'], manifest['std'])


def _close_without_store(config, store, count, name, made_from):
  """Writes the manifest that later phases check; `count` pairs are theirs to invert."""
  noise = noise_store.read_holdout(store)['noise']
  lock.confirm()
  noise_store.write_promise(store, count, made_from)
  print(f'{name}: nothing is stored; the phases that read {name} invert inside their steps', flush=True)
  _judge(config, name, f'{len(noise)} held-out pictures', noise.mean(), noise.std())


def _judge(config, name, what, mean, std):
  """Says how near the noise is to the prior."""
  sigma_max = config.diffusion.sigma_max
  print(f'{name}: {what}, noise of mean {mean:.2f} and standard deviation {std:.2f} (the prior: 0 and {sigma_max:g})',
        flush=True)
  if std < SMALLEST_RELATIVE_STD * sigma_max:
    remedy = ', or set standardize_noise = True in the phases that read this noise' if config.phases[name].store else ''
    network = config.phases[name].encoder or 'the teacher'
    logging.warning('%s: the inverted noise is narrower than the prior: %s is under-trained. '
                    'Train it longer%s.', name, network, remedy)
