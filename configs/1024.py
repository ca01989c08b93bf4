# Stage 4 of 4: 1024 px, 1 epoch of 3.649M images. The authors took 49 h on four RTX 5090, at 16
# images a GPU in a micro-step: lower batch_size until it fits yours, the global batch stays.
out_dir = "out/1024"
init_from = "out/768"           # its newest checkpoint, averaged weights
data = "data/train"
vae = "KBlueLeaf/EQ-SDXL-VAE"
text_encoder = "Qwen/Qwen3-0.6B"
preset = "base"
image_size = 1024
text_length = 512

images = 3_649_000
batch_size = 16
global_batch = 256
checkpointing = True
lr = 0.02
warmup = 1000
beta1 = 0.9
beta2 = 0.995
weight_decay = 0.002
clip = 1.0
tread_rate = 0.0
