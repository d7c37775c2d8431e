"""The published files that this package knows: what each is, where it comes from, under what licence.

`sha256` is the whole digest where the publisher gives it or it could be computed from the publisher's
own repository, the leading digits where the publisher puts them into the file name (as PyTorch's model
zoos do), and empty otherwise: then the digest of the first file used is recorded (see locate.py).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
  """One published file.

  Attributes:
    name: how `pagoda weights` and configs call it.
    what: one line on what it is.
    page: where its publisher describes it.
    file_name: what to save it as.
    licence: its publisher's licence, and limits on use besides.
    url: direct address; '' where it must be picked out on the page, where it may have another name.
    format: `pagoda convert --format` for it; '' where it is not converted.
    size: in bytes; 0 where unknown.
    sha256: hex digits, possibly only the leading ones; '' where unknown.
    non_commercial: a warning is due when it is loaded.
    kind: 'teacher' or 'generator'; '' for what is neither.
    resolution: side in pixels of its input, where the file does not tell; 0 otherwise.
    scaling: of an autoencoder's latents, by which they have unit variance.
  """

  name: str
  what: str
  page: str
  file_name: str
  licence: str
  url: str = ''
  format: str = ''
  size: int = 0
  sha256: str = ''
  non_commercial: bool = False
  kind: str = ''
  resolution: int = 0
  scaling: float = 0.0


# (channels, channel_mult) of PaGoDA's networks -> side of their input, which nothing in a file tells. All have
# attention on every level but the first.
INPUT_OF_WIDTHS = {(256, (1, 2, 4)): 32, (192, (1, 2, 3, 4)): 64}


def _openai_reference(resolution: int, file_name: str, note: str = '') -> Published:
  return Published(
    name=f'adm_reference_{resolution}',
    what=f'ImageNet {resolution} px reference batch and statistics of the ADM evaluation{note}',
    page='https://github.com/openai/guided-diffusion/tree/main/evaluations',
    url=f'https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{resolution}/{file_name}',
    file_name=file_name,
    licence='MIT; images: ImageNet, for non-commercial research',
    non_commercial=True,
  )


def _edm(data: str, what: str) -> Published:
  return Published(
    name=f'edm_{data}'.replace('-', '_'),
    what=what,
    page='https://github.com/NVlabs/edm#pre-trained-models',
    url=f'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-{data}.pkl',
    file_name=f'edm-{data}.pkl',
    licence='CC BY-NC-SA 4.0',
    format='edm',
    non_commercial=True,
    kind='teacher',
  )


def _edm2(size: str, thousand_images: str, std: str) -> Published:
  return Published(
    name=f'edm2_img64_{size}',
    what=f'EDM2-{size.upper()}, ImageNet 64 px, class-conditional; average of std {std}, the best FID of its size',
    page='https://github.com/NVlabs/edm2#using-pre-trained-models',
    url=f'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img64-{size}-{thousand_images}-{std}.pkl',
    file_name=f'edm2-img64-{size}-{thousand_images}-{std}.pkl',
    licence='CC BY-NC-SA 4.0',
    format='edm2',
    non_commercial=True,
    kind='teacher',
  )


def _pagoda(name: str, what: str) -> Published:
  kind, resolution = name.split('_')[:2]
  return Published(
    name=f'pagoda_{name}',
    what=what,
    page='https://drive.google.com/drive/folders/1tlm_DwPWcIIfF3s9qm_fHOeUjENTSOKx',
    file_name=f'pagoda_{name}.pt',
    licence='MIT',
    format='pagoda',
    kind=kind,
    resolution=int(resolution),
  )


def _deepfloyd(size: str, parameters: str) -> Published:
  return Published(
    name=f'deepfloyd_if_i_{size}',
    what=f"DeepFloyd IF-I-{size.upper()} v1.0: text to 64 px, {parameters} parameters, in diffusers' form; texts as "
    'T5-XXL has them, 77 tokens',
    page=f'https://huggingface.co/DeepFloyd/IF-I-{size.upper()}-v1.0',
    url=f'https://huggingface.co/DeepFloyd/IF-I-{size.upper()}-v1.0/resolve/main/unet/'
    'diffusion_pytorch_model.safetensors',
    file_name=f'deepfloyd_if_i_{size}.safetensors',
    licence='DeepFloyd IF licence, to be accepted on the page: research only',
    format='deepfloyd',
    non_commercial=True,
    kind='teacher',
    resolution=64,
  )


REGISTRY: tuple[Published, ...] = (
  Published(
    name='edm_imagenet64_ema',
    what="EDM teacher, ImageNet 64 px, 296 M parameters, of the Consistency Models release: the paper's 64 px teacher",
    page='https://github.com/openai/consistency_models#pre-trained-models',
    url='https://openaipublic.blob.core.windows.net/consistency/edm_imagenet64_ema.pt',
    file_name='edm_imagenet64_ema.pt',
    licence='MIT; model card: not for commercial deployment',
    format='pagoda',
    non_commercial=True,
    kind='teacher',
    resolution=64,
  ),
  _edm('imagenet-64x64-cond-adm', 'EDM, ImageNet 64 px, class-conditional, ADM network'),
  _edm('cifar10-32x32-cond-vp', 'EDM, CIFAR-10 32 px, class-conditional, DDPM++ network'),
  _edm('cifar10-32x32-uncond-vp', 'EDM, CIFAR-10 32 px, unconditional, DDPM++ network'),
  _edm('afhqv2-64x64-uncond-vp', 'EDM, AFHQ-v2 64 px, unconditional, DDPM++ network'),
  _edm('ffhq-64x64-uncond-vp', 'EDM, FFHQ 64 px, unconditional, DDPM++ network'),
  _edm2('s', '1073741', '0.075'),
  _edm2('m', '2147483', '0.060'),
  _edm2('l', '1073741', '0.040'),
  _edm2('xl', '0671088', '0.040'),
  _deepfloyd('xl', '4.3 B'),
  _deepfloyd('l', '0.9 B'),
  _deepfloyd('m', '0.4 B'),
  _pagoda('teacher_32', 'PaGoDA stage 1: ImageNet 32 px diffusion model'),
  _pagoda('teacher_64', 'PaGoDA stage 1: ImageNet 64 px diffusion model'),
  _pagoda('generator_32', 'PaGoDA stage 2: one-step generator, ImageNet 32 px'),
  _pagoda('generator_64', 'PaGoDA stage 2: one-step generator, ImageNet 64 px'),
  _pagoda('generator_64_to_128', 'PaGoDA stage 3: one-step generator grown to 128 px'),
  _pagoda('generator_64_to_256', 'PaGoDA stage 3: one-step generator grown to 256 px'),
  _pagoda('generator_64_to_512', 'PaGoDA stage 3: one-step generator grown to 512 px'),
  Published(
    name='tf_efficientnet_lite0',
    what='EfficientNet-lite0, ImageNet-1k: feature network of the projected discriminator',
    page='https://github.com/huggingface/pytorch-image-models/releases/tag/v0.1-weights',
    url='https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/'
    'tf_efficientnet_lite0-0aa007d2.pth',
    file_name='tf_efficientnet_lite0-0aa007d2.pth',
    licence='Apache-2.0',
    format='timm',
    sha256='0aa007d2',
  ),
  Published(
    name='deit_base_distilled_patch16_224',
    what='DeiT-base distilled, ImageNet-1k, 224 px: feature network of the projected discriminator',
    page='https://github.com/facebookresearch/deit',
    url='https://dl.fbaipublicfiles.com/deit/deit_base_distilled_patch16_224-df68dfff.pth',
    file_name='deit_base_distilled_patch16_224-df68dfff.pth',
    licence='Apache-2.0',
    format='timm',
    sha256='df68dfff',
  ),
  Published(
    name='dino_vits16',
    what="DINO ViT-S/16, ImageNet-1k without labels, 224 px: feature network of StyleGAN-T's discriminator",
    page='https://github.com/facebookresearch/dino#pretrained-models',
    url='https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth',
    file_name='dino_deitsmall16_pretrain.pth',
    licence='Apache-2.0',
    format='timm',
  ),
  Published(
    name='clip_vit_l14',
    what="CLIP ViT-L/14, both towers, in transformers' form: similarity of pictures and captions (clip_weight)",
    page='https://huggingface.co/openai/clip-vit-large-patch14',
    url='https://huggingface.co/openai/clip-vit-large-patch14/resolve/main/model.safetensors',
    file_name='clip_vit_l14.safetensors',
    licence='MIT',
    format='clip_image',
  ),
  Published(
    name='clip_vit_l14_336',
    what="CLIP ViT-L/14 at 336 px, both towers, in transformers' form: features of CMMD (pagoda evaluate)",
    page='https://huggingface.co/openai/clip-vit-large-patch14-336',
    url='https://huggingface.co/openai/clip-vit-large-patch14-336/resolve/main/pytorch_model.bin',
    file_name='clip_vit_l14_336.bin',
    licence='MIT',
    format='clip_image',
  ),
  Published(
    name='mae_vitl16',
    what='MAE ViT-L/16, ImageNet-1k without labels, 224 px: one of the six encoders of FDr (pagoda evaluate)',
    page='https://github.com/facebookresearch/mae',
    url='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth',
    file_name='mae_pretrain_vit_large.pth',
    licence='CC BY-NC 4.0',
    format='timm',
    non_commercial=True,
  ),
  Published(
    name='convnextv2_base',
    what="ConvNeXt V2-B, fine-tuned on ImageNet-22k and -1k, 224 px, timm's: one of the six encoders of FDr "
    '(pagoda evaluate)',
    page='https://huggingface.co/timm/convnextv2_base.fcmae_ft_in22k_in1k',
    url='https://huggingface.co/timm/convnextv2_base.fcmae_ft_in22k_in1k/resolve/main/model.safetensors',
    file_name='convnextv2_base.fcmae_ft_in22k_in1k.safetensors',
    licence='CC BY-NC 4.0',
    format='convnext',
    non_commercial=True,
  ),
  Published(
    name='siglip2_so400m16',
    what="SigLIP 2 So400m/16, 256 px, the picture tower, timm's: one of the six encoders of FDr (pagoda evaluate)",
    page='https://huggingface.co/timm/vit_so400m_patch16_siglip_256.v2_webli',
    url='https://huggingface.co/timm/vit_so400m_patch16_siglip_256.v2_webli/resolve/main/model.safetensors',
    file_name='vit_so400m_patch16_siglip_256.v2_webli.safetensors',
    licence='Apache-2.0',
    format='siglip',
  ),
  Published(
    name='dinov2_vitl14',
    what='DINOv2 ViT-L/14, without registers: features of FD-DINOv2 (pagoda evaluate)',
    page='https://github.com/facebookresearch/dinov2#pretrained-backbones-via-pytorch-hub',
    url='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth',
    file_name='dinov2_vitl14_pretrain.pth',
    licence='Apache-2.0',
    format='dinov2',
  ),
  Published(
    name='in_embeddings_tf_efficientnet_lite0',
    what='ImageNet class embedding (1000 x 320) of the projected discriminator',
    page='https://github.com/autonomousvision/stylegan-xl/tree/main/in_embeddings',
    url='https://github.com/autonomousvision/stylegan-xl/raw/main/in_embeddings/tf_efficientnet_lite0.pkl',
    file_name='in_embeddings_tf_efficientnet_lite0.pkl',
    licence='MIT',
    size=1_280_990,
    sha256='c109f9a8a2371b78fbd464adaa51f82a4c0015db131b98ad74d8e63e0edcf2c6',
  ),
  Published(
    name='vgg16',
    what='VGG16, ImageNet-1k: feature network of LPIPS',
    page='https://docs.pytorch.org/vision/stable/models/generated/torchvision.models.vgg16.html',
    url='https://download.pytorch.org/models/vgg16-397923af.pth',
    file_name='vgg16-397923af.pth',
    licence='BSD-3-Clause (torchvision)',
    format='lpips',
    size=553_433_881,
    sha256='397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0',
  ),
  Published(
    name='lpips_vgg',
    what='LPIPS 0.1: linear weights on the VGG16 features',
    page='https://github.com/richzhang/PerceptualSimilarity',
    url='https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth',
    file_name='lpips_vgg.pth',
    licence='BSD-2-Clause',
    format='lpips',
    size=7_289,
    sha256='a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868',
  ),
  Published(
    name='pt_inception',
    what='Inception-v3 of 2015-12-05, as FID is defined by, ported to PyTorch',
    page='https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights',
    url='https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth',
    file_name='pt_inception-2015-12-05-6726825d.pth',
    licence='Apache-2.0',
    format='inception',
    size=95_628_359,
    sha256='6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
  ),
  Published(
    name='sd_vae_ft_mse',
    what='AutoencoderKL of Stable Diffusion, fine-tuned for MSE: images <-> 8x smaller latents of 4 channels',
    page='https://huggingface.co/stabilityai/sd-vae-ft-mse',
    url='https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.safetensors',
    file_name='sd-vae-ft-mse.safetensors',
    licence='MIT',
    format='diffusers',
    size=334_643_276,
    sha256='a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815',
    scaling=0.18215,
  ),
  _openai_reference(64, 'VIRTUAL_imagenet64_labeled.npz'),
  _openai_reference(128, 'VIRTUAL_imagenet128_labeled.npz'),
  _openai_reference(256, 'VIRTUAL_imagenet256_labeled.npz'),
  _openai_reference(512, 'VIRTUAL_imagenet512.npz', ' (1,000 images only)'),
)


def by_file_name(name: str) -> Published | None:
  """The published file that is saved under a name."""
  return next((entry for entry in REGISTRY if entry.file_name == name), None)
