# Stage 2 of 4: 512 px, 5 epochs of 8.469M images. The authors took 120 h on four RTX 5090, at 64
# images a GPU in a micro-step: lower batch_size until it fits yours, the global batch stays.
out_dir = "out/512"
init_from = "out/256"           # its newest checkpoint, averaged weights
data = "data/train"
vae = "KBlueLeaf/EQ-SDXL-VAE"
text_encoder = "Qwen/Qwen3-0.6B"
preset = "base"
image_size = 512
text_length = 256

images = 42_340_000
batch_size = 64
global_batch = 512
checkpointing = True
lr = 0.1
warmup = 1000
beta1 = 0.9
beta2 = 0.995
weight_decay = 0.005
clip = 1.0
tread_rate = 0.5
