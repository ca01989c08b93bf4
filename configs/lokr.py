# A LoKr on the released model by its authors' published settings: both factors full, norms learn, too. The
# model's license, CC-BY-NC-SA 4.0, goes over to what you make. They name no length, clip or average: guesses.
out_dir = "out/lokr"
init_from = "KBlueLeaf/HDM-xut-340M-anime"
data = "data/train"
vae = "KBlueLeaf/EQ-SDXL-VAE"
text_encoder = "Qwen/Qwen3-0.6B"
image_size = 1024
text_length = 256
adapter = "lokr"
factor = 4
train_norms = True

images = 100_000
batch_size = 8
global_batch = 32
checkpointing = True
lr = 0.1
warmup = 1000                  # steps, of 3,125: lower it with images
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.01
clip = 1.0
tread_rate = 0.0
ema = 0.99
eval_every = 250
sample_every = 250
save_every = 250
