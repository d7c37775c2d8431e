"""Which networks and sums a list of metrics needs, what it cannot have, and the figures that come of them."""

import dataclasses
import functools

from pagoda_jax.evaluation.metrics import frechet, kid, precision_recall
from pagoda_jax.evaluation.pictures import EvaluationError
from pagoda_jax.evaluation.sums import SHUFFLE_SEED, SPLIT, Sums

METRICS = ('fid', 'sfid', 'is', 'precision_recall', 'kid', 'fd_dinov2', 'psnr', 'lpips')
OF_DATA = ('fid', 'is', 'precision_recall', 'kid')  # that --features=data has too, under names of their own
PAIRED = ('psnr', 'lpips')
COMPARED = ('fid', 'sfid', 'precision_recall', 'kid', 'fd_dinov2')  # with a reference
FRECHET = ('fid', 'fd_dinov2', 'fd_data')
NEIGHBOUR = 3
_CLIP = 'and this package has no CLIP: compute it elsewhere, from `pagoda sample --out=x.npz`'
ABSENT = {
  'cmmd': f'needs the image encoder of CLIP ViT-L/14 at 336 px, {_CLIP}',
  'clip': f'needs the image and text encoders of CLIP, {_CLIP}',
  'fdr6': 'is a mean over six encoders, and this package has two of them, Inception-v3 and DINOv2 ViT-L/14: '
          '--metrics=fid,fd_dinov2 gives the ratios of these to held-out data, as fd_ratio',
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is computed; `main` is the encoder of FID, IS, KID, precision and recall."""

  metrics: tuple[str, ...]
  main: str

  @property
  def encoders(self) -> list[str]:
    of_main = {*OF_DATA, 'sfid'} & {*self.metrics}
    return ([self.main] if of_main else []) + (['dinov2'] if 'fd_dinov2' in self.metrics else [])

  @property
  def moments(self) -> tuple[str, ...]:
    of = {'fid': f'{self.main}/features', 'sfid': f'{self.main}/spatial', 'fd_dinov2': 'dinov2/features'}
    return tuple(of[name] for name in self.metrics if name in of)

  @property
  def kept(self) -> tuple[str, ...]:
    return (f'{self.main}/features',) if {'precision_recall', 'kid'} & {*self.metrics} else ()

  @property
  def logits(self) -> str:
    return f'{self.main}/logits' if 'is' in self.metrics else ''

  @property
  def outputs(self) -> set[str]:
    return {*self.moments, *self.kept, *filter(None, [self.logits])}

  @property
  def compared(self) -> bool:
    return bool({*COMPARED} & {*self.metrics})

  @property
  def paired(self) -> tuple[str, ...]:
    return tuple(name for name in self.metrics if name in PAIRED)

  @property
  def needs_samples(self) -> bool:
    return bool(self.outputs)

  def check(self, count: int, whose: str) -> None:
    """Refuses too few pictures, before any is looked at."""
    if 'precision_recall' in self.metrics and count <= NEIGHBOUR:
      raise EvaluationError(f'precision_recall looks for the neighbour number {NEIGHBOUR} of every picture, and '
                            f'{whose} are {count}: {NEIGHBOUR + 1} or more are needed')
    if count < 2 and self.compared:
      raise EvaluationError(f'{whose} are {count}: a covariance needs two pictures or more')

  def check_outputs(self, widths: dict[str, int], reference) -> None:
    """Refuses what an encoder does not give, and statistics of other features than the encoder's."""
    if self.logits and self.logits not in widths:
      raise EvaluationError('--metrics=is: the Inception Score is of classes, and the data has no labels')
    for name in self.moments if reference is not None else ():
      if name in reference.statistics and len(reference.statistics[name][0]) != widths[name]:
        raise EvaluationError(f'{reference.described["file"]}: statistics of {len(reference.statistics[name][0])} '
                              f'features, and {name} are {widths[name]}: of another network')
      if name not in reference.statistics and reference.pictures is None:
        raise EvaluationError(f'{reference.described["file"]}: holds no pictures, and statistics of '
                              f'{", ".join(reference.statistics)} only, not of {name}')
    if self.kept and reference.pictures is None:
      asked = [name for name in self.metrics if name in ('precision_recall', 'kid')]
      raise EvaluationError(f'{" and ".join(asked)} compare features of single pictures, and '
                            f'{reference.described["file"]} holds statistics only; leave {", ".join(asked)} out of '
                            '--metrics, or give a reference with pictures')

  def figures(self, sums: Sums, reference, of_reference, mesh) -> dict[str, float]:
    """Name -> value of all that is of one set of pictures against the reference."""
    found, data = {}, self.main == 'data'
    named = lambda name: f'{name}_data' if data else name
    for metric in self.metrics:
      if metric in ('fid', 'sfid', 'fd_dinov2'):
        output = dict(zip([m for m in self.metrics if m in ('fid', 'sfid', 'fd_dinov2')], self.moments))[metric]
        there = reference.statistics.get(output) or of_reference.moments(output)
        found['fd_data' if data and metric == 'fid' else metric] = frechet.frechet_distance(
          *sums.moments(output), *there)
      elif metric == 'is':
        found |= {named(name): value for name, value in sums.scores().items()}
      elif metric == 'precision_recall':
        features, others = sums.kept[self.kept[0]], of_reference.kept[self.kept[0]]
        values = precision_recall.precision_recall(others, features, NEIGHBOUR, distances=_distances(mesh))
        found |= dict(zip((named('precision'), named('recall')), values))
      elif metric == 'kid':
        features, others = sums.kept[self.kept[0]], of_reference.kept[self.kept[0]]
        found |= dict(zip((named('kid'), named('kid_std')), kid.kid(features, others)))
    return found

  def how(self, sums: Sums, of_reference) -> dict:
    """JSON values that tell how the figures were computed, beyond the encoders."""
    found, others = {}, len(of_reference.kept[self.kept[0]]) if self.kept else 0
    if 'is' in self.metrics:
      found['is'] = {'logits': 'without bias', 'images_of_a_split': SPLIT, 'order': 'as drawn or listed',
                     'seed_of_is_shuffled': SHUFFLE_SEED} if self.main != 'data' else {'images_of_a_split': SPLIT}
    if 'precision_recall' in self.metrics:
      found['precision_recall'] = {'k': NEIGHBOUR, 'reference_pictures': others, 'distances': 'float32'}
    if 'kid' in self.metrics:
      size = kid.subset_size(sums.count, others)
      found['kid'] = {'subsets': kid.SUBSETS, 'images_of_a_subset': size, 'seed': kid.SEED,
                      'reference_pictures': others, 'kernel': '(x y / C + 1)^3'}
    return found

  def notes(self, sums: Sums, widths: dict[str, int]) -> list[str]:
    """What a reader should know before believing a figure."""
    found = [f'{sums.count:,} pictures, fewer than the {widths[name]:,} {name}: the covariance is singular, and the '
             'distance larger than that of many' for name in self.moments if sums.count <= widths[name]]
    if 'is' in self.metrics and sums.count % SPLIT:
      found.append(f'is: {sums.count:,} pictures are no whole number of splits of {SPLIT:,}')
    return found


@functools.lru_cache(maxsize=1)
def _distances(mesh):
  return precision_recall.on_devices(mesh)


def make(text: str, features: str, reference, pairs: bool, dinov2: bool) -> Plan:
  """The plan of --metrics.

  Args:
    text: names, with commas; '' takes the default report: FID beside precision, recall, KID and, where its file is
      here, FD-DINOv2; with no reference the Inception Score.
    features: 'inception' or 'data'.
    reference: what is compared with; None.
    pairs: whether each sample has a picture that it should be.
    dinov2: whether DINOv2's file is here.

  Raises:
    EvaluationError: a name is not known, not to be had, or not with these features or without a reference.
  """
  if not text:
    if reference is None:
      names = ('is',)
    else:
      names = tuple(name for name in ('fid', 'precision_recall', 'kid', 'fd_dinov2') if _is_default(
        name, features, reference, dinov2))
  else:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(',')))
  for name in names:
    if name in ABSENT:
      raise EvaluationError(f'--metrics: {name} {ABSENT[name]}')
    if name not in METRICS:
      raise EvaluationError(f'--metrics: no metric {name!r}; there are {", ".join(METRICS)}')
    if features == 'data' and name == 'sfid':
      raise EvaluationError("--metrics: sfid is of Inception's maps; with --features=data there are "
                            f'{", ".join(OF_DATA)}')
    if reference is None and (name in COMPARED or name in PAIRED):
      raise EvaluationError(f'--metrics: {name} compares with something: give --reference')
    if name in PAIRED and not pairs:
      raise EvaluationError(f'--metrics: {name} is of pairs: a generator has those of its training noise and the '
                            'pictures it was inverted from, a teacher has none')
  if features == 'data' and reference is None:
    raise EvaluationError('--features=data: learns from the pictures of a reference: give --reference')
  return Plan(names, features)


def _is_default(name, features, reference, dinov2):
  statistics, drawn = reference.statistics, reference.pictures is not None
  if name == 'fd_dinov2':
    return features == 'inception' and dinov2 and (drawn or 'dinov2/features' in statistics)
  if name == 'fid':
    return features == 'data' or drawn or 'inception/features' in statistics
  return drawn
