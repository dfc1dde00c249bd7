"""What the page of benchmarks says of its sections, and of the ways, models and policies in its tables."""

WAYS = {
    "hlip-native": "this library, its C++ kernels",
    "hlip-cpu": "this library, PyTorch's dense attention on groups of like length",
    "hlip-reference": "this library's plain formula",
    "hlip-triton": "this library, its Triton kernels",
    "hlip-varlen": "this library, by PyTorch's varlen attention",
    "hlip-flash": "this library, by flash-attn",
    "hlip-flash3": "this library, by FlashAttention-3",
    "hlip-flash4": "this library, by flash-attn-4",
    "hlip-xformers": "this library, by xformers",
    "sdpa": "PyTorch's `scaled_dot_product_attention`, one call for each group",
    "sdpa-dense": "the same in one call, where all groups are of one length",
    "sdpa-cudnn": "as `sdpa-dense`, through cuDNN's kernels",
    "sdpa-flash": "as `sdpa-dense`, through PyTorch's own FlashAttention",
    "published": "as `sdpa-dense`, with the copies that the released code makes when the level changes",
    "padded": "one call, all groups padded to the longest, a mask over the padding",
    "block-mask": "one call over all rows with a block-diagonal mask",
    "flex": "PyTorch's FlexAttention, compiled, with its block mask",
    "nested": "PyTorch's nested tensors of jagged layout",
    "varlen": "PyTorch's `torch.nn.attention.varlen`",
    "flash-attn": "flash-attn's `flash_attn_varlen_qkvpacked_func`",
    "flash-attn-3": "FlashAttention-3's `flash_attn_varlen_func`",
    "flash-attn-4": "flash-attn-4's `flash_attn_varlen_func`",
    "xformers": "xformers' `memory_efficient_attention` with its block-diagonal mask",
}
MODELS = {
    "hlip": "this library's encoder",
    "published": "the same weights, computed as the released code does",
    "vit": "a plain vision transformer of the same width and depth: every layer attends over the whole study",
    "swin": "MONAI's 3D Swin of Swin-B's widths and depths, windows of 7, patches of 4 voxels; its last merging of "
    "patches has 17 M parameters that the paper's 87.9 M do not have",
    "navit": "MONAI's 3D NaViT of the same width and depth",
}
POLICIES = {
    "packed": "this library: the scans that there are, no padding, no repeats",
    "repeat10_us": "this library, every study repeated or cropped to 10 scans: beside `packed`, what packing brings; "
    "beside `repeat10`, what the kernels bring",
    "repeat10": "the same repeated studies with PyTorch's layers, regrouped by copies: how HLIP was trained",
    "pad_max": "every study padded with empty scans to the longest of the batch, a mask over them; PyTorch's layers",
    "block_mask": "all studies as one sequence with a block-diagonal mask for each level; PyTorch's layers",
}
INTRODUCTION = """# Benchmarks

Made by `make bench` and `python bench/plot.py` from the rows in `bench/results/`; every row names its hardware,
versions, commit and time. Of every case its latest run is shown: the line in italics above tables names all commits
that their rows are of, and from when to when they were measured. All ways of a case ran in one process, in turns, on
the same data. `times ours` is how many times as long a way takes as this library: the median of the rounds' ratios, and
in brackets its 95% interval, which of up to five rounds is about their range. Above 1 we are faster; where we are not,
the row stays, and is listed under its table. `error` is the relative distance, in norms, from a result that another
computation gives. MB and GB are powers of ten, GiB are 2^30 bytes."""
ENCODERS = """How many volumes a second does a whole encoder take? The paper's Table 9 encodes one volume of 224 x 224 x
224 voxels in patches of 16; its Figure 1b studies of 8 scans of 48 x 224 x 224, in patches of 8 x 16 x 16. Inference is
a forward pass without gradients, training a forward and a backward pass. Without flash, attention writes its weights to
memory; on a CPU that can be the faster way to train, so of a model the faster row is the one to compare with. `of a
product` is the rate of all its matrix products, as a share of what one large product reached in the same run. GB moved
adds up what the ops of a pass read and write, each tensor once for each op: modelled from their shapes, not measured.
GiB peak is by how much the largest resident size of a fresh process grows in a training step (on a GPU, what PyTorch
allocates), GiB kept what autograd keeps for backward. `error`: `hlip` and `published` against the published way in
float32, `vit` and `swin` without flash against the same with it; `-` has nothing in its run to be compared with. The
last column is what the paper's authors published for one A40, where `published` is their HLIP: another machine, not
measured here."""
BASELINE = """**The published way** keeps a dense tensor of groups, (groups, 1 + patches, width). Where the level
changes it splits the cls rows off, averages or repeats them, reshapes the patches and concatenates: a copy of all
tokens. Attention is PyTorch's `scaled_dot_product_attention`. It is run eagerly, not compiled, in its best settings
otherwise: contiguous inputs that were cut into patches before, inference mode with weights in bf16, autocast in
training. Ours holds weights packed for the processor, in inference; PyTorch's layers have no such thing. Embeddings,
and in training the gradient of every parameter, of both are compared with the published way in float32."""
ALLOCATORS = {
    "kept": "The process keeps the memory that tensors leave, as this library's programs do: a favour to all models.",
    "default": """The same with the C library's allocator as it is, which is what a program gets that does nothing
about it: large results go back to the system, and every page is cleared again at the next call.""",
}
PACKING = """How many studies a second does a step take, if studies have as many scans as they happen to have? The same
studies and weights for all; embeddings, and in training gradients, are compared. Scan counts are those of three
collections, of every study at most 10: `pub_brain_5`, counted, of which most studies have 1 or 4; `brain_mri` and
`head_ct`, fitted to the paper's figures, of which most have more than 10, and 2 to 5, respectively. `tokens` are those
encoded, repeats and padding among them, GFLOP those of their matrix products. MB peak is what a step adds at most to
the process, or to the GPU's memory; GB moved adds up what its ops read and write, each tensor once for each op:
modelled, not measured. Where `error` is 0 stands what others are compared with."""
GROWING = """How do time and memory of a step grow with the scans of a study, the slices of a scan, and the studies of a
batch? In brackets, how many times as long as ours. On a CPU the model is small (width 128, three layers, scans of 294
tokens, a study of four scans where slices or studies grow), and small inputs show what a call costs at least, where we
lose. Memory is that of a training step, as above. A model is out of memory when a training step in a process of its own
would map more than 8 GiB beyond what it started with (on a GPU: allocate), and is not tried at larger sizes."""
ATTENTION = """How long does one call of attention within the groups of a level take, forward alone (`forward`), and
forward with backward (`training`)? A case is named by its level and the rows of a group, patches and a prefix row:
197 are a slice of 14 x 14 patches, 1177 a scan of six slices, 4705 a study of four scans; or by a mix, in which
studies have differing scan counts, with `drop50` after half of the patches were dropped, with `drop25` a quarter.
GFLOP/s count the work itself, no padding; `of a product` is that as a share of what a large matrix product reached
in the same run, `of a copy` the bytes that the work must read and write at least, as a share of a large copy's. MB
kept is what a training step holds for its backward (counted on CPUs), MB peak what a call adds at most to the
process, or to the GPU's memory: results, scratch, and what lies between. `prepare` is paid once a batch, for all
layers, and is not in the ratio: ours builds the groups of all levels, FlexAttention its block mask. The first call
is where compilers run. Measured: ms, times ours, GFLOP/s and the share of a product, MB peak, prepare, first call
and error; counted: MB kept; estimated, from the least bytes: the share of a copy. Ways of packed sequences read the
same rows, group after group; those of dense or padded groups get copies that are made before, which favours them.
Results are compared with the formula in float64 before anything is timed."""
LAYER = """What does a change of level cost, with the norm before attention and attention itself? `hlip` adds the
residual, moves every row to where the next level has it and takes the LayerNorm in one pass; attention reads the result
in place. `copies` is the released way: add, split the cls rows off, average or repeat them, reshape the patches,
concatenate, LayerNorm, then PyTorch's `scaled_dot_product_attention`. The products with weights between norm and
attention are the same in both and left out. Residuals are float32. MB moved adds up what the ops of a pass read and
write, each tensor once for each op: modelled from their shapes, not measured."""
BYTES = """Counted, not timed, and nothing measured: every byte that the Triton kernels request, seen by Triton's
interpreter (`ours`), and what attention that writes its weights to memory would move (`standard`, estimated from
shapes, as are the published way and the least). Does it grow as theory says? Where an exponent is 2, twice as many
make four times the bytes; -1 halves them, 0 leaves them. The claims are those of the paper's section 3.1 and, for
flash attention, N^2 D^2 / S: N tokens, M scans, d slices of a scan, D head dim, S fast memory, for which the rows of
a tile stand."""
STATIC = """Counted in machine code, not run: every Triton kernel, compiled ahead of time for its row of the tile table
by several versions of Triton (PyTorch 2.6 brings 3.2, 2.13 brings 3.9). Does a compiler
spill registers to memory, and does it leave the matrix units of sm_90 in their pipeline? `serialised` are kernels in
whose loop every matrix instruction waits for the one before, or of which the assembler says so; `dense, too` are those
of them where plain dense attention with the same tile is serialised as well. `loop` is the number of instructions of a
thread for a tile, `loop, dense` that of plain dense attention, which has one length for all groups and no masks,
`programs` how many a multiprocessor holds at once."""
