"""Of a whole experiment, and of the networks that its phases share: the default and the range of every key."""

from ml_collections import ConfigDict

from pagoda_jax.config.ranges import (
  DEVICES,
  MATMUL_PRECISION,
  OMEGA,
  SIDE,
  STEPS,
  WIDTH,
  Range,
  each,
  flag,
  integer,
  number,
  one_of,
  text,
)
from pagoda_jax.config.tables import group, keys

LAWS = ('constant', 'uniform', 'truncated_normal')  # of the strength of guidance


@keys
def network():
  """The U-Net of the teacher, which the generator begins as a copy of (networks/unet.py explains each).

  For published weights, `pagoda convert` prints the values.
  """
  return {
    # EDM's ADM; 'guided': guided-diffusion's and PaGoDA's ADM; 'ddpmpp': EDM's DDPM++; 'edm2': EDM2's; 'deepfloyd':
    # DeepFloyd IF's first stage, which predicts noise
    'form': ('edm', one_of('edm', 'guided', 'ddpmpp', 'edm2', 'deepfloyd')),
    'channels': (192, integer('[2, 16_384]', multiple_of=2)),  # even: sines and cosines of the noise level
    'channel_mult': ((1, 2, 3, 4), each(number('(0, 64]'), 1, 10)),  # highest resolution first
    'decoder_channel_mult': ((), each(number('(0, 64]'), 0, 10)),  # (): channel_mult
    'stem_channels': (0, integer('[0, 16_384]')),  # of the first convolution; 0: as in the form's publications
    'embed_channels': (0, integer('[0, 65_536]')),  # of the noise level's and label's embedding; 0: 4 * channels
                                                    # ('edm2': of the widest level)
    'num_blocks': (3, integer('[1, 64]')),
    'attention_resolutions': ((32, 16, 8), each(SIDE)),
    'mid_attention': (True, flag),
    'num_heads': (0, integer('[0, 1024]')),  # 0: by channels_per_head ('ddpmpp': one)
    'channels_per_head': (64, WIDTH),
    # augmentation labels: as many as a teacher's augmentation has (9 of EDM's), or as published weights were trained
    # with; zero but in a teacher's training
    'augment_dim': (0, integer('[0, 1024]')),
    'dropout': (0.0, number('[0, 1)')),
    # Of captions (config.text). Where there is attention: 'cross', to their tokens after the picture's own; 'added_kv',
    # to both at once; 'none': captions join the embedding alone
    'text_attention': ('none', one_of('none', 'cross', 'added_kv')),
    'text_channels': (0, integer('[0, 65_536]')),  # that tokens are projected to for attention; 0: embed_channels
    # the embedding gets what so many heads of attention make of the tokens; 0: the encoder's vector of the caption
    'text_pool_heads': (0, integer('[0, 1024]')),
  }


@keys
def autoencoder_network():
  """The autoencoder of latent space, diffusers' AutoencoderKL; for published weights `pagoda convert` prints this.

  Each level but the first halves a side: four give latents of an eighth of the picture's side.
  """
  return {
    # folder of `pagoda convert`, or `weights` in that of a phase of stage 'autoencoder'; needed in latent space
    'weights': ('', text),
    'sha256': ('', text),  # of its numbers; '': those that are there when the run begins, which it then holds to
    'channels': (4, integer('[1, 256]')),  # of the latents
    'widths': ((128, 256, 512, 512), each(WIDTH, 1, 10)),
    'blocks': (2, integer('[1, 64]')),
    'groups': (32, integer('[1, 1024]')),
    'quant_conv': (True, flag),
    'post_quant_conv': (True, flag),
    'mid_attention': (True, flag),
    # What networks see is (latent - shift) * scaling, of unit variance. 0: both as the folder has them.
    'scaling': (0.0, number('[0, 1e6]')),
    'shift': (0.0, number('[-1e6, 1e6]')),
  }


@keys
def experiment():
  """A config with every top-level default and no phases yet."""
  return {
    'seed': (0, integer('[0, 4_294_967_295]')),
    'order': ((), each(text)),
    'data': {
      # array_record: what `pagoda prepare` writes
      'source': ('mnist', one_of('mnist', 'folder', 'array_record', 'tfds', 'webdataset')),
      # the folder; webdataset: of tars, one tar, or a pattern such as data/*.tar; tfds: its data_dir, '': the default
      'path': ('', text),
      'name': ('', text),  # tfds: the data set, such as imagenet2012 or imagenet2012:5.1.0
      'split': ('train', text),  # tfds: which of its splits; the held-out images come out of it too
      'resolution': (32, SIDE),  # the largest resolution that any phase reaches
      # how smaller pictures come of larger ones: 'cut', each from the original, as the published teachers and the FID
      # references have it; 'haar', as the Haar LL band of the picture at `resolution`, halved a level (data/README.md)
      'downsampling': ('cut', one_of('cut', 'haar')),
      'channels': (3, one_of(1, 3)),  # grey or RGB
      'num_classes': (0, integer('[-1, 1_000_000]')),  # 0: unconditional; -1: as many as the source has
      'mirror': (True, flag),  # whether a mirror image is as good an image (not so for digits)
      'holdout': (0, integer('[0, 10_000_000]')),  # images kept out of training, for evaluation
      # processes that decode and resize; 0: in the training process; -1: for folder, webdataset and what is read from
      # a bucket, as many as cores can be spared
      'workers': (-1, integer('[0, 256]', also=-1)),
      # folder, webdataset: share of pictures that may be unreadable; they are listed and left out
      'max_unreadable': (0.01, number('[0, 1]')),
      'verify': (False, flag),  # array_record: compare every shard with its checksum before training
    },
    # what networks see and make: pictures, or latents of `autoencoder`, whose sides all resolutions are then
    'space': ('pixel', one_of('pixel', 'latent')),
    'autoencoder': group(autoencoder_network),
    'base_resolution': (64, SIDE),
    'network': group(network),
    'weights_dir': ('', text),  # folder of published files, looked in before $PAGODA_WEIGHTS and the user cache
    'diffusion': {
      'sigma_min': (0.002, number('(0, 5000]')),
      'sigma_max': (80.0, number('(0, 5000]')),  # noise is stored as float16 too, which ends at 65504
      'sigma_data': (0.5, number('(0, 100]')),
      'rho': (7.0, number('[0.1, 100]')),
    },
    # The strength omega of classifier-free guidance that pictures are inverted with, and that generators take as an
    # input: drawn for each picture. 1 is none; without a law ('none') networks know nothing of it.
    'guidance': {
      'law': ('none', one_of('none', *LAWS)),
      'mean': (1.0, OMEGA),  # of 'constant', and of 'truncated_normal' before it is cut
      'std': (1.0, number('(0, 100]')),  # of 'truncated_normal' before it is cut
      'low': (1.0, OMEGA),  # of 'uniform' and 'truncated_normal'
      'high': (4.0, OMEGA),
      # Of pictures that are shown with a caption written anew, the same keys: where `law` is '', the others' is theirs
      'recaptions': {
        'law': ('', one_of('', *LAWS)),
        'mean': (1.0, OMEGA),
        'std': (1.0, number('(0, 100]')),
        'low': (1.0, OMEGA),
        'high': (4.0, OMEGA),
      },
    },
    # Captions, instead of labels: what embeds them (networks/text/README.md), and the sizes of what it gives.
    'text': {
      # clip:FOLDER or t5:FOLDER of published weights, ngrams (nothing downloaded), module:function of your own;
      # '': no text
      'encoder': ('', text),
      'length': (77, integer('[1, 4096]')),  # tokens; longer captions are truncated
      'width': (768, WIDTH),  # of a token's embedding
      'pooled_width': (768, WIDTH),  # of the vector of the whole caption
      # SHA-256 of the encoder (weights, tokenizer, length) that made the embeddings; '': the store's, whichever
      'sha256': ('', text),
    },
    'phases': ({}, Range('a group of phases', lambda value: isinstance(value, ConfigDict))),
    'precision': ('float32', one_of('float32', 'bfloat16')),
    # How many ways a batch is split: fsdp splits parameters, moments and averages too, zero1 moments and averages
    # alone (ZeRO's first stage). -1: all remaining devices
    'mesh': {'data': (-1, DEVICES), 'fsdp': (1, DEVICES), 'zero1': (1, DEVICES)},
    # Four keys that change memory and time, not results; a run can go on with others.
    # most images that a device trains on at once; 0: its whole share of batch_size. Phases may have their own
    'microbatch': (0, integer('[0, 1_000_000]')),
    # resolutions of U-Net blocks whose activations are computed again in the backward pass
    'remat': ((), each(SIDE)),
    # how attention is computed, in U-Nets and feature networks: networks/attention.py
    'attention': ('auto', one_of('auto', 'xla', 'cudnn', 'flash')),
    'shard_frozen': (False, flag),  # feature networks: split by the mesh's fsdp axis, not whole on every device
    # seconds that any host waits for another before it ends with a message naming it
    'barrier_timeout': (1800, integer('[1, 1_000_000]')),
    'checkpoint': {
      'every_steps': (1000, STEPS),
      'keep': (3, integer('[1, 1_000_000]')),  # the latest ones
      'keep_every': (0, integer('[0, 1_000_000_000]')),  # also those of steps that this divides; 0: none besides
      'best': ('', text),  # also the best by a metric of metrics.jsonl, such as 'loss': by its mean since the last save
      'best_mode': ('min', one_of('min', 'max')),
    },
    'log': {
      'every_steps': (50, STEPS),
      'samples_every': (1000, STEPS),
      'samples': (64, integer('[1, 10_000]')),
      'batches': (False, flag),  # also writes which pictures each step saw, in their order, to batches.jsonl
    },
    # What the end-of-run summary measures of each phase's samples; 0 samples: nothing.
    'evaluation': {
      'samples': (0, integer('[2, 1_000_000]', also=0)),
      'components': (32, integer('[1, 4096]')),
      'guidance': ((), each(OMEGA, 0, 10)),  # strengths to measure teacher and generators at besides
      # of all images drawn, in sample grids, by `pagoda sample`, and by a teacher for a phase that learns from them
      'matmul_precision': ('highest', MATMUL_PRECISION),
    },
  }
