# Stage 1 of 4: 256 px, 20 epochs of 7.624M images. The authors took 174 h on four RTX 5090, at 128
# images a GPU in a micro-step: lower batch_size until it fits yours, the global batch stays.
out_dir = "out/256"
data = "data/train"
vae = "KBlueLeaf/EQ-SDXL-VAE"
text_encoder = "Qwen/Qwen3-0.6B"
preset = "base"
image_size = 256
text_length = 256

images = 152_500_000
batch_size = 128
global_batch = 2048
checkpointing = False
lr = 0.5
warmup = 1000
beta1 = 0.9
beta2 = 0.98
weight_decay = 0.02
clip = 3.0
tread_rate = 0.5
