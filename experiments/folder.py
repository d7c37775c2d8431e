"""Your own folder of images, at resolutions of your choice, for one GPU of 12 GB or more.

  pagoda run --config=experiments/folder.py:base=16,target=64 --config.data.path=photos --workdir=runs/photos

The part after the colon: `base` is the teacher's resolution (default 16), `target` the last one (default
64), base times 2, 4, 8, ...; `labels=no` trains without classes. They stand there, not in --config keys,
because how many growth phases there are follows from them: --config.base_resolution and
--config.data.resolution are refused where they contradict the phases.

The folder: one sub-folder a class (classes are found by themselves), or no sub-folders, or a captions.jsonl.
Unreadable files are listed and left out. Large folders train faster after `pagoda prepare`: then set
--config.data.source=array_record --config.data.path=OUTPUT.

Steps suit about ten thousand pictures; teacher 100 k steps at batch 128, each generator 30 k at batch 32.

`pagoda plan --config=experiments/folder.py --topology=v5e-4 --aot --config.data.num_classes=10 --num_images=10000`:
XLA's compiler for TPU v5e, per phase the FLOPs per image as written (compiled), HBM per chip in all (arguments,
temporary, program), what a chip sends in a step, and the seconds of the compilation on two busy cores:

  teacher   10.2 G (10.2 G)    991 MB (495, 358, 138)    108 MB of all-reduce   383 s
  invert     264 G  (265 G)    262 MB (124,  99,  40)    nothing                 80 s
  distill   23.8 G (24.0 G)   1277 MB (501, 603, 173)    219 MB of all-reduce   502 s
  grow_32   29.1 G (29.2 G)    493 MB (213, 165, 116)     47 MB of all-reduce   553 s
  grow_64   75.3 G (75.8 G)    614 MB (271, 216, 127)     71 MB of all-reduce   570 s

258 PFLOP and 1.6 chip-hours in all, by the plan. Teacher at 16 px: 31.1x fewer FLOPs per image than at 64 px (17.7x
without its attention).
"""

from pagoda_jax import config as c

VARIANTS = ('base=4,target=8', 'base=64,target=512,labels=no')  # that tests/test_experiments.py runs too
DEFAULTS = {'base': '16', 'target': '64', 'labels': 'yes'}


def parse_variant(variant: str) -> tuple[int, int, bool]:
  """(base resolution, target resolution, whether classes are used) of 'base=16,target=64,labels=no'.

  Raises:
    ConfigError: an option that does not exist, or a resolution that is not base times 2, 4, 8, ...
  """
  options = dict(DEFAULTS)
  for part in filter(None, variant.split(',')):
    key, _, value = part.partition('=')
    if key not in options:
      raise c.ConfigError(f'folder.py:{variant}: {part!r} must be one of base=16, target=64, labels=yes or labels=no')
    options[key] = value
  base, target = (int(options[key]) if options[key].isdecimal() else 0 for key in ('base', 'target'))
  if base < 4 or base & (base - 1):
    raise c.ConfigError(f'folder.py:{variant}: base={options["base"]} must be 4, 8, 16, 32, 64, ...')
  if target <= base or target & (target - 1):
    raise c.ConfigError(f'folder.py:{variant}: target={options["target"]} must be base = {base} times 2, 4, 8, ...')
  if options['labels'] not in ('yes', 'no'):
    raise c.ConfigError(f'folder.py:{variant}: labels={options["labels"]} must be yes or no')
  return base, target, options['labels'] == 'yes'


def get_config(variant: str = ''):
  """`variant`: such as 'base=16,target=64,labels=no'."""
  base, target, labels = parse_variant(variant)
  config = c.experiment(base_resolution=base)
  config.data.update({'source': 'folder', 'path': 'images', 'resolution': target, 'num_classes': -1 if labels else 0,
                      'holdout': 0})
  # Down to 4 or 8 px, with attention at 16 and 8 as in the ADM networks: 20 to 40 M parameters.
  levels = {4: 1, 8: 2, 16: 3, 32: 3}.get(base, 4)
  config.network = c.network(channels=128, channel_mult=(1, 2, 2, 2)[:levels], num_blocks=2,
                             attention_resolutions=(16, 8),
                             # The dropout and augmentation that EDM was published with on AFHQv2, the smallest of its
                             # data sets (16 thousand pictures): the teacher's alone, a generator trains without.
                             dropout=0.25, augment_dim=9)
  config.precision = 'bfloat16'
  config.checkpoint.update({'every_steps': 2000, 'keep': 3})
  config.log.update({'every_steps': 100, 'samples_every': 2000, 'samples': 64})

  c.add_phase(config, 'teacher', c.teacher(
    steps=100_000, batch_size=128,
    # EDM's half-life on small sets, which in the first 10 M images is a twentieth of those seen so far.
    ema_halflife=(500_000,), ema_rampup=0.05,
    augmentation=c.augmentation(rate=0.15),
    optimizer=c.optimizer(name='adam', learning_rate=2e-4, warmup_steps=1000)))
  c.add_phase(config, 'invert', c.invert(batch_size=256))
  players = {
    'steps': 30_000,
    'batch_size': 32,
    'optimizer': c.optimizer(learning_rate=5e-5),
    'discriminator_optimizer': c.optimizer(learning_rate=2e-4),
    # Its smallest picture has 4 px or more.
    'discriminator': c.discriminator(conditional=labels, scales=2 if base > 4 else 1),
  }
  c.add_phase(config, 'distill', c.distill(**players))
  start, resolution = 'distill', base
  while resolution < target:
    resolution *= 2
    name = f'grow_{resolution}'
    # Half as wide where the maps are large, as in the published ladder to 512 px.
    channels = 128 if resolution <= 128 else 64
    c.add_phase(config, name, c.grow(start=start, resolution=resolution, channels=channels, **players))
    start = name
  return config
