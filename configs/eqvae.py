# EQ-VAE: all weights of a VAE that --vae names are trained on until its latents turn and scale as images do
# (arXiv 2502.09509). The checkpoints are VAEs: --vae=out/eqvae/ckpt_00010000. A first guess, not a measured
# recipe: watch psnr, scale_error and turn_error. L1 alone blurs: --lpips=0.1 where its package is.
out_dir = "out/eqvae"
train = "vae"
data = "data/train"
vae = "stabilityai/sdxl-vae"    # or any of its kind: a folder or hub id
image_size = 256

images = 320_000
batch_size = 8
global_batch = 32
lr = 1e-4                       # of each tensor, without a division
warmup = 100
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0
clip = 1.0
ema = 0.999
equivariance = 0.5
eval_every = 500
sample_every = 500
save_every = 500
