# A LoRA on the released model, for your own folder. Its license, CC-BY-NC-SA 4.0, goes over to what you make.
# A first guess for tens to some thousands of images, not a measured recipe: watch val_loss and the previews.
out_dir = "out/lora"
init_from = "KBlueLeaf/HDM-xut-340M-anime"
data = "data/train"
vae = "KBlueLeaf/EQ-SDXL-VAE"
text_encoder = "Qwen/Qwen3-0.6B"
image_size = 1024
text_length = 256
adapter = "lora"
rank = 16

images = 50_000
batch_size = 4
global_batch = 32
checkpointing = True
lr = 0.1                       # lokr.py's, whose rule for each part is the same
warmup = 100
beta2 = 0.95
weight_decay = 0.01
clip = 1.0
tread_rate = 0.0
ema = 0.99
eval_every = 250
sample_every = 250
save_every = 250
