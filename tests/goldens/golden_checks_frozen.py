"""Golden checks of augmentation, losses, resizing and metrics (pagoda_losses, resize, inception_fid)."""

import re

import golden_tools
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pagoda_jax.data import resize
from pagoda_jax.evaluation.metrics import frechet, inception_score, precision_recall
from pagoda_jax.method import augment, losses
from pagoda_jax.networks.frozen.projections import NORMALIZATION, ProjectedFeatures


def cases():
  """Yields (id, check)."""
  for file, checks in (('pagoda_losses', loss_checks), ('resize', resize_checks), ('inception_fid', metric_checks)):
    if golden_tools.exists(file):
      yield from ((name, golden_tools.in_float32(check)) for name, check in checks(*golden_tools.load(file)))


def loss_checks(arrays, meta):
  for name in meta:
    if name.startswith('diffaug'):
      yield f'losses-{name}', lambda name=name: check_diff_augment(name)
  yield 'losses-preprocessing', check_preprocessing
  yield 'losses-resize224', check_resize_224
  yield 'losses-hinge', check_hinge
  yield 'losses-projected-distance', check_projected_distance
  yield 'losses-adaptive-weight-values', check_adaptive_weight_values
  yield 'losses-weightings', check_weightings


def resize_checks(arrays, meta):
  for name in arrays.files:
    if name.startswith('torch/'):
      yield f'resize-{name}', lambda name=name: check_torch_resize(name)
    elif name.startswith('pil'):
      yield f'resize-{name}', lambda name=name: check_pil_resize(name)


def metric_checks(arrays, meta):
  yield 'metrics-frechet', check_frechet
  yield 'metrics-inception-score', check_inception_score
  yield 'metrics-precision-recall', check_precision_recall


def golden_augmentation(name):
  """(images NHWC, DiffAugment parameters) of one entry."""
  arrays, _ = golden_tools.load('pagoda_losses')
  params = {key: jnp.asarray(arrays[f'{name}/{key}']).ravel() for key in ('brightness', 'saturation', 'contrast')}
  for ours, theirs in (('translation', 'translation'), ('cutout', 'offset')):
    params[ours] = jnp.stack([jnp.asarray(arrays[f'{name}/{theirs}_{axis}'], jnp.int32).ravel() for axis in 'xy'], -1)
  return golden_tools.nhwc(arrays[f'{name}/x']), params


def check_diff_augment(name):
  arrays, _ = golden_tools.load('pagoda_losses')
  images, params = golden_augmentation(name)
  for last, key in enumerate(augment.POLICY):
    reference = arrays[f'{name}/out' if key == 'cutout' else f'{name}/after_{key}']
    out = augment.apply(images, {key: params[key] for key in augment.POLICY[: last + 1]})
    np.testing.assert_allclose(golden_tools.nchw(out), reference, rtol=0, atol=2e-6)


def check_preprocessing():
  """Augmented, normalised and resized images, as they enter the two backbones."""
  arrays, meta = golden_tools.load('pagoda_losses')
  name = max((key for key in meta if key.startswith('diffaug')), key=lambda key: arrays[f'{key}/x'].shape[-1])
  images, params = golden_augmentation(name)
  images = augment.apply(images, params)
  for backbone, kind in (('deit', 'deit'), ('effnet', 'efficientnet_lite')):
    net = ProjectedFeatures(None, *NORMALIZATION[kind], input_size=meta['preproc_shape'][-1])
    out = golden_tools.nchw(net.apply({}, images, method='preprocessed'))
    assert list(out.shape) == meta['preproc_shape']
    corner = arrays[f'preproc/{backbone}_corner']
    golden_tools.assert_close(out[:, :, ::16, ::16], arrays[f'preproc/{backbone}_slice'], 1e-5, backbone)
    # Absolute, since translation may have left the corner black.
    np.testing.assert_allclose(out[0, :, : corner.shape[1], : corner.shape[2]], corner, rtol=0, atol=1e-5)


def check_resize_224():
  arrays, _ = golden_tools.load('pagoda_losses')
  out = golden_tools.nchw(resize.resize(golden_tools.nhwc(arrays['resize224/x']), 224))
  corner = arrays['resize224/corner']
  np.testing.assert_allclose(out[:, :, ::16, ::16], arrays['resize224/slice'], rtol=0, atol=2e-6)
  np.testing.assert_allclose(out[0, :, : corner.shape[1], : corner.shape[2]], corner, rtol=0, atol=2e-6)


def check_hinge():
  arrays, _ = golden_tools.load('pagoda_losses')
  real, fake = arrays['gan/logits_real'], arrays['gan/logits_fake']
  np.testing.assert_allclose(losses.hinge_discriminator(real, fake), arrays['gan/d_loss'], rtol=1e-5)
  np.testing.assert_allclose(losses.hinge_generator(fake), arrays['gan/g_loss'], rtol=1e-5)


def check_projected_distance():
  arrays, _ = golden_tools.load('pagoda_losses')
  names = sorted(name for name in arrays.files if name.startswith('recon/est/'))
  est = [golden_tools.nhwc(arrays[name]) for name in names]
  tar = [golden_tools.nhwc(arrays[name.replace('/est/', '/tar/')]) for name in names]
  reference = arrays['recon/distance_per_sample']
  golden_tools.assert_close(losses.projected_distance(est, tar), reference, 1e-5)


def check_adaptive_weight_values():
  """The weight from the golden's own norms; golden_checks_adaptive takes the norms from a generator."""
  arrays, _ = golden_tools.load('pagoda_losses')
  rec, adv = arrays['adapt/grad_norm1'], arrays['adapt/grad_norm2']
  unclipped = {'low': 0, 'high': 1e4}
  for expected, weight in (
      ('weight_raw', losses.adaptive_weight(rec, adv, **unclipped)),
      ('weight_raw_given_norm', losses.adaptive_weight(0.37, adv, **unclipped)),
      ('weight_clipped', losses.adaptive_weight(rec, adv)),
      ('weight_clipped_small_loss2', losses.adaptive_weight(rec, adv * 1e-4)),
      ('weight_clipped_large_loss2', losses.adaptive_weight(rec, adv * 1e5)),
  ):
    np.testing.assert_allclose(weight, arrays[f'adapt/{expected}'], rtol=1e-5, err_msg=expected)


def check_weightings():
  arrays, meta = golden_tools.load('pagoda_losses')
  snr = arrays['weightings/snr']
  kinds = [name.split('/')[1] for name in arrays.files if name.startswith('weightings/')]
  assert len(kinds) > 1
  for kind in kinds:
    ours = losses.weighting(snr, kind.replace('snr_plus_1', 'snr+1'), meta['sigma_data'])
    np.testing.assert_allclose(ours, arrays[f'weightings/{kind}'], rtol=1e-5, err_msg=kind)


def golden_images():
  """The image that the resize goldens start from, NHWC in [-1, 1]."""
  arrays, _ = golden_tools.load('resize')
  return arrays['img_uint8'].astype(np.float32) / 127.5 - 1


def check_torch_resize(name):
  arrays, _ = golden_tools.load('resize')
  _, mode, variant = name.split('/')
  images, size = golden_images(), arrays[name].shape[-1]
  if match := re.fullmatch(r'(\d+)_to_\d+', variant):
    crop = int(match[1])
    images = images[:, :crop, :crop]
  method = next(m for m in (*resize.METHODS, 'avgpool') if m in mode)
  kwargs = {
      'method': 'area' if method == 'avgpool' else method,
      'antialias': mode.endswith('_aa'),
      'centers': 'align_corners' if 'align_corners' in mode else 'half_pixel',
  }
  while variant.startswith('chain') and images.shape[1] > 2 * size:
    images = resize.resize(images, images.shape[1] // 2, **kwargs)
  out = resize.resize(images, size, **kwargs)
  np.testing.assert_allclose(golden_tools.nchw(out), arrays[name], rtol=0, atol=2e-6)


def check_pil_resize(name):
  """Pillow itself, as data preparation uses it; of its float results those that `resize` can do as well."""
  arrays, _ = golden_tools.load('resize')
  kind, filter_name, variant = name.split('/')
  size, images = arrays[name].shape[1], arrays['img_uint8']
  resample = Image.Resampling[filter_name.upper()]
  if kind == 'pil_float':
    out = np.stack([[_float_resized(image[..., c], size, resample) for c in range(3)] for image in images])
    np.testing.assert_allclose(golden_tools.nhwc(out), arrays[name], rtol=0, atol=1e-4)
    method = {'box': 'area', 'lanczos': None}.get(filter_name, filter_name)
    if method and images.shape[1] % size == 0:
      ours = resize.resize(jnp.asarray(images, jnp.float32), size, method, antialias=method != 'area')
      np.testing.assert_allclose(ours, arrays[name], rtol=0, atol=1e-3)
    return
  for image, reference in zip(images, arrays[name]):
    image = Image.fromarray(image)
    while variant.startswith('chain') and image.width > 2 * size:
      image = image.resize((image.width // 2, image.height // 2), resample)
    difference = np.abs(np.asarray(image.resize((size, size), resample)).astype(int) - reference)
    power_of_two = (images.shape[1] // size).bit_count() == 1 and images.shape[1] % size == 0
    assert difference.max() <= (0 if filter_name == 'box' and power_of_two else 1)
    if filter_name == 'box' and variant.startswith('chain') and power_of_two:
      cropped = np.asarray(resize.center_crop_adm(Image.fromarray(images[0]), size))
      np.testing.assert_array_equal(cropped, arrays[name][0])


def _float_resized(channel, size, resample):
  return np.asarray(Image.fromarray(channel.astype(np.float32)).resize((size, size), resample))


def check_frechet():
  arrays, meta = golden_tools.load('inception_fid')
  real, fake = arrays['metrics/feat_real'], arrays['metrics/feat_fake']
  moments = [frechet.mean_and_covariance(features) for features in (real, fake)]
  for name, (mean, _) in zip(('real', 'fake'), moments):
    np.testing.assert_allclose(mean, arrays[f'metrics/mu_{name}'], rtol=0, atol=1e-7)
  np.testing.assert_allclose(frechet.frechet_distance(*moments[0], *moments[1]), arrays['metrics/fid'], rtol=1e-6)
  rows = meta['rank_deficient']
  few = [frechet.mean_and_covariance(x[: rows[n]]) for x, n in ((real, 'n_real'), (fake, 'n_fake'))]
  distance = frechet.frechet_distance(*few[0], *few[1])
  np.testing.assert_allclose(distance, arrays['metrics/fid_rank_deficient'], rtol=1e-6)


def check_inception_score():
  arrays, _ = golden_tools.load('inception_fid')
  for name in arrays.files:
    if match := re.fullmatch(r'metrics/inception_score_splits(\d+)', name):
      score = inception_score.inception_score(arrays['metrics/is_probs'], int(match[1]))
      np.testing.assert_allclose(score, arrays[name], rtol=1e-6, atol=1e-12)


def check_precision_recall():
  arrays, _ = golden_tools.load('inception_fid')
  real, fake = arrays['metrics/feat_real'], arrays['metrics/feat_fake']
  for name in arrays.files:
    if match := re.fullmatch(r'metrics/prec_recall_k(\d+)', name):
      # A small block, so that the last one is not full.
      assert precision_recall.precision_recall(real, fake, int(match[1]), block=64) == tuple(arrays[name])
    if match := re.fullmatch(r'metrics/radii_(real|fake)_k(\d+)', name):
      radii = precision_recall.neighbour_radii({'real': real, 'fake': fake}[match[1]], int(match[2]), block=64)
      np.testing.assert_allclose(radii, arrays[name], rtol=1e-6)
