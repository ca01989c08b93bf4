# Stage 3 of 4: 768 px, 1 epoch of 8.469M images. The authors took 42 h on four RTX 5090, at 64
# images a GPU in a micro-step: lower batch_size until it fits yours, the global batch stays.
out_dir = "out/768"
init_from = "out/512"           # its newest checkpoint, averaged weights
data = "data/train"
vae = "KBlueLeaf/EQ-SDXL-VAE"
text_encoder = "Qwen/Qwen3-0.6B"
preset = "base"
image_size = 768
text_length = 256

images = 8_469_000
batch_size = 64
global_batch = 512
checkpointing = True
lr = 0.05
warmup = 1000
beta1 = 0.9
beta2 = 0.995
weight_decay = 0.002
clip = 1.0
tread_rate = 0.5
