"""Text to image in one step at 64, 128, 256 and 512 px, from a teacher that never saw more than 64.

  pagoda prepare --source=webdataset:data/captions --output=data/captioned512 --resolutions=64,128,256,512 \\
    --text_encoder=experiments.encoders.t5_and_clip:embed --text_length=77
  pagoda run --config=experiments/text_64_to_512.py:published --workdir=runs/text

Variants, after the colon, with commas between them:

  published      no teacher is trained: `invert`, `guide` and `distill` start from DeepFloyd IF's first stage, L (0.9 B
                 parameters; its licence is for research only, and to be accepted on its page)
  stop=64        ends at 64 px (or 128 or 256) instead of 512

Before the first run:

1. `data/captions`: tars of pictures beside .txt or .json, which may have captions written anew ("recaption").
   The paper: CC12M, captions as found and by LLaVA-7B given those.
2. `weights/t5_v1_1_xxl` and `weights/clip_vit_l14`: the published folders of T5 v1.1 XXL and CLIP ViT-L/14
   (transformers' form, tokenizers beside). Embeddings take 631 kB a caption: 15 TB of 12 M pictures with two each.
3. Where `pagoda weights list` looks: dino_vits16, clip_vit_l14, vgg16, lpips_vgg.
4. published: `pagoda convert --input=deepfloyd_if_i_l --output=weights/deepfloyd_if_i_l`, once.

Then `pagoda sample --workdir=runs/text --prompts="a red flag;a smiling cat" --guidance=5`.

Every value has its source beside it: "paper" is Kim et al. 2024, "not said" what it leaves open. Where this is not the
paper's run:

- The paper compares pairs of CC12M and judges by other pictures, COYO-700M's of CLIP score > 32 and aesthetic score
  > 5. Here one data set is for both losses.
- Its estimator of omega sees the outer product of CLIP's embeddings of picture and caption, as 64 x 64 numbers; this
  one sees the picture, and the caption as the teacher does.
- Its AdamW has moments of 8 bits, these have 32. optax has none; of JAX packages only flashoptim-jax (0.1.0, one
  release, March 2026) keeps such, in Triton kernels for one NVIDIA GPU, not split over devices, and not as an optimiser
  of optax. Split over `fsdp` as the parameters are, they take 0.9 GB a device.
- IF computes in float16; D = x - sigma n in bfloat16 is off by 0.4 % of sigma before `clip_denoised` cuts it.

`pagoda plan --num_images=12000000`: memory of a device, a step, and chip-hours in all

              --topology=v5e-256              --topology=8xh100
  teacher     6.0 GB   372 ms   16,100 h      6.0 GB  3.30 s   4,470 h
  invert      6.5 GB  14.2 s     2,960 h      6.1 GB  2.26 s     940 h
  guide       1.9 GB   657 ms      467 h      2.3 GB  3.15 s      70 h
  distill     5.0 GB   297 ms    1,900 h      7.8 GB  1.05 s     210 h
  grow_128    2.6 GB   165 ms    1,050 h      5.1 GB  698 ms     140 h
  grow_256    3.2 GB   175 ms    1,120 h      5.4 GB  825 ms     165 h
  grow_512    5.9 GB   273 ms    1,750 h     17.1 GB  1.72 s     344 h

h: hours of one chip. published: without the first row, 9,250 h and 1,870 h. State split 8 ways (`fsdp`), four images a
device at once (the teacher 16), the U-Net's blocks at 64 and 32 px computed again in the backward pass. Inversion has
16 pictures a chip at once (H100: 8), each with and without its caption, on whole copies of the teacher.
"""

from pagoda_jax import config as c
from pagoda_jax.config import ladder

TEACHER = 'weights/deepfloyd_if_i_l'
LEVELS = (64, 128, 256, 512)
VARIANTS = ('published,stop=64',)


def get_config(variant: str = ''):
  """`variant`: '' or some of published, stop=64, joined by commas."""
  chosen, stop = ladder.variant_options(variant, ('published',), LEVELS)
  config = c.experiment(base_resolution=64)
  config.data.update({
    'source': 'array_record', 'path': 'data/captioned512', 'resolution': stop, 'channels': 3, 'num_classes': 0,
    'mirror': False,  # not said; captions tell left from right, and pictures have writing
    'workers': 16})
  config.text.update({
    'encoder': 'experiments.encoders.t5_and_clip:embed',  # IF: T5-XXL; the discriminator's: CLIP (paper)
    'length': 77, 'width': 4096,  # IF's
    'pooled_width': 768})  # CLIP ViT-L/14's
  # The paper's teacher: IF's first stage of 0.9 B parameters, which is its L (deepfloyd/IF's unet/config.json).
  config.network = c.network(form='deepfloyd', channels=320, channel_mult=(1, 2, 3, 4), num_blocks=3,
                             attention_resolutions=(32, 16, 8), channels_per_head=64, text_attention='added_kv',
                             text_channels=1280, text_pool_heads=64)
  # The paper: captions as they were found, omega ~ U[2, 10]; written anew, omega ~ N(2, 3) cut to [1, 10]. Whether 3
  # is the variance or the deviation is not said.
  config.guidance.update({'law': 'uniform', 'low': 2.0, 'high': 10.0})
  config.guidance.recaptions.update({'law': 'truncated_normal', 'mean': 2.0, 'std': 3.0, 'low': 1.0, 'high': 10.0})
  config.precision = 'bfloat16'  # not said
  config.microbatch = 4
  config.mesh.fsdp = 8
  config.shard_frozen = True
  config.remat = (64, 32)
  teacher = {'teacher': '', 'init_from': TEACHER}
  if 'published' not in chosen:
    # As EDM trains on ImageNet (Karras et al. 2022, appendix F); nothing is known of IF's training but its data.
    # The same sizes, as EDM's denoiser: to predict noise is IF's form, and no better.
    config.network.update({'form': 'guided', 'dropout': 0.1})
    c.add_phase(config, 'teacher', c.teacher(
      steps=610_000, batch_size=4096, microbatch=16, label_dropout=0.1,  # 0.1 of captions dropped: usual
      optimizer=c.optimizer(name='adam', learning_rate=1e-4, warmup_steps=10_000_000 // 4096),
      ema_halflife=(50e6,)))
    teacher = {'teacher': 'teacher'}
  # 40 levels: as on ImageNet (paper). float16: 25 kB a pair.
  c.add_phase(config, 'invert', c.invert(**teacher, batch_size=64, num_levels=40, dtype='float16'))
  # Steps, batch and learning rate are not said.
  c.add_phase(config, 'guide', c.guide(
    **teacher, steps=10_000, batch_size=256, optimizer=c.optimizer(name='adam', learning_rate=1e-4)))
  players = {
    'noise': 'invert',
    'guide': 'guide',
    'steps': 90_000,  # not said; the release's 64 px ImageNet generator is from about here
    'batch_size': 256,  # paper
    # Paper: AdamW with moments of 8 bits, 1e-5 for both, no weight decay, which makes it Adam
    'optimizer': c.optimizer(name='adam', learning_rate=1e-5),
    'discriminator_optimizer': c.optimizer(name='adam', learning_rate=1e-5),
    'ema': 0.0,  # paper: none
    'reconstruction': c.reconstruction(distance='lpips'),  # paper
    'discriminator': c.discriminator(features='dino'),  # paper: StyleGAN-T's, told of text and omega
  }
  clip = 0.2  # paper: CLIP ViT-L/14's distance regularises; by how much is not said, and this is a beginning
  c.add_phase(config, 'distill', c.distill(
    **teacher, **players, adversarial=c.adversarial(weight=4.0, clip_weight=clip)))  # paper: 4 x the adaptive ratio
  start = 'distill'
  for side in LEVELS[1:]:
    if side <= stop:
      # As the paper grows on ImageNet: 192 channels, two blocks, the highest level thaws, a weight of 1. What differs
      # for text is not said.
      c.add_phase(config, f'grow_{side}', c.grow(
        start=start, resolution=side, channels=192, num_blocks=2,
        adversarial=c.adversarial(weight=1.0, adaptive=False, clip_weight=clip), **players))
      start = f'grow_{side}'
  return config
