"""Which networks and sums a list of metrics needs, what it cannot have, and the figures that come of them."""

import dataclasses
import functools

from pagoda_jax.evaluation import representations
from pagoda_jax.evaluation.metrics import cmmd, frechet, kid, precision_recall
from pagoda_jax.evaluation.pictures import EvaluationError
from pagoda_jax.evaluation.sums import SHUFFLE_SEED, SPLIT, Sums

METRICS = ('fid', 'sfid', 'is', 'precision_recall', 'kid', 'cmmd', 'fd_dinov2', 'fdr6', 'clip', 'psnr', 'lpips')
OF_DATA = ('fid', 'is', 'precision_recall', 'kid')  # that --features=data has too, under names of their own
PAIRED = ('psnr', 'lpips')
COMPARED = ('fid', 'sfid', 'precision_recall', 'kid', 'cmmd', 'fd_dinov2', 'fdr6')  # with a reference
FRECHET = ('fd_dinov2', 'fd_data', *representations.SIX)
NEIGHBOUR = 3
CMMD, CLIP = 'clip_336/features', 'clip/features'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is computed; `main` is the encoder of FID, IS, KID, precision and recall, `six` the figures of FDr6 whose
  encoders are here."""

  metrics: tuple[str, ...]
  main: str
  six: tuple[str, ...] = ()

  @property
  def encoders(self) -> list[str]:
    """Their names, each once."""
    return list(dict.fromkeys(output.split('/')[0] for output in (
      *filter(None, [self.logits]), *self.kept, *self.moments, *filter(None, [self.beside]))))

  @property
  def frechets(self) -> dict[str, str]:
    """Figure -> the output whose Frechet distance it is."""
    of = {'fid': f'{self.main}/features', 'sfid': f'{self.main}/spatial', 'fd_dinov2': 'dinov2/features'}
    six = self.six if 'fdr6' in self.metrics else ()
    return {name: of[name] for name in self.metrics if name in of} | {
      name: f'{representations.SIX[name]}/features' for name in six}

  @property
  def moments(self) -> tuple[str, ...]:
    return tuple(self.frechets.values())

  @property
  def of_main(self) -> str:
    """The output that precision, recall and KID compare; '' without these."""
    return f'{self.main}/features' if {'precision_recall', 'kid'} & {*self.metrics} else ''

  @property
  def kept(self) -> tuple[str, ...]:
    return tuple(filter(None, [self.of_main, CMMD if 'cmmd' in self.metrics else '']))

  @property
  def beside(self) -> str:
    return CLIP if 'clip' in self.metrics else ''

  @property
  def logits(self) -> str:
    return f'{self.main}/logits' if 'is' in self.metrics else ''

  @property
  def outputs(self) -> set[str]:
    return {*self.moments, *self.kept, *filter(None, [self.logits, self.beside])}

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
      asked = [name for name in self.metrics if name in ('precision_recall', 'kid', 'cmmd')]
      raise EvaluationError(f'{" and ".join(asked)} compare features of single pictures, and '
                            f'{reference.described["file"]} holds statistics only; leave {", ".join(asked)} out of '
                            '--metrics, or give a reference with pictures')

  def figures(self, sums: Sums, reference, of_reference, mesh) -> dict[str, float]:
    """Name -> value of all that is of one set of pictures against the reference."""
    found, data = {}, self.main == 'data'
    named = lambda name: f'{name}_data' if data else name
    for name, output in self.frechets.items():
      there = reference.statistics.get(output) or of_reference.moments(output)
      found['fd_data' if data and name == 'fid' else name] = frechet.frechet_distance(*sums.moments(output), *there)
    of = lambda output: (sums.kept[output], of_reference.kept[output])
    for metric in self.metrics:
      if metric == 'is':
        found |= {named(name): value for name, value in sums.scores().items()}
      elif metric == 'precision_recall':
        features, others = of(self.of_main)
        values = precision_recall.precision_recall(others, features, NEIGHBOUR, distances=_distances(mesh))
        found |= dict(zip((named('precision'), named('recall')), values))
      elif metric == 'kid':
        found |= dict(zip((named('kid'), named('kid_std')), kid.kid(*of(self.of_main))))
      elif metric == 'cmmd':
        found['cmmd'] = cmmd.cmmd(*of(CMMD), distances=_distances(mesh))
      elif metric == 'clip' and self.beside in sums.outputs:
        found['clip'] = sums.mean_cosine
    return found

  def ratios(self, of_samples: dict[str, float], held_out: dict[str, float]) -> dict:
    """What Frechet distances are as shares of held-out pictures' own: JSON values for 'fd_ratio' and, as `fdr6`, the
    mean over the six encoders, or fewer, which is called by their number."""
    over = {name: of_samples[name] / held_out[name] for name in of_samples
            if name in FRECHET and held_out.get(name, 0) > 0}
    if not over:
      return {}
    mean = lambda names: sum(over[name] for name in names) / len(names)
    six = [name for name in self.six if name in over] if 'fdr6' in self.metrics else []
    return {'fd_ratio': {'of': over, 'mean': mean(over)}} | ({f'fdr{len(six)}': mean(six)} if six else {})

  def how(self, sums: Sums, of_reference) -> dict:
    """JSON values that tell how the figures were computed, beyond the encoders."""
    found, others = {}, len(of_reference.kept[self.of_main]) if self.of_main else 0
    if 'is' in self.metrics:
      found['is'] = {'logits': 'without bias', 'images_of_a_split': SPLIT, 'order': 'as drawn or listed',
                     'seed_of_is_shuffled': SHUFFLE_SEED} if self.main != 'data' else {'images_of_a_split': SPLIT}
    if 'precision_recall' in self.metrics:
      found['precision_recall'] = {'k': NEIGHBOUR, 'reference_pictures': others, 'distances': 'float32'}
    if 'kid' in self.metrics:
      size = kid.subset_size(sums.count, others)
      found['kid'] = {'subsets': kid.SUBSETS, 'images_of_a_subset': size, 'seed': kid.SEED,
                      'reference_pictures': others, 'kernel': '(x y / C + 1)^3'}
    if 'cmmd' in self.metrics:
      found['cmmd'] = {'kernel': f'exp(-d^2 / (2 * {cmmd.SIGMA:g}^2))', 'times': cmmd.SCALE, 'estimate': 'biased',
                       'reference_pictures': len(of_reference.kept[CMMD])}
    if 'clip' in self.metrics:
      found['clip'] = 'mean cosine of a picture and its caption'
    if 'fdr6' in self.metrics:
      found['fdr6'] = {'of': list(self.six), 'over': 'held-out pictures'}
    return found

  def notes(self, sums: Sums, widths: dict[str, int]) -> list[str]:
    """What a reader should know before believing a figure."""
    found = [f'{sums.count:,} pictures, no more than the {widths[name]:,} {name}: the covariance is singular, and the '
             'distance larger than that of many' for name in self.moments if sums.count <= widths[name]]
    if 'fdr6' in self.metrics and len(self.six) < len(representations.SIX):
      found.append(f'fdr6 is of six encoders, fdr{len(self.six)} of those that are here: there is no '
                   f'{representations.lacking(self.six)}')
    if 'is' in self.metrics and sums.count % SPLIT:
      found.append(f'is: {sums.count:,} pictures are no whole number of splits of {SPLIT:,}')
    return found


@functools.lru_cache(maxsize=1)
def _distances(mesh):
  return precision_recall.on_devices(mesh)


def make(text: str, features: str, reference, pairs: bool, here=(), captions: bool = False) -> Plan:
  """The plan of --metrics.

  Args:
    text: names, with commas; '' takes the default report: FID beside precision, recall, KID and, where its file is
      here, FD-DINOv2; with no reference the Inception Score.
    features: 'inception' or 'data'.
    reference: what is compared with; None.
    pairs: whether each sample has a picture that it should be.
    here: the figures of representations.SIX whose encoders are here; with that of DINOv2 FD-DINOv2 is in the report.
    captions: whether each sample has a caption that it should be.

  Raises:
    EvaluationError: a name is not known, not to be had, or not with these features or without a reference.
  """
  if not text:
    if reference is None:
      names = ('is',)
    else:
      names = tuple(name for name in ('fid', 'precision_recall', 'kid', 'fd_dinov2') if _is_default(
        name, features, reference, 'fd_dinov2_256' in here))
      if not names:  # else a result without a figure
        raise EvaluationError(f'--metrics: of the default report nothing is compared with statistics of '
                              f'{", ".join(reference.statistics)} alone, or with the weights that are here; name what '
                              f'is to be measured, of {", ".join(METRICS)}')
  else:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(',')))
  for name in names:
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
  if 'clip' in names and not captions:
    raise EvaluationError('--metrics: clip compares pictures with their captions, and there are none: a folder has '
                          'them in captions.jsonl, an .npz of `pagoda sample --prompts` in `prompt`, a run in its '
                          'data')
  if 'fdr6' in names and (features == 'data' or reference.held_out is None):
    raise EvaluationError('--metrics: fdr6 is the mean of Frechet distances over those of held-out pictures '
                          + ('by six encoders, not by --features=data' if features == 'data' else
                             'of the same data, and there are none: it is of a run with config.data.holdout'))
  if 'fdr6' in names and not here:
    raise EvaluationError(f'--metrics: fdr6: none of its encoders is here: {representations.lacking(())}')
  if features == 'data' and reference is None:
    raise EvaluationError('--features=data: learns from the pictures of a reference: give --reference')
  return Plan(names, features, tuple(here))


def _is_default(name, features, reference, dinov2):
  statistics, drawn = reference.statistics, reference.pictures is not None
  if name == 'fd_dinov2':
    return features == 'inception' and dinov2 and (drawn or 'dinov2/features' in statistics)
  if name == 'fid':
    return features == 'data' or drawn or 'inception/features' in statistics
  return drawn
