# All weights of the released model, on your own folder. Its license, CC-BY-NC-SA 4.0, goes over to what you
# make. A first guess for hundreds to some ten thousand pictures, not a measured recipe: watch val_loss and
# the previews.
out_dir = "out/finetune"
init_from = "KBlueLeaf/HDM-xut-340M-anime"
data = "data/train"
vae = "KBlueLeaf/EQ-SDXL-VAE"
text_encoder = "Qwen/Qwen3-0.6B"
image_size = 1024
text_length = 256

images = 100_000
batch_size = 4
global_batch = 32
checkpointing = True
lr = 0.02                      # the published last stage's
warmup = 100
beta2 = 0.995
weight_decay = 0.002
clip = 1.0
tread_rate = 0.0
ema = 0.999
eval_every = 250
sample_every = 250
save_every = 250
