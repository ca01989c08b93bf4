# The demo: pixels at 16 px, then 32 px, a tiny XUT, minutes on two CPU cores. First: python prepare.py demo
#   python train.py configs/demo.py --image_size=16 --t_shift=4 --images=24000 --out_dir=out/demo16
#   python train.py configs/demo.py --init_from=out/demo16
out_dir = "out/demo"
data = "data/demo"
vae = ""                       # pixels
text_encoder = "data/demo_te"
image_size = 32
text_length = 8                # tokens: one for each word of a caption
mask_padding = True            # the empty caption is one pad token in training as in sampling

dim = 128
heads = 2
head_dim = 64
mlp_dim = 384
depth = 2
enc_blocks = 1
dec_blocks = 1
pre_blocks = 1
post_blocks = 1
patch_size = 4
skips = "mirror"               # these two and Muon learn faster at this size: README, "Paper and weights"
residual = "raw"
prediction = "data"            # clean areas and edges

images = 28_000
batch_size = 32
global_batch = 32
optimizer = "muon"
lr = 0.5
warmup = 100
tread_rate = 0.0
t_shift = 2.0
ema = 0.996
sample_cfg = 4.0               # the default, 3, gets a few more shapes wrong, and is a little nearer
sample_cfg_low = 0.3           # guidance below it would roughen edges

compile = False                # noqa: A001
workers = 0
log_every = 100
eval_every = 1000
sample_every = 1000
save_every = 1000
